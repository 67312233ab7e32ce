"""Gated recurrence, sliding window, and Liger Attention, which mixes the two: plain modules, no Hugging Face.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width, W window, P sinks, M features.
"""

import torch
from torch import nn

from liger_layers import _arguments
from liger_layers._choices import Choices, settle
from liger_layers._memories import Mix, RoutedMemories
from liger_layers._padding import close_ranks
from liger_layers._state import LigerState
from liger_layers.feature_maps import FEATURE_MAPS
from liger_layers.gates import GATES, erases, log_decay, strength
from liger_layers.rotary import rotary_tables, rotate
from liger_ops import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gla,
    chunk_gsa,
    chunk_kda,
    chunk_simple_gla,
    errors,
    liger_attention,
    sliding_window_attention,
)

# Sums of features with a larger logarithm could leave float32.
MAX_LOG = 30.0


def _blank(x: torch.Tensor, padding: torch.Tensor | None, value: float = 0.0) -> torch.Tensor:
    return x if padding is None else x.masked_fill(padding, value)


class LigerAttention(nn.Module):
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
    position_embeddings (cos, sin), each [B,T,D], override the built-in RoPE. softcap bounds the window's scores s to
    softcap tanh(s / softcap). router_logits is a list that takes in the logits [B*T,memories], which
    `load_balancing_loss` wants.
    """

    recurs, windows = True, True

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
        super().__init__()
        # A conversion settles them for all its layers beforehand.
        chosen = gate if isinstance(gate, Choices) else settle(gate, feature_map, mixing, mix, normalize, pool)
        _arguments.check_sizes(hidden_size, num_heads, num_kv_heads, head_dim=head_dim)
        errors.check_window(window, sinks)
        errors.check_factor("tau", tau)
        for name, value in (("scale", scale), ("softcap", softcap), ("rope_theta", rope_theta)):
            errors.check_factor(name, value, optional=True)
        for name, value in (("learn_mix", learn_mix), ("bias", bias)):
            errors.check_flag(name, value)
        _arguments.check_memories(memories, top_k)
        num_kv_heads, head_dim = num_kv_heads or num_heads, head_dim or hidden_size // num_heads
        if projections is None:
            sizes = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
            projections = {n: nn.Linear(hidden_size, h * head_dim, bias=bias) for n, h in sizes.items()}
            projections["o_proj"] = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        for name, module in projections.items():
            self.add_module(name, module)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.window, self.sinks, self.scale, self.softcap = window, sinks, scale, softcap
        self.gate, self.tau, self.pool, self.rope_theta = chosen.gate, tau, pool, rope_theta
        self.mixing, self.normalize = chosen.mixing, chosen.normalize
        if self.recurs:
            self.feature_map = FEATURE_MAPS[chosen.feature_map](num_heads, num_kv_heads, head_dim)
        if self.recurs and self.windows:
            self.mix = Mix(num_heads, chosen.mix, learn_mix)
        self.memories = None
        if memories:
            if not self.recurs:
                raise ValueError(f"memories: expected 0 without a recurrence, got {memories}")
            self.memories = RoutedMemories(*self.key_and_value(), num_heads, head_dim, memories, top_k)

    @property
    def delayed(self) -> bool:
        """Whether a token enters the recurrence only when it leaves the window."""
        return self.recurs and self.windows and self.mixing == "joint"

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...] | list[tuple[int, ...]] | None]:
        """The shape of every part of a state by name, a list where it is several tensors, None where there is none."""
        H, D, slots = self.num_kv_heads, self.head_dim, self.sinks + self.window
        near = (batch, slots, H, D) if self.windows else None
        recurrent = memories = None
        if self.recurs:
            two = GATES[self.gate].writes == "slots"
            size = (H, D, D + (self.delayed or self.normalize))
            recurrent = [(batch, *size)] * 2 if two else (batch, *size)
            if self.memories is not None:
                size = (batch, self.memories.count, H, D, D + self.normalize)
                memories = [size] * 2 if two else size
        return dict(
            k=near,
            v=near,
            visible=(batch, slots) if self.windows else None,
            raw=(batch, self.window, H, D) if self.delayed else None,
            recurrent=recurrent,
            position=(batch,),
            memories=memories,
        )

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LigerState:
        """The state before the first token."""
        return LigerState.zeros(self.state_shapes(batch), device, dtype)

    def check_state(self, state: LigerState, batch: int) -> None:
        """ValueError for a state of another layer or batch."""
        state.check(self.state_shapes(batch))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        state: LigerState | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        router_logits: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, LigerState]:
        _arguments.check_input(x, mask, self.hidden_size)
        q, k, v = self.project(x)
        if state is None:
            state = self.initial_state(x.shape[0], x.device, k.dtype)
        else:
            self.check_state(state, x.shape[0])
        if position_embeddings is None and self.rope_theta is not None:
            before = torch.arange(x.shape[1], device=x.device) if mask is None else mask.cumsum(1) - 1
            position = state.position[:, None] + before
            position_embeddings = rotary_tables(position.clamp(min=0), self.head_dim, self.rope_theta)
        o, after = self.mixer(q, k, v, mask, state, position_embeddings)
        if self.memories is not None:
            given = x, q, mask, state.memories, self.finish, self._recurrence, router_logits
            more, after.memories = self.memories(*given)
            o = o + more.to(o.dtype)
        return self.o_proj(o.flatten(2).to(x.dtype)), after

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unrotated q [B,T,HQ,D], k and v [B,T,H,D]."""
        return tuple(p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))

    def finish(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `project` does behind the projections of keys and values; memories project by themselves."""
        return k, v

    def key_and_value(self) -> tuple[nn.Linear, nn.Linear]:
        """The projections that routed memories start from."""
        return self.k_proj, self.v_proj

    def mixer(self, q, k, v, mask, state, position_embeddings):
        """Everything between the projections: o [B,T,HQ,D] and the next state."""
        turned = (q, k) if position_embeddings is None else [rotate(x, *position_embeddings) for x in (q, k)]
        position = state.position + (q.shape[1] if mask is None else mask.sum(1))
        if not self.windows:
            o, recurrent = self._recurrence(q, k, v, mask, state.recurrent)
            return o, LigerState(None, None, None, None, recurrent, position)

        q_near, k_near = turned
        visible = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
        visible = torch.cat([state.visible, visible], 1)
        keys, values = torch.cat([state.k, k_near], 1), torch.cat([state.v, v], 1)
        raw, recurrent, together = None, None, None
        if self.delayed:
            raw = torch.cat([state.raw, k], 1)
        if mask is not None:
            together = close_ranks(mask, self.window)
            keys, values, visible = (together.columns(x, self.sinks) for x in (keys, values, visible))
            raw, q_near = None if raw is None else together.columns(raw), together.queries(q_near)
        if self.delayed:
            query = q if together is None else together.queries(q)
            o, recurrent = self._joint(query, q_near, keys, values, raw[:, : k.shape[1]], visible, state.recurrent)
            raw = raw[:, k.shape[1] :].clone()
        else:
            near = dict(visible=visible, softcap=self.softcap)
            o = sliding_window_attention(q_near, keys, values, self.window, self.sinks, self.scale, **near)
        if together is not None:
            o = together.back(o)
        if self.recurs and not self.delayed:
            far, recurrent = self._recurrence(q, k, v, mask, state.recurrent)
            mix = self.mix().to(o.dtype).unsqueeze(-1)
            o = mix * far + (1 - mix) * o
        return o, LigerState(*self._keep(keys, values, visible), raw, recurrent, position)

    def _recurrence(self, q, k, v, mask, state, **packing):
        """The recurrence over every token, no delay: o [B,T,HQ,D], state; padding neither writes nor decays."""
        padding = None if mask is None else ~mask[:, :, None, None]
        g = log_decay(self.gate, k, self.tau, self.pool)
        if g is not None and padding is not None:
            g = g.masked_fill(padding if g.ndim == 4 else padding.squeeze(-1), 0.0)
        options = dict(scale=1.0, initial_state=state, output_final_state=True, **packing)
        query = self._query(q)
        if GATES[self.gate].writes == "slots":
            k, values = (_blank(x.to(query.dtype), padding) for x in (k, v))
            o, state = chunk_gsa(query, k, values, -torch.expm1(g), g, **options)
            return o.to(v.dtype), state
        features = _blank(self._features(k, g), padding)
        values = v.to(features.dtype)
        if self.normalize:
            values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        if erases(self.gate):
            op = chunk_delta_rule if g is None else chunk_kda if g.ndim == 4 else chunk_gated_delta_rule
            options |= dict(beta=strength(self.gate, k), use_qk_l2norm_in_kernel=True)
        else:
            op = chunk_gla if g is not None and g.ndim == 4 else chunk_simple_gla
        o, state = op(query, features, values, **options, **({} if g is None else dict(g=g)))
        if self.normalize:
            # A padded query has seen nothing and divides by zero otherwise.
            o = o[..., :-1] / _blank(o[..., -1:], padding, 1.0)
        return o.to(v.dtype), state

    def _query(self, q):
        query = self.feature_map(q, "query")
        if not self.feature_map.log:
            return query
        # A query's common factor cancels, and must not overflow before it does.
        return (query - query.amax(-1, keepdim=True) if self.normalize else query).exp()

    def _features(self, k, g):
        if GATES[self.gate].writes == "complement":
            return -torch.expm1(g)
        features = self.feature_map(k, "key")
        return features.clamp(max=MAX_LOG).exp() if self.feature_map.log else features

    def _joint(self, q, q_near, keys, values, leaving, visible, state):
        """`leaving` [B,T,H,D] are the unrotated keys that enter the recurrence before each query."""
        return liger_attention(
            q_near,
            keys,
            values,
            self.feature_map(q, "query"),
            self.feature_map(leaving, "key"),
            log_decay(self.gate, leaving, self.tau, self.pool),
            self.mix().clamp(min=0),
            window=self.window,
            sinks=self.sinks,
            scale=self.scale,
            initial_state=state,
            output_final_state=True,
            visible=visible,
            softcap=self.softcap,
        )

    def _keep(self, keys, values, visible):
        """The first P visible columns of each row and the last W; a sink still inside the window shows once."""
        S, P = visible.shape[1], self.sinks
        columns = torch.arange(S, device=visible.device)
        tail = slice(S - self.window, S)
        if not P:
            # Copies: a view would keep the whole prompt alive.
            return keys[:, tail].clone(), values[:, tail].clone(), visible[:, tail].clone()
        first = torch.where(visible, columns, S).topk(P, dim=1, largest=False, sorted=True).values
        last = first.masked_fill(first == S, -1).amax(1, keepdim=True)
        index = first.clamp(max=S - 1)[:, :, None, None].expand(-1, -1, *keys.shape[2:])
        kept = [torch.cat([x.gather(1, index), x[:, tail]], 1) for x in (keys, values)]
        return *kept, torch.cat([first < S, visible[:, tail] & (columns[tail] > last)], 1)


class GatedRecurrence(LigerAttention):
    """The recurrent branch alone: gated linear attention on softmax or kernel features. Arguments as LigerAttention."""

    windows = False


class SlidingWindowAttention(LigerAttention):
    """The window branch alone, with attention sinks. Arguments as LigerAttention; gate and features are unused."""

    recurs = False
