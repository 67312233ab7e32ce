"""What a layer is told about its recurrence, what it means if left out, and what does not go together."""

from typing import NamedTuple

from liger_layers.feature_maps import FEATURE_MAPS
from liger_layers.gates import GATES, POOLINGS, erases
from liger_ops.errors import check_flag, check_known, check_weight

MIXINGS = ("joint", "sum")


class Choices(NamedTuple):
    gate: str
    feature_map: str
    mixing: str
    mix: float
    normalize: bool


def settle(
    gate: str,
    feature_map: str | None = None,
    mixing: str | None = None,
    mix: float | None = None,
    normalize: bool | None = None,
    pool: str | None = None,
) -> Choices:
    """Fill in what is None: one softmax over window and recurrence, or, for memories that erase or make keys of their
    own, whose weights estimate no softmax's, a small part beside the window.

    Raises:
        ValueError: an unknown name, a mix or normalize that is none, or choices that do not go with the gate.
    """
    check_known("gate", gate, GATES)
    erasing, own = erases(gate), GATES[gate].writes != "key"
    apart = erasing or own
    why = "which erases" if erasing else f"which writes {GATES[gate].writes}"
    usual = "unit" if erasing else "softmax" if own else "kernel"
    feature_map = usual if feature_map is None else feature_map
    mixing = ("sum" if apart else "joint") if mixing is None else mixing
    check_known("feature_map", feature_map, FEATURE_MAPS)
    check_known("mixing", mixing, MIXINGS)
    bare = erasing or GATES[gate].writes == "slots"
    normalize = not bare if normalize is None else normalize
    mix = (0.05 if apart else 1.0) if mix is None else mix
    check_flag("normalize", normalize)
    check_weight("mix", mix)
    if pool is not None:
        check_known("pool", pool, POOLINGS)
        if own and pool == "width":
            raise ValueError(f"pool: expected identity or heads with gate {gate!r}, {why}, got 'width'")
    if apart and mixing == "joint":
        raise ValueError(f"mixing: expected 'sum' with gate {gate!r}, {why}, got 'joint'")
    if bare and normalize:
        raise ValueError(f"normalize: expected False with gate {gate!r}, {why}, got True")
    if not erasing and not FEATURE_MAPS[feature_map].log:
        raise ValueError(f"feature_map: expected a positive one with gate {gate!r}, got {feature_map!r}")
    if own and FEATURE_MAPS[feature_map].paired:
        raise ValueError(f"feature_map: expected one for queries alone with gate {gate!r}, {why}, got {feature_map!r}")
    return Choices(gate, feature_map, mixing, mix, normalize)
