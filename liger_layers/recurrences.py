"""The one table of recurrences: how a memory takes up a token, and how its gates come about, by name.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, M memories, N sequences.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from liger_layers import gates
from liger_layers.gates import Gate
from liger_ops import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gla,
    chunk_gsa,
    chunk_hgrn2,
    chunk_kda,
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_rwkv6,
    chunk_simple_gla,
    mlstm,
)

Tensors = Mapping[str, torch.Tensor]


class Sizes(NamedTuple):
    """What the shapes of a rule depend on; lightning's decay also on the layer's place among `layers`."""

    memories: int
    query_heads: int
    heads: int
    key: int
    value: int
    slots: int
    layer: int = 0
    layers: int = 1


class RuleGate(NamedTuple):
    """One argument of the op, per head and token: a single number ("head"), or one per "channel" or "slot".

    form(raw [...,M,H,width], own) makes it from projected numbers, where own are the rule's parameters. start is the
    bias of a fresh projection.
    """

    width: str
    form: Callable[[torch.Tensor, Tensors], torch.Tensor]
    start: float = 0.0


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class UpdateRule:
    """How a memory takes up a token. key None: the rule makes keys from its gates, as 1 - decay.

    slots: between two states lie as many slots as channels, into which keys are written as they are. parameters start
    as the given functions of the sizes say; extra(own, sizes) are arguments of the op that do not depend on the token;
    state(sizes) the shapes of the state behind [N,H].
    """

    op: Callable
    gates: dict[str, RuleGate] = field(default_factory=dict)
    query: Callable[[torch.Tensor], torch.Tensor] = _same
    key: Callable[[torch.Tensor], torch.Tensor] | None = _same
    parameters: dict[str, Callable[[Sizes], torch.Tensor]] = field(default_factory=dict)
    extra: Callable[[Tensors, Sizes], dict] = lambda own, sizes: {}
    state: Callable[[Sizes], tuple[tuple[int, ...], ...]] = lambda sizes: ((sizes.key, sizes.value),)
    slots: bool = False

    def widths(self, sizes: Sizes) -> list[int]:
        """Numbers per head that each gate wants."""
        width = dict(head=1, channel=sizes.key, slot=sizes.slots)
        return [width[gate.width] for gate in self.gates.values()]

    def starts(self, sizes: Sizes) -> list[float]:
        """The bias that each of these numbers starts from."""
        pairs = zip(self.gates.values(), self.widths(sizes), strict=True)
        return [gate.start for gate, width in pairs for _ in range(width)]

    def activate(self, raw: torch.Tensor, own: Tensors, sizes: Sizes) -> dict[str, torch.Tensor]:
        """raw [...,M,H,sum of widths] -> the op's gates, [...,M,H] or [...,M,H,width], in float32 or float64."""
        raw = raw if raw.dtype == torch.float64 else raw.float()
        formed = {}
        for (name, gate), x in zip(self.gates.items(), raw.split(self.widths(sizes), -1), strict=True):
            formed[name] = gate.form(x, own).squeeze(-1) if gate.width == "head" else gate.form(x, own)
        return formed

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor,
        gates: Tensors,
        own: Tensors,
        sizes: Sizes,
        *,
        state: tuple[torch.Tensor, ...] | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V] as projected -> o [B,T,HQ,V] and the state, tensors [N,H,...]."""
        before = state[0] if state is not None and len(state) == 1 else state
        o, after = self.op(
            self.query(q),
            k if self.key is None or k is None else self.key(k),
            v,
            **gates,
            **self.extra(own, sizes),
            initial_state=before,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        return o, after if isinstance(after, tuple) else (after,)


def _hgrn2(q, k, v, g, **options):
    return chunk_hgrn2(q, v, g, **options)


def _gsa(q, k, v, g, **options):
    """A token writes into a slot what the slot's decay takes away."""
    return chunk_gsa(q, k, v, (-torch.expm1(g)).to(q.dtype), g, **options)


def _log_sigmoid(tau: float = 1.0) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    return lambda raw, own: F.logsigmoid(raw) / tau


def _softplus(raw, own):
    rate = own["A_log"].to(raw.dtype).exp().unsqueeze(-1)
    return -rate * F.softplus(raw)


def _rates(sizes: Sizes) -> torch.Tensor:
    """A_log [M,H]: rates from 1 to 16 over the heads."""
    return torch.linspace(1, 16, sizes.heads).log().repeat(sizes.memories, 1)


def _positive(x: torch.Tensor) -> torch.Tensor:
    return F.elu(x) + 1


_LINEAR = UpdateRule(lambda *qkv, **o: chunk_linear_attn(*qkv, normalize=False, **o), query=_positive, key=_positive)
# A step of 0.01 at first.
_PER_HEAD = RuleGate("head", _softplus, math.log(math.expm1(0.01)))
_PER_CHANNEL = _PER_HEAD._replace(width="channel")
_BETA = RuleGate("head", lambda raw, own: raw.sigmoid())
_SIMPLE = UpdateRule(chunk_simple_gla, dict(g=_PER_HEAD), parameters=dict(A_log=_rates))
_DELTA = UpdateRule(
    lambda *qkv, **o: chunk_delta_rule(*qkv, use_qk_l2norm_in_kernel=True, **o), dict(beta=_BETA), F.silu, F.silu
)
_GATED_DELTA = replace(
    _DELTA,
    op=lambda *qkv, **o: chunk_gated_delta_rule(*qkv, use_qk_l2norm_in_kernel=True, **o),
    gates=dict(g=_PER_HEAD, beta=_BETA),
    parameters=dict(A_log=_rates),
)
_KDA = replace(
    _GATED_DELTA,
    op=lambda *qkv, **o: chunk_kda(*qkv, use_qk_l2norm_in_kernel=True, **o),
    gates=dict(g=_PER_CHANNEL, beta=_BETA),
)
_LIGHTNING = UpdateRule(
    chunk_lightning_attn,
    query=F.silu,
    key=F.silu,
    extra=lambda own, sizes: dict(layer_idx=sizes.layer, num_layers=sizes.layers),
)
_RWKV6 = UpdateRule(
    chunk_rwkv6,
    # Beyond exp(8) nothing outlives a step, and the gradient would overflow.
    dict(w=RuleGate("channel", lambda raw, own: -raw.clamp(max=8.0).exp(), -3.0)),
    parameters=dict(u=lambda sizes: torch.full((sizes.query_heads, sizes.key), 0.5)),
    extra=lambda own, sizes: dict(u=own["u"]),
)
_GSA = UpdateRule(
    _gsa,
    dict(g=RuleGate("slot", _log_sigmoid(16.0))),
    F.silu,
    F.silu,
    state=lambda sizes: ((sizes.key, sizes.slots), (sizes.slots, sizes.value)),
    slots=True,
)
_MLSTM = UpdateRule(
    mlstm,
    dict(i=RuleGate("head", lambda raw, own: raw), f=RuleGate("head", _log_sigmoid(), 3.0)),
    state=lambda sizes: ((sizes.key, sizes.value), (sizes.key,), ()),
)


class Recurrence(NamedTuple):
    """What a name stands for: `rule` in layers that learn to project their gates (LinearMixer, MixtureOfMemories),
    `gate` in layers that pool them from pretrained keys (LigerAttention, GatedRecurrence); None where it has no such
    form."""

    rule: UpdateRule | None
    gate: Gate | None = None


RECURRENCES: dict[str, Recurrence] = {
    "gla": Recurrence(
        UpdateRule(chunk_gla, dict(g=RuleGate("channel", _log_sigmoid(16.0)))), Gate(True, gates.sigmoid)
    ),
    "gsa": Recurrence(_GSA, Gate(True, gates.sigmoid, recurrence="gsa")),
    "hgrn2": Recurrence(
        UpdateRule(_hgrn2, dict(g=RuleGate("channel", _log_sigmoid(), 3.0)), F.silu, None),
        Gate(True, gates.floored, recurrence="hgrn2"),
    ),
    "mamba2": Recurrence(_SIMPLE, Gate(False, gates.softplus)),
    "mlstm": Recurrence(_MLSTM, Gate(False, gates.sigmoid_alone)),
    "gated_retention": Recurrence(
        UpdateRule(chunk_simple_gla, dict(g=RuleGate("head", _log_sigmoid(16.0)))), Gate(False, gates.sigmoid)
    ),
    "rwkv6": Recurrence(_RWKV6, Gate(True, gates.exponential)),
    "retention": Recurrence(UpdateRule(chunk_retention), Gate(False, gates.fixed)),
    "linear": Recurrence(_LINEAR, Gate(False, None)),
    "deltanet": Recurrence(_DELTA, Gate(False, None, torch.sigmoid)),
    "gated_deltanet": Recurrence(_GATED_DELTA, Gate(False, gates.sigmoid, torch.sigmoid)),
    "kda": Recurrence(_KDA, Gate(True, gates.sigmoid, torch.sigmoid)),
    "lightning": Recurrence(_LIGHTNING),
    "simple_gla": Recurrence(_SIMPLE),
}

# The plainest recurrence for a decay per head or per channel, or none, that erases or does not.
_PLAINEST = {
    (None, False): "simple_gla",
    ("head", False): "simple_gla",
    ("channel", False): "gla",
    (None, True): "deltanet",
    ("head", True): "gated_deltanet",
    ("channel", True): "kda",
}


def with_gate() -> dict[str, Gate]:
    """The gates that are pooled from keys, by name."""
    return {name: entry.gate for name, entry in RECURRENCES.items() if entry.gate is not None}


def with_rule() -> dict[str, UpdateRule]:
    """The rules of linear memories, by name."""
    return {name: entry.rule for name, entry in RECURRENCES.items() if entry.rule is not None}


def gate_named(name: str) -> Gate:
    """The gate of an entry that has one."""
    gate = RECURRENCES[name].gate
    assert gate is not None
    return gate


def rule_named(name: str) -> UpdateRule:
    """The rule of an entry that has one."""
    rule = RECURRENCES[name].rule
    assert rule is not None
    return rule


def rule_behind(gate: Gate, pool: str | None) -> str:
    """The name of the recurrence whose rule takes what the gate makes of a key pooled so."""
    if gate.recurrence is not None:
        return gate.recurrence
    wide = gate.per_channel if pool is None else pool != "width"
    return _PLAINEST[None if gate.log_decay is None else "channel" if wide else "head", gate.strength is not None]
