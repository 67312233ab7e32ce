"""What `linearize` was told, and the presets."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from liger_layers.choices import Choices, check_memories, check_recall, settle
from liger_layers.patterns import read_pattern, split, spread
from liger_layers.recurrences import with_gate
from liger_ops.errors import check_factor, check_flag, check_positive, check_weight, check_window, fail

# What a pretrained layer may become.
LAYERS = ("liger", "memories", "window", "full", "own")
# Tokens recalled where nothing else is said: docs/recovery.md says why.
_RECALL = 128


@dataclass(frozen=True)
class LigerConfig:
    """Travels inside config.json under "liger".

    gate: name in liger_layers.RECURRENCES of an entry with a gate; tau: its temperature, as in a decay of
    sigmoid(pooled key) ** (1 / tau).
    pool: what the gate averages the key over, a name in liger_layers.POOLINGS.
    feature_map: name in liger_layers.FEATURE_MAPS. None, here and below, is what suits the gate.
    mixing: "joint", one softmax of window and recurrence, or "sum", mix * recurrence + (1 - mix) * window.
    mix: initial weight of the recurrence per head; learn_mix: whether fine-tuning may change it; fit_mix: with "joint",
    give each head the weight at which its output is nearest to the pretrained attention's, on the calibration.
    normalize: divide the recurrence by its accumulated keys ("joint" always does).
    window, sinks: tokens that keep exact softmax attention; recall: how many beyond them do, those of the highest score
    for each key/value head, in layers with mixing="joint". None: 128, or as many as the model's longest text has
    beyond window and sinks. keep: indices of layers that stay as they are.
    pattern: what the layers are, in letters of liger_layers.patterns ("LLLLLLLF"), names or names by index: "liger" as
    these options say, "full", "window", "memories", or "liger:gla"; it repeats. A gate named there takes every option
    that was given, and what suits it for those which are as `gate` has them by itself.
    memories: routed memories of a layer, beside the one that sees every token; top_k: how many a token uses.
    router_aux_loss_coef: weight of the loss that fine-tuning adds to balance them.
    """

    gate: str = "gated_retention"
    tau: float = 1024.0
    feature_map: str | None = None
    mixing: str | None = None
    mix: float | None = None
    learn_mix: bool = True
    fit_mix: bool = False
    normalize: bool | None = None
    pool: str | None = None
    window: int = 64
    sinks: int = 4
    recall: int | None = None
    memories: int = 0
    top_k: int = 2
    router_aux_loss_coef: float = 0.01
    keep: tuple[int, ...] = field(default=())
    pattern: tuple[str, ...] | dict[int, str] = field(default=())

    def __post_init__(self):
        chosen = settle(self.gate, self.feature_map, self.mixing, self.mix, self.normalize, self.pool)
        for name, value in chosen._asdict().items():
            object.__setattr__(self, name, value)
        check_window(self.window, self.sinks)
        check_factor("tau", self.tau)
        check_flag("learn_mix", self.learn_mix)
        check_flag("fit_mix", self.fit_mix)
        if self.fit_mix and (self.mixing != "joint" or self.mix != self._usual["mix"]):
            given = f"it with mixing={self.mixing!r}, mix={self.mix}"
            fail("fit_mix", f'mixing="joint" and no other mix than {self._usual["mix"]} beside it', given)
        check_memories(self.memories, self.top_k)
        if self.recall is not None:
            check_positive("recall", self.recall, 0)
        # A pattern may name another gate, that can.
        if self.recall and not self.pattern:
            check_recall(self.recall, chosen)
        check_weight("router_aux_loss_coef", self.router_aux_loss_coef)
        object.__setattr__(self, "keep", _indices(self.keep))
        object.__setattr__(self, "pattern", read_pattern(self.pattern, LAYERS))

    @classmethod
    def from_preset(cls, preset: str = "default", **changes: Any) -> LigerConfig:
        """A preset with some fields changed; changes of None are ignored. ValueError lists presets and fields."""
        if not isinstance(preset, str) or preset not in PRESETS:
            fail("preset", f"one of {', '.join(PRESETS)}", repr(preset))
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"{unknown[0]}: unknown; expected one of {', '.join(sorted(known))}")
        return cls(**PRESETS[preset] | {name: value for name, value in changes.items() if value is not None})

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> LigerConfig:
        """What `to_dict` gave, and what it gave when a gate stood in a pattern by itself and nothing was recalled."""
        pattern = saved.get("pattern", ())
        if not isinstance(pattern, Mapping):
            pattern = [f"liger:{name}" if name in with_gate() else name for name in pattern]
        return cls(**{"recall": 0, **saved, "pattern": pattern})

    def to_dict(self) -> dict[str, Any]:
        pattern = self.pattern if isinstance(self.pattern, dict) else list(self.pattern)
        return {**asdict(self), "keep": list(self.keep), "pattern": pattern}

    def resolve(self, own: Sequence[int | None], longest: int | None = None) -> LigerConfig:
        """The same with a name for every layer in `pattern` and the full ones in `keep`, both as deep as the model.

        own are the windows that layers have by themselves (None: they see everything). Those that slide among others
        which do not keep just that window, unless a pattern was given, and so do all whose window is not wider than
        `window`. Memories are in the layers that the pattern says, or else in all that recur by these options.
        longest: tokens of the model's longest text, if it has an end.
        """
        depth = len(own)
        if bad := [i for i in self.keep if not -depth <= i < depth]:
            fail("keep", f"layer indices from {-depth} to {depth - 1}", bad)
        names = spread(self.pattern or ("liger",), depth)
        if self.memories and not _remember(names):
            names = ["memories" if name == "liger" else name for name in names]
            if not _remember(names):
                fail("memories", "0 with a pattern that has no place for them", self.memories)
        for name, none in (("recall", 0), ("fit_mix", False)):
            if getattr(self, name) and not self._share(names):
                fail(name, f"{none} with a pattern in which no recurrence shares the softmax", getattr(self, name))
        for index in self.keep:
            names[index] = "full"
        mixed = None in own and not self.pattern
        for index, window in enumerate(own):
            if names[index] == "own" and window is None:
                raise ValueError(f"pattern: expected a window of its own in layer {index}, which sees everything")
            if names[index] != "full" and window is not None and (mixed or window <= self.window):
                names[index] = "own"
        keep = tuple(i for i, name in enumerate(names) if name == "full")
        # None where layers that stay have taken every place: a saved model resolves what is written here once more.
        memories, share = (self.memories or 4) if _remember(names) else 0, self._share(names)
        recall = self.recall
        if recall is None:
            room = _RECALL if longest is None else longest - self.window - self.sinks
            recall = min(_RECALL, max(0, room))
        places = dict(keep=keep, pattern=tuple(names), memories=memories, recall=recall if share else 0)
        return self._placed(**places, fit_mix=self.fit_mix and share)

    def options(self, name: str) -> dict[str, Any]:
        """What a layer is told, settled, that the pattern calls "liger" or "memories", with a gate or not."""
        told = self.to_dict()
        for other in ("keep", "pattern", "router_aux_loss_coef", "fit_mix"):
            told.pop(other)
        kind, gate = split(name)
        if kind != "memories":
            told["memories"] = 0
        told |= self._choices(gate)
        if told["mixing"] != "joint":
            told["recall"] = 0
        return told

    def _choices(self, gate: str | None) -> dict[str, Any]:
        """What layers are told of a gate that a pattern names, or of the one that all others have, settled."""
        own: dict[str, Any] = {field: getattr(self, field) for field in Choices._fields}
        if gate is None or gate == self.gate:
            return own
        if gate not in self._settled:
            given = {field: None if value == self._usual[field] else value for field, value in own.items()}
            self._settled[gate] = settle(**{**given, "gate": gate})._asdict()
        return self._settled[gate]

    @functools.cached_property
    def _settled(self) -> dict[str, dict[str, Any]]:
        """`_choices` that were made."""
        return {}

    @functools.cached_property
    def _usual(self) -> dict[str, Any]:
        """What suits the gate by itself."""
        return settle(self.gate)._asdict()

    def _share(self, names: Sequence[str]) -> bool:
        """Whether there is a layer whose recurrence shares the softmax of its window."""
        return any(self._choices(split(name)[1])["mixing"] == "joint" for name in set(names) if _recur([name]))

    def _placed(self, **places: Any) -> LigerConfig:
        """A copy with other places for layers and what stands in them, whose choices are settled already."""
        after = copy.copy(self)
        for name, value in places.items():
            object.__setattr__(after, name, value)
        check_memories(after.memories, after.top_k)
        return after


def _remember(names: Sequence[str]) -> bool:
    return any(split(name)[0] == "memories" for name in names)


def _recur(names: Sequence[str]) -> bool:
    return any(split(name)[0] in ("liger", "memories") for name in names)


def _indices(keep: Iterable[int]) -> tuple[int, ...]:
    try:
        given = list(keep)
        found = {operator.index(i) for i in given}
    except TypeError:
        found = None
    if found is None or any(isinstance(i, bool) for i in given):
        fail("keep", "indices of layers", repr(keep))
    return tuple(sorted(found))


# The published code: softmax features without a denominator, half recurrence, half window, no sinks.
_PAPER = dict(feature_map="softmax", mixing="sum", mix=0.5, learn_mix=False, normalize=False, sinks=0)
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper-gla": dict(gate="gla", tau=16.0, **_PAPER),
    "paper-gsa": dict(gate="gsa", tau=16.0, **_PAPER),
    "paper-hgrn2": dict(gate="hgrn2", tau=1.0, **_PAPER),
}
