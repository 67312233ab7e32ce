"""What `linearize` was told, and the presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from liger_layers import FEATURE_MAPS, GATES


@dataclass(frozen=True)
class LigerConfig:
    """Travels inside config.json under "liger".

    gate: name in liger_layers.GATES; tau: its temperature, decay = sigmoid(pooled key) ** (1 / tau).
    feature_map: name in liger_layers.FEATURE_MAPS.
    mixing: "joint", one softmax of window and recurrence, or "sum", mix * recurrence + (1 - mix) * window.
    mix: initial weight of the recurrence per head; learn_mix: whether fine-tuning may change it.
    normalize: divide the recurrence by its accumulated keys ("joint" always does).
    window, sinks: tokens that keep exact softmax attention. keep: indices of layers that stay full attention.
    """

    gate: str = "gated_retention"
    tau: float = 1024.0
    feature_map: str = "kernel"
    mixing: str = "joint"
    mix: float = 1.0
    learn_mix: bool = True
    normalize: bool = True
    window: int = 64
    sinks: int = 4
    keep: tuple[int, ...] = field(default=())

    def __post_init__(self):
        for name, value, choices in (
            ("gate", self.gate, GATES),
            ("feature_map", self.feature_map, FEATURE_MAPS),
            ("mixing", self.mixing, ("joint", "sum")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name, value, low in (("window", self.window, 1), ("sinks", self.sinks, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau: expected a number > 0, got {self.tau!r}")
        if not 0 <= self.mix < math.inf:
            raise ValueError(f"mix: expected a weight >= 0, got {self.mix!r}")
        for name in ("learn_mix", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        object.__setattr__(self, "keep", tuple(sorted({int(i) for i in self.keep})))

    @classmethod
    def from_preset(cls, preset: str = "default", **changes: Any) -> LigerConfig:
        """A preset with some fields changed; changes of None are ignored. ValueError lists presets and fields."""
        if preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"{unknown[0]}: unknown; expected one of {', '.join(sorted(known))}")
        return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep)}


PRESETS = {
    "default": LigerConfig(),
    # The published code: softmax features without a denominator, half recurrence, half window, no sinks.
    "paper-gla": LigerConfig(
        gate="gla", tau=16.0, feature_map="softmax", mixing="sum", mix=0.5, learn_mix=False, normalize=False, sinks=0
    ),
}
