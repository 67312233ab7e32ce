"""Hypothesis draws shapes, gates, dtypes, bounds and seeds; tensors come from torch under the drawn seed.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

MAGNITUDES = (0.0, -1e-4, -1.39, -3.5, -5.6, -100.0, -1e4, -float("inf"))
GATES = ("channel", "head", "fixed", "none")


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    normalize: bool
    gate: str

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """q, k, v, g, initial_state as fresh leaves of a dtype."""
        tensors = (self.q, self.k, self.v, self.g, self.initial_state)
        return [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]


def decay(gate: str, magnitude: float, B: int, T: int, H: int, K: int) -> torch.Tensor | None:
    """Log decays around a magnitude; -inf is mixed with moderate ones so that something survives."""
    shape = {"channel": (B, T, H, K), "head": (B, T, H), "fixed": (H,), "none": None}[gate]
    if shape is None:
        return None
    if magnitude == -float("inf"):
        return torch.where(torch.rand(shape) < 0.3, magnitude, -torch.rand(shape))
    return magnitude * (0.5 + torch.rand(shape))


@st.composite
def cases(draw, max_length: int = 70, gates=GATES, packed=None, magnitudes=MAGNITUDES) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    gate, magnitude = draw(st.sampled_from(gates)), draw(st.sampled_from(magnitudes))
    H, G = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    K, V = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    packed = draw(st.booleans()) if packed is None else packed
    if packed:
        lengths = draw(st.lists(st.integers(0, max_length // 2), min_size=1, max_size=4))
        B, T, N = 1, sum(lengths), len(lengths)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    else:
        B, T = draw(st.integers(1, 3)), draw(st.integers(1, max_length))
        N, bounds = B, None
    normalize = draw(st.booleans())
    q, k, v = torch.randn(B, T, H * G, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    state = torch.randn(N, H, K, V + normalize) if draw(st.booleans()) else None
    if normalize:
        # A denominator that may cross zero compares nothing; every shipped feature map is positive.
        q, k = q.abs() + 0.1, k.abs() + 0.1
        if state is not None:
            state[..., -1] = state[..., -1].abs() + 0.1
    return Case(q, k, v, decay(gate, magnitude, B, T, H, K), state, bounds, normalize, gate)
