"""Layers on one set of projections: what stands between them is a window, a recurrence, both, or full attention.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width, W window, P sinks, M features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_layers import _arguments
from liger_layers._full import full_attention
from liger_layers._memories import RoutedMemories
from liger_layers._recall import RecallScore
from liger_layers._recurrent import PooledRecurrence
from liger_layers._state import LigerState, Origin, Part
from liger_layers._told import HERE
from liger_layers._window import Window
from liger_layers.choices import Choices, check_memories, check_recall, settle
from liger_layers.feature_maps import FEATURE_MAPS, FeatureMap
from liger_layers.gates import Mix, log_decay
from liger_layers.rotary import rotary_tables, rotate
from liger_ops import errors, liger_attention
from liger_ops.documents import Documents, read_documents

# The parts of a state that a layer may keep.
_NOTHING: dict[str, None] = dict.fromkeys(("k", "v", "visible", "raw", "recurrent", "memories", "scores", "recalled"))
# cos and sin of rotary positions, each [B or 1,T,D].
Tables = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Projections, positions and doors; called as LigerAttention says.

    A subclass has a `mixer`, and adds to `parts` and `origin`.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    memories: RoutedMemories | None
    recurrence: PooledRecurrence
    feature_map: FeatureMap
    window: Window
    # Whether it is full attention, over as many of the last columns: never by itself (`calls.attending_in_full`).
    full: bool = False
    span: int | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        rope_theta: float | None,
        bias: bool,
        projections: dict[str, nn.Module] | None,
    ):
        super().__init__()
        _arguments.check_sizes(hidden_size, num_heads, num_kv_heads, head_dim=head_dim)
        errors.check_factor("rope_theta", rope_theta, optional=True)
        errors.check_flag("bias", bias)
        self.hidden_size, self.num_heads, self.rope_theta = hidden_size, num_heads, rope_theta
        self.num_kv_heads, self.head_dim = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
        self.memories = None
        # What a state keeps, and what one of another layer must not differ in.
        self.parts: dict[str, Part] = {**_NOTHING, "position": ()}
        self.origin: Origin = (("layer", type(self).__name__), ("rope_theta", rope_theta))
        if projections is None:
            sizes = {"q_proj": num_heads, "k_proj": self.num_kv_heads, "v_proj": self.num_kv_heads}
            projections = {n: nn.Linear(hidden_size, h * self.head_dim, bias=bias) for n, h in sizes.items()}
            projections["o_proj"] = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        for name, module in projections.items():
            self.add_module(name, module)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        state: LigerState | None = None,
        position_embeddings: Tables | None = None,
        router_logits: list[torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LigerState | None]:
        _arguments.check_input(x, mask, self.hidden_size)
        documents = None if cu_seqlens is None else read_documents(cu_seqlens, x, dict(state=state), mask)
        return self.attend(x, mask, state, position_embeddings, router_logits, documents)

    def attend(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LigerState | None,
        position_embeddings: Tables | None,
        router_logits: list[torch.Tensor] | None,
        documents: Documents | None = None,
    ) -> tuple[torch.Tensor, LigerState | None]:
        """`forward` for who has checked x and mask; documents beside a mask know of it."""
        now = HERE.told.get(self, self)
        if documents is not None:
            return self._attend_apart(x, position_embeddings, router_logits, documents, now), None
        if now.full:
            return self._attend_in_full(x, mask, state, position_embeddings, now.span)
        q, k, v = self.project(x)
        if state is None:
            state = LigerState.zeros(now.parts, x.shape[0], now.origin, x.device, k.dtype)
        else:
            self._check_state(state, k, now)
        if position_embeddings is None and self.rope_theta is not None:
            before = torch.arange(x.shape[1], device=x.device) if mask is None else mask.cumsum(1) - 1
            position = state.position[:, None] + before
            position_embeddings = rotary_tables(position.clamp(min=0), self.head_dim, self.rope_theta)
        o, parts = self.mixer(q, k, v, mask, state, position_embeddings)
        if self.memories is not None:
            given = x, q, mask, state.memories, self.finish, self._remember, router_logits
            more, parts["memories"] = self.memories(*given)
            o = o + more.to(o.dtype)
        position = state.position + (x.shape[1] if mask is None else mask.sum(1))
        after = LigerState(**{**_NOTHING, **parts}, position=position, origin=state.origin)
        return self.o_proj(o.flatten(2).to(x.dtype)), after

    def _attend_in_full(self, x, mask, state, tables, span: int | None) -> tuple[torch.Tensor, LigerState]:
        """In the place of `attend`; what it returns as a state is none to go on from."""
        if state is not None:
            errors.fail("state", "none while the layer attends in full", type(state).__name__)
        q, k, v = self.project(x)
        count = torch.ones_like(x[..., 0], dtype=torch.long) if mask is None else mask.long()
        if tables is None and self.rope_theta is not None:
            tables = rotary_tables((count.cumsum(1) - 1).clamp(min=0), self.head_dim, self.rope_theta)
        if tables is not None:
            q, k = (rotate(y, *tables) for y in (q, k))
        o = full_attention(q, k, v, mask, span, self.window.scale, self.window.softcap)
        nothing: dict[str, Any] = dict(_NOTHING)
        return self.o_proj(o.flatten(2).to(x.dtype)), LigerState(**nothing, position=count.sum(1))

    def _attend_apart(self, x, tables, router_logits, documents: Documents, now: Any) -> torch.Tensor:
        """In the place of `attend`: every document as if it were alone."""
        qkv = self.project(x)
        if tables is None and self.rope_theta is not None:
            position = documents.positions.view(x.shape[:2])
            tables = rotary_tables(position, self.head_dim, self.rope_theta)
        # Where rows share theirs, each place has a copy.
        turned = [] if tables is None else [documents.apart(t.expand(*x.shape[:2], -1)) for t in tables]
        parts = []
        for i, (q, k, v) in enumerate(zip(*map(documents.apart, qkv), strict=True)):
            own = (turned[0][i], turned[1][i]) if turned else None
            if now.full:
                q, k = (q, k) if own is None else (rotate(q, *own), rotate(k, *own))
                parts.append(full_attention(q, k, v, None, now.span, self.window.scale, self.window.softcap))
            else:
                state = LigerState.zeros(now.parts, len(q), now.origin, x.device, k.dtype)
                parts.append(self.mixer(q, k, v, None, state, own)[0])
        o = documents.together(parts, qkv[0])
        if self.memories is not None and not now.full:
            state = LigerState.zeros(now.parts, len(documents.bounds) - 1, now.origin, x.device, qkv[1].dtype)
            flat, q = x.reshape(1, -1, x.shape[2]), qkv[0].flatten(0, 1).unsqueeze(0)
            given = flat, q, documents.mask, state.memories, self.finish, self._remember, router_logits
            more, _ = self.memories(*given, documents.bounds)
            o = o + more.to(o.dtype).view_as(o)
        return self.o_proj(o.flatten(2).to(x.dtype))

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        # It runs in a thread of its own, where nobody has told anything.
        vars(replica).update(HERE.told[self]._asdict() if self in HERE.told else {})
        return replica

    def _check_state(self, state: object, keys: torch.Tensor, now: Any) -> None:
        """ValueError unless the state comes from such a layer, on such keys, and every part has its shape."""
        batch = keys.shape[0]
        if not isinstance(state, LigerState):
            errors.fail("state", "a LigerState", type(state).__name__)
        if state.origin != now.origin:
            state.check_origin(now.origin)
        shown = state.visible
        seen = shown.shape[1] if isinstance(shown, torch.Tensor) and shown.ndim == 2 else 0
        for name, part in now.parts.items():
            held, wanted, given = getattr(state, name), None, None
            if isinstance(part, list):
                wanted = [(batch, *shape) for shape in part]
            elif part is not None:
                wanted = (batch, *(seen if size is None else size for size in part))
            if isinstance(held, tuple):
                given = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in held]
            elif held is not None:
                given = tuple(held.shape) if isinstance(held, torch.Tensor) else type(held).__name__
            if given != wanted:
                errors.fail("state", f"{name} of shape {wanted}", given)
        if shown is not None and shown.dtype != torch.bool:
            errors.fail("state", "visible of torch.bool", shown.dtype)
        held = state.recurrent[0] if isinstance(state.recurrent, tuple) else state.recurrent
        wide = keys.dtype if keys.dtype == torch.float64 else torch.float32
        for name, x, kind in (("k", state.k, keys.dtype), ("recurrent", held, wide)):
            if x is not None and x.dtype != kind:
                errors.fail("state", f"{name} of {kind}", x.dtype)
        if state.position.device != keys.device:
            errors.fail("state", f"one on {keys.device}", f"one on {state.position.device}")

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LigerState:
        """The state before the first token; dtype is that of keys."""
        now = HERE.told.get(self, self)
        return LigerState.zeros(now.parts, batch, now.origin, device, dtype)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unrotated q [B,T,HQ,D], k and v [B,T,H,D]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def finish(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `project` does behind the projections of keys and values; memories project by themselves."""
        return k, v

    def key_and_value(self) -> tuple[nn.Linear, nn.Linear]:
        """The projections that routed memories start from."""
        return self.k_proj, self.v_proj

    def mixer(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        state: LigerState,
        tables: Tables | None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Everything between the projections: o [B,T,HQ,D] and the parts of the next state."""
        raise NotImplementedError

    def _remember(self, q, k, v, mask, state, **packing):
        return self.recurrence.run(self.feature_map, q, k, v, mask, state, **packing)

    def _add_memories(self, memories: int, top_k: int) -> None:
        check_memories(memories, top_k)
        if memories:
            key, value = self.key_and_value()
            self.memories = RoutedMemories(key, value, self.num_heads, self.head_dim, memories, top_k)
            summed = self.recurrence.chosen.normalize
            self.parts["memories"] = self.recurrence.part(
                memories, self.num_kv_heads, width=self.head_dim, summed=summed
            )


class LigerAttention(Attention):
    """Softmax over a sliding window plus a gated recurrence, on one set of projections (arXiv 2503.01496, eq. 8-10).

    mixing="sum" is the paper's: o = mix * recurrence + (1 - mix) * window, the recurrence over every token so far.
    mixing="joint" is one softmax: exact over the window and the sinks, estimated by the recurrence for every
    older token, and normalised together, so that each token counts once; `mix` then scales the far weights.
    mix.weight is a parameter [HQ], fixed unless learn_mix. RoPE turns the window branch only. Gates that erase (the
    delta rule) read keys and queries of length 1 without a denominator, which leaves mixing="sum".

    memories > 0 adds as many routed memories (Mixture-of-Memories, arXiv 2502.13685), of which each token writes and
    reads top_k, with keys and values of their own that start as those of the layer, behind a weight per head that
    starts at zero: until trained, they change nothing.

    forward(x [B,T,hidden]) returns (y [B,T,hidden], state); pass the state back to continue. mask [B,T] bool marks
    real tokens: padding may stand anywhere, takes no room in the window and yields finite numbers without meaning.
    position_embeddings (cos, sin), each [B,T,D], override the built-in RoPE. router_logits is a list that takes in the
    logits [B*T,memories] of routed memories, which `load_balancing_loss` wants. cu_seqlens [D+1] bounds documents
    packed along time, with batch 1: each is as it would be alone, and the state returned is None.
    softcap bounds the window's scores s to softcap tanh(s / softcap).

    recall > 0, with mixing="joint", keeps as many tokens beyond the window exact for each key/value head: those of the
    highest `score`, which a token has from the layer's keys and values at it. A state holds them at a constant size.
    """

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
        gate: str | Choices = "gated_retention",
        tau: float = 1024.0,
        recall: int = 0,
        feature_map: str | None = None,
        mixing: str | None = None,
        mix: float | None = None,
        learn_mix: bool = True,
        normalize: bool | None = None,
        pool: str | None = None,
        memories: int = 0,
        top_k: int = 2,
        scale: float | None = None,
        softcap: float | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        projections: dict[str, nn.Module] | None = None,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, rope_theta, bias, projections)
        # A conversion settles them for all its layers beforehand.
        chosen = gate if isinstance(gate, Choices) else settle(gate, feature_map, mixing, mix, normalize, pool)
        errors.check_flag("learn_mix", learn_mix)
        self.window, self.recurrence = Window(window, sinks, scale, softcap), PooledRecurrence.of(chosen, tau)
        self.window.check()
        check_recall(recall, chosen)
        self.recall = recall
        self.origin += (*self.window.origin, *self.recurrence.origin, ("recall", recall))
        H, D = self.num_kv_heads, self.head_dim
        # Whether a token enters the recurrence only when it leaves the window.
        self.delayed = chosen.mixing == "joint"
        self.parts |= self.window.parts(H, D)
        self.parts["raw"] = (window, H, D) if self.delayed else None
        self.parts["recurrent"] = self.recurrence.part(H, width=D, summed=self.delayed or chosen.normalize)
        self.feature_map = FEATURE_MAPS[chosen.feature_map](num_heads, H, D)
        self.mix = Mix(num_heads, chosen.mix, learn_mix)
        self.score = RecallScore(H, D) if recall else None
        if recall:
            decay = log_decay(self.recurrence.gate, torch.zeros(1, 1, H, D), tau, chosen.pool)
            far = D + (0 if decay is None else decay.numel() // H) + 2
            self.parts |= dict(scores=(window, H), recalled=[(recall, H, width) for width in (D, D, far)])
        self._add_memories(memories, top_k)

    def mixer(self, q, k, v, mask, state, tables):
        if not self.delayed:
            return self._summed(q, k, v, mask, state, tables)
        q_near, k_near = (q, k) if tables is None else (rotate(q, *tables), rotate(k, *tables))
        now, recurrence, waiting = HERE.told.get(self, self), self.recurrence, dict(raw=k)
        window = now.window
        if self.score is not None:
            waiting["scores"] = self.score(k, v)
        at = window.gather(q_near, k_near, v, mask, state, **waiting)
        # As the state was checked to be.
        assert isinstance(state.recurrent, torch.Tensor)
        # The unrotated keys that leave the window enter the recurrence before each query.
        left: torch.Tensor = at.left["raw"]
        more: dict[str, Any] = dict(initial_state=state.recurrent)
        if now.recall:
            more = dict(initial_state=(state.recurrent, state.recalled), recall=now.recall, score=at.left["scores"])
        o, after = liger_attention(
            at.q,
            at.k,
            at.v,
            self.feature_map(q if at.ranks is None else at.ranks.queries(q), "query"),
            self.feature_map(left, "key"),
            log_decay(recurrence.gate, left, recurrence.tau, recurrence.chosen.pool),
            self.mix().clamp(min=0),
            window=window.size,
            sinks=window.sinks,
            scale=window.scale,
            output_final_state=True,
            visible=at.visible,
            softcap=window.softcap,
            **more,
        )
        kept = {**at.kept, "recurrent": after, "recalled": state.recalled}
        if isinstance(after, tuple):
            kept["recurrent"], kept["recalled"] = after
        return o if at.ranks is None else at.ranks.back(o), kept

    def _summed(self, q, k, v, mask, state, tables):
        """Window and recurrence one by one, the recurrence over every token."""
        q_near, k_near = (q, k) if tables is None else (rotate(q, *tables), rotate(k, *tables))
        window = HERE.told.get(self, self).window
        at = window.gather(q_near, k_near, v, mask, state)
        o = window.attend(at)
        o = o if at.ranks is None else at.ranks.back(o)
        far, recurrent = self.recurrence.run(self.feature_map, q, k, v, mask, state.recurrent)
        mix = self.mix().to(o.dtype).unsqueeze(-1)
        return mix * far + (1 - mix) * o, {**at.kept, "recurrent": recurrent}
