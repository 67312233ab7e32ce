"""The recurrence of a layer, whose gates are pooled from its keys.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width, M features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from liger_layers._state import Origin, Part
from liger_layers.choices import Choices
from liger_layers.feature_maps import FeatureMap
from liger_layers.gates import Gate, log_decay, strength
from liger_layers.recurrences import UpdateRule, gate_named, rule_behind, rule_named
from liger_ops.errors import check_factor
from liger_ops.limits import MAX_LOG_FEATURE


def _blank(x: torch.Tensor, padding: torch.Tensor | None, value: float = 0.0) -> torch.Tensor:
    return x if padding is None else x.masked_fill(padding, value)


class PooledRecurrence(NamedTuple):
    """What a layer was told about its recurrence, and what that means; the features are the layer's own."""

    chosen: Choices
    tau: float
    gate: Gate
    rule: UpdateRule

    @classmethod
    def of(cls, chosen: Choices, tau: float) -> PooledRecurrence:
        check_factor("tau", tau)
        gate = gate_named(chosen.gate)
        return cls(chosen, tau, gate, rule_named(rule_behind(gate, chosen.pool)))

    def __reduce__(self):
        # By name, for layers are pickled, and functions in the table need not be.
        return PooledRecurrence.of, (self.chosen, self.tau)

    @property
    def origin(self) -> Origin:
        """What decides about a state; what mixes it with others does not."""
        chosen = self.chosen._asdict()
        return (
            *((name, chosen[name]) for name in ("gate", "pool", "feature_map", "mixing", "normalize")),
            ("tau", self.tau),
        )

    def part(self, *lead: int, width: int, summed: bool) -> Part:
        """Of a state behind the leading sizes, with a column for sums of keys or not; two where slots lie between."""
        if self.rule.slots:
            return [(*lead, width, width)] * 2
        return (*lead, width, width + summed)

    def run(self, features: FeatureMap, q, k, v, mask, state, **packing):
        """Over every token, none of which waits: o [B,T,HQ,D] and the state; padding neither writes nor decays."""
        padding = None if mask is None else ~mask[:, :, None, None]
        gates = {"g": log_decay(self.gate, k, self.tau, self.chosen.pool), "beta": strength(self.gate, k)}
        if gates["g"] is not None and padding is not None:
            gates["g"] = gates["g"].masked_fill(padding if gates["g"].ndim == 4 else padding.squeeze(-1), 0.0)
        query, values = features(q, "query"), v
        if features.log:
            # A query's common factor cancels, and must not overflow before it does.
            query = (query - query.amax(-1, keepdim=True) if self.chosen.normalize else query).exp()
        key = None
        if self.rule.slots:
            key, values = (_blank(x.to(query.dtype), padding) for x in (k, v))
        elif self.rule.key is not None:
            key = features(k, "key")
            key = _blank(key.clamp(max=MAX_LOG_FEATURE).exp() if features.log else key, padding)
        values = values.to(query.dtype)
        if self.chosen.normalize:
            values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        gates = {name: x for name, x in gates.items() if x is not None}
        options = dict(scale=1.0, initial_state=state, output_final_state=True)
        o, state = self.rule.op(query, key, values, **gates, **options, **packing)
        if self.chosen.normalize:
            # A padded query has seen nothing and divides by zero otherwise.
            o = o[..., :-1] / _blank(o[..., -1:], padding, 1.0)
        return o.to(v.dtype), state
