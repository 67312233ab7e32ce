"""Stacks of different mixers with an MLP behind each: hybrids in plain PyTorch.

Shapes: B batch, T time, S keys so far, HQ query heads, H key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liger_layers._arguments import check_sizes
from liger_layers._attention import LigerAttention, SlidingWindowAttention
from liger_layers._state import LigerState, MemoryState
from liger_layers.mixture_of_memories import MixtureOfMemories
from liger_layers.patterns import Pattern, read_pattern, spread
from liger_layers.rotary import rotate
from liger_ops.errors import check_positive, fail

State = LigerState | MemoryState


class FullAttention(LigerAttention):
    """Causal softmax attention over every token, whose state grows. Arguments as LigerAttention; of what belongs to
    window, gate and features, none is used, and softcap is refused."""

    recurs = False

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.softcap is not None:
            fail("softcap", "None, which full attention needs", self.softcap)

    def state_shapes(self, batch: int, seen: int = 0) -> dict[str, tuple[int, ...] | None]:
        kept = (batch, seen, self.num_kv_heads, self.head_dim)
        return dict(k=kept, v=kept, visible=(batch, seen), raw=None, recurrent=None, position=(batch,), memories=None)

    def check_state(self, state: LigerState, batch: int) -> None:
        state.check(self.state_shapes(batch, state.visible.shape[1]))

    def mixer(self, q, k, v, mask, state, position_embeddings):
        if position_embeddings is not None:
            q, k = (rotate(x, *position_embeddings) for x in (q, k))
        k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
        visible = torch.cat([state.visible, mask], 1)
        T, S = q.shape[1], k.shape[1]
        query, key = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        # Padding sees itself: a row that sees nothing would be NaN.
        seen = (key <= query) & visible[:, None] | (key == query)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(*heads, attn_mask=seen[:, None], scale=self.scale, enable_gqa=True)
        return o.transpose(1, 2), LigerState(k, v, visible, None, None, state.position + mask.sum(1))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, mixer: nn.Module, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(hidden_size, eps=1e-6), nn.RMSNorm(hidden_size, eps=1e-6)
        self.mixer, self.mlp = mixer, SwiGLU(hidden_size, intermediate_size)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, state: State | None, router_logits: list | None
    ) -> tuple[torch.Tensor, State]:
        y, state = self.mixer(self.mixer_norm(x), mask, state, router_logits=router_logits)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class InterleavedStack(nn.Module):
    """Layers as a pattern says, each a mixer and an MLP behind a norm.

    forward(x [B,T,hidden]) returns (y [B,T,hidden], states): pass the states back to continue. mask [B,T] bool marks
    real tokens; router_logits is a list that takes in those of layers with memories.

    Args:
        hidden_size: width of x.
        num_layers: depth; the pattern repeats over it.
        num_heads: query heads of every mixer.
        pattern: letters ("LLLLLLLF"), names or names by index, see liger_layers.patterns: "liger" and gates are
            LigerAttention, "window" SlidingWindowAttention, "full" FullAttention, "memories" MixtureOfMemories.
        num_kv_heads, head_dim: of every mixer; num_heads and hidden_size / num_heads if None.
        intermediate_size: of the MLPs; 8/3 of hidden_size, rounded up to a multiple of 8, if None.
        options: further arguments of the mixers, by the pattern's names.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        pattern: Pattern = "LLLLLLLF",
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        check_positive("num_layers", num_layers)
        check_sizes(hidden_size, num_heads, num_kv_heads, head_dim=head_dim)
        if intermediate_size is not None:
            check_positive("intermediate_size", intermediate_size)
        self.pattern = spread(read_pattern(pattern), num_layers)
        options = options or {}
        if "own" in self.pattern:
            fail("pattern", "layers made anew", "'own', the window of a pretrained layer")
        if unused := sorted(set(options) - set(self.pattern)):
            fail("options", f"names in the pattern, {', '.join(sorted(set(self.pattern)))}", repr(unused[0]))
        intermediate_size = intermediate_size or -(-hidden_size // 3) * 8
        sizes = dict(num_kv_heads=num_kv_heads, head_dim=head_dim)
        mixers = (_mixer(name, hidden_size, num_heads, {**sizes, **options.get(name, {})}) for name in self.pattern)
        self.layers = nn.ModuleList(Block(mixer, hidden_size, intermediate_size) for mixer in mixers)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        states: Sequence[State] | None = None,
        router_logits: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[State]]:
        if states is not None and len(states) != len(self.layers):
            fail("states", f"one for each of {len(self.layers)} layers", len(states))
        after = []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, state = layer(x, mask, state, router_logits)
            after.append(state)
        return self.norm(x), after


_MIXERS = {"full": FullAttention, "window": SlidingWindowAttention, "memories": MixtureOfMemories}


def _mixer(name: str, hidden_size: int, num_heads: int, options: dict[str, Any]) -> nn.Module:
    if name in _MIXERS or name == "liger":
        return _MIXERS.get(name, LigerAttention)(hidden_size, num_heads, **options)
    return LigerAttention(hidden_size, num_heads, **{"gate": name, **options})
