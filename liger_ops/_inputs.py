"""The records that travel from a public door, which has checked them, to what computes.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class RecurrenceInputs(NamedTuple):
    """q [B,T,HQ,K], k [B,T,H,K] and v [B,T,H,V], and how each token changes the state [N,H,K,V].

    Log decays g [B,T,H] or [B,T,H,K] and gv [B,T,H,V]; with beta [B,T,H], and then without gv, the delta rule.
    cu_seqlens [N+1] packs sequences into batch 1. chunk, tokens of a chunk, is the backend's choice where it is None.
    unit: as if q and k had length 1, which kernels of halves take as they are.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None = None
    gv: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    state: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    scale: float = 1.0
    chunk: int | None = None
    unit: bool = False

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def in_time(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RecurrenceInputs":
        """Each tensor that has a dimension of time changed, q first."""
        q, k, v, g, gv, beta = (
            None if x is None else change(x) for x in (self.q, self.k, self.v, self.g, self.gv, self.beta)
        )
        return self._replace(q=q, k=k, v=v, g=g, gv=gv, beta=beta)

    @property
    def per_channel(self) -> bool:
        """Whether keys decay channel by channel."""
        return self.g is not None and self.g.ndim == 4


class Gradients(NamedTuple):
    """Of the tensors of the same names among `RecurrenceInputs`; None where there is none or nobody wants it."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    g: torch.Tensor | None = None
    gv: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    state: torch.Tensor | None = None


# Fields whose second dimension is time.
IN_TIME = ("q", "k", "v", "g", "gv", "beta")
# The record as an op of torch.library takes it, in the order of its fields; its state is always there.
SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? gv, Tensor? beta, Tensor state, Tensor? cu_seqlens, "
    "float scale, int? chunk, bool unit"
)


class Recalled(NamedTuple):
    """What a state keeps of the R tokens that stay exact beyond the window, in the order of time.

    k [B,R,H,D] and v [B,R,H,V]; far [B,R,H,F] is k_log and g, by which they will enter the recurrence, then their
    score, then 1, or 0 where there is no token.
    """

    k: torch.Tensor
    v: torch.Tensor
    far: torch.Tensor


class AttentionInputs(NamedTuple):
    """q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V], the queries at the last T keys, and which keys each of them sees.

    visible [B,S], or None for all. softcap is 0 where scores are not bounded. With features q_log [B,T,HQ,M] and
    k_log [B,T,H,M], the latter and g [B,T,H] or [B,T,H,M] of the T tokens that leave the window, mix [HQ] and
    state [B,H,M,V+1], what the window no longer holds counts too. Of that, those of the highest score [B,T,H] stay
    exact, as many as recalled holds from before.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    window: int
    sinks: int
    scale: float
    softcap: float
    visible: torch.Tensor | None = None
    q_log: torch.Tensor | None = None
    k_log: torch.Tensor | None = None
    g: torch.Tensor | None = None
    mix: torch.Tensor | None = None
    state: torch.Tensor | None = None
    score: torch.Tensor | None = None
    recalled: Recalled | None = None


class KernelAttentionInputs(NamedTuple):
    """`AttentionInputs` as kernels take them: column [B,P] of the sinks, S where a row has fewer, and rest [B,S].

    rest marks the keys that are neither hidden nor sinks. Of what left the window, g [B,T,H] or None.

    With recall k_log and g are of what enters the recurrence at each query, and so is left_v [B,T,H,V]. A block of
    queries sees held_k [B,N*R,H,D] and held_v [B,N*R,H,V] until the query held_lost [B,N*R,H], and the keys that leave
    the window in it until left_lost [B,T,H].
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    column: torch.Tensor
    rest: torch.Tensor
    window: int
    scale: float
    q_log: torch.Tensor | None = None
    k_log: torch.Tensor | None = None
    g: torch.Tensor | None = None
    mix: torch.Tensor | None = None
    state: torch.Tensor | None = None
    left_v: torch.Tensor | None = None
    left_lost: torch.Tensor | None = None
    held_k: torch.Tensor | None = None
    held_v: torch.Tensor | None = None
    held_lost: torch.Tensor | None = None


def work_dtype(x: torch.Tensor) -> torch.dtype:
    """What sums of x are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
