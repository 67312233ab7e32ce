"""Stacks of different mixers with an MLP behind each: hybrids in plain PyTorch.

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liger_layers._arguments import check_sizes
from liger_layers._state import LigerState, MemoryState
from liger_layers.building import MADE_ANEW, make_layer
from liger_layers.patterns import Pattern, read_pattern, spread
from liger_ops.errors import check_positive, fail, lists_keywords

State = LigerState | MemoryState


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
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: State | None,
        router_logits: list | None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State | None]:
        told = dict(router_logits=router_logits, cu_seqlens=cu_seqlens)
        y, after = self.mixer(self.mixer_norm(x), mask, state, **told)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), after


class InterleavedStack(nn.Module):
    """Layers as a pattern says, each a mixer and an MLP behind a norm.

    forward(x [B,T,hidden]) returns (y [B,T,hidden], states): pass the states back to continue. mask [B,T] bool marks
    real tokens; router_logits is a list that takes in those of layers with memories; cu_seqlens [D+1] bounds documents
    packed along time, with batch 1 and without states, each as it would be alone.

    Args:
        hidden_size: width of x.
        num_layers: depth; the pattern repeats over it.
        num_heads: query heads of every mixer.
        pattern: letters ("LLLLLLLF"), names or names by index, see liger_layers.patterns: "liger" is LigerAttention,
            "memories" the same with routed memories, "recurrence" GatedRecurrence, "window" SlidingWindowAttention,
            "full" FullAttention, "mixer" LinearMixer, "mom" MixtureOfMemories; "liger:gla" and "mixer:kda" say which
            gate or rule.
        num_kv_heads, head_dim: of every mixer; num_heads and hidden_size / num_heads if None.
        intermediate_size: of the MLPs; 8/3 of hidden_size, rounded up to a multiple of 8, if None.
        options: further arguments of the mixers, by the pattern's names.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """

    @lists_keywords
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
        self.pattern = spread(read_pattern(pattern, MADE_ANEW), num_layers)
        options = options or {}
        if unused := sorted(set(options) - set(self.pattern)):
            fail("options", f"names in the pattern, {', '.join(sorted(set(self.pattern)))}", repr(unused[0]))
        intermediate_size = intermediate_size or -(-hidden_size // 3) * 8
        sizes = dict(num_kv_heads=num_kv_heads, head_dim=head_dim)
        mixers = (make_layer(n, hidden_size, num_heads, {**sizes, **options.get(n, {})}) for n in self.pattern)
        self.layers = nn.ModuleList(Block(mixer, hidden_size, intermediate_size) for mixer in mixers)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        states: Sequence[State] | None = None,
        router_logits: list[torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[State | None]]:
        if states is not None and len(states) != len(self.layers):
            fail("states", f"one for each of {len(self.layers)} layers", len(states))
        after = []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x, state = layer(x, mask, state, router_logits, cu_seqlens)
            after.append(state)
        return self.norm(x), after
