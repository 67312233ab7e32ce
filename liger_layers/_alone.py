"""One of the branches of Liger Attention alone, or full attention, on the same projections.

Shapes: B batch, T time, S keys so far, HQ query heads, H key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import nn

from liger_layers._attention import Attention
from liger_layers._full import full_attention
from liger_layers._recurrent import PooledRecurrence
from liger_layers._window import Window
from liger_layers.choices import settle
from liger_layers.feature_maps import FEATURE_MAPS
from liger_layers.rotary import rotate
from liger_ops import errors


class GatedRecurrence(Attention):
    """The recurrence alone: gated linear attention on softmax or kernel features.

    Arguments and calls as in LigerAttention.
    """

    @errors.lists_keywords
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        gate: str = "gated_retention",
        tau: float = 1024.0,
        feature_map: str | None = None,
        normalize: bool | None = None,
        pool: str | None = None,
        memories: int = 0,
        top_k: int = 2,
        bias: bool = False,
        projections: dict[str, nn.Module] | None = None,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, None, bias, projections)
        chosen = settle(gate, feature_map, None, None, normalize, pool)
        self.recurrence = PooledRecurrence.of(chosen, tau)
        self.origin += self.recurrence.origin
        part = self.recurrence.part(self.num_kv_heads, width=self.head_dim, summed=chosen.normalize)
        self.parts["recurrent"] = part
        self.feature_map = FEATURE_MAPS[chosen.feature_map](num_heads, self.num_kv_heads, self.head_dim)
        self._add_memories(memories, top_k)

    def mixer(self, q, k, v, mask, state, tables):
        o, recurrent = self.recurrence.run(self.feature_map, q, k, v, mask, state.recurrent)
        return o, dict(recurrent=recurrent)


class SlidingWindowAttention(Attention):
    """The window alone, with attention sinks. Arguments and calls as in LigerAttention."""

    @errors.lists_keywords
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        window: int = 64,
        sinks: int = 4,
        scale: float | None = None,
        softcap: float | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        projections: dict[str, nn.Module] | None = None,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, rope_theta, bias, projections)
        self.window = Window(window, sinks, scale, softcap)
        self.window.check()
        self.origin += self.window.origin
        self.parts |= self.window.parts(self.num_kv_heads, self.head_dim)

    def mixer(self, q, k, v, mask, state, tables):
        if tables is not None:
            q, k = (rotate(x, *tables) for x in (q, k))
        at = self.window.gather(q, k, v, mask, state)
        o = self.window.attend(at)
        return o if at.ranks is None else at.ranks.back(o), at.kept


class FullAttention(Attention):
    """Causal softmax attention over every token, whose state grows. Arguments and calls as in LigerAttention."""

    @errors.lists_keywords
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        scale: float | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        projections: dict[str, nn.Module] | None = None,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, rope_theta, bias, projections)
        errors.check_factor("scale", scale, optional=True)
        self.scale = scale
        kept = (None, self.num_kv_heads, self.head_dim)
        self.parts |= dict(k=kept, v=kept, visible=(None,))

    def mixer(self, q, k, v, mask, state, tables):
        if tables is not None:
            q, k = (rotate(x, *tables) for x in (q, k))
        # As the state was checked to be.
        assert state.k is not None and state.v is not None and state.visible is not None
        k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
        visible = torch.cat([state.visible, mask], 1)
        return full_attention(q, k, v, visible, scale=self.scale), dict(k=k, v=v, visible=visible)
