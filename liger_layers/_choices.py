"""What a layer is told about its recurrence, what it means if left out, and what does not go together."""

from typing import NamedTuple

from liger_layers.feature_maps import FEATURE_MAPS
from liger_layers.gates import GATES, erases

MIXINGS = ("joint", "sum")


class Choices(NamedTuple):
    gate: str
    feature_map: str
    mixing: str
    mix: float
    normalize: bool


def _choose(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def settle(
    gate: str,
    feature_map: str | None = None,
    mixing: str | None = None,
    mix: float | None = None,
    normalize: bool | None = None,
) -> Choices:
    """Fill in what is None: one softmax over window and recurrence, or for memories that erase, which have no weights
    to share a softmax with, a small part of their own.

    Raises:
        ValueError: an unknown name, or choices that a memory that erases, or one that does not, cannot have.
    """
    _choose("gate", gate, GATES)
    erasing = erases(gate)
    feature_map = ("unit" if erasing else "kernel") if feature_map is None else feature_map
    mixing = ("sum" if erasing else "joint") if mixing is None else mixing
    _choose("feature_map", feature_map, FEATURE_MAPS)
    _choose("mixing", mixing, MIXINGS)
    normalize = not erasing if normalize is None else normalize
    if erasing and mixing == "joint":
        raise ValueError(f"mixing: expected 'sum' with gate {gate!r}, which erases, got 'joint'")
    if erasing and normalize is True:
        raise ValueError(f"normalize: expected False with gate {gate!r}, which erases, got True")
    if not erasing and not FEATURE_MAPS[feature_map].log:
        raise ValueError(f"feature_map: expected a positive one with gate {gate!r}, got {feature_map!r}")
    return Choices(gate, feature_map, mixing, (0.05 if erasing else 1.0) if mix is None else mix, normalize)
