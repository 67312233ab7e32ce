"""What a layer is told about its recurrence, what it means if left out, and what does not go together."""

from typing import NamedTuple

from liger_layers.feature_maps import FEATURE_MAPS
from liger_layers.gates import POOLINGS, Gate
from liger_layers.patterns import KINDS
from liger_layers.recurrences import RECURRENCES, Recurrence, gate_named, rule_behind, rule_named, with_gate
from liger_ops.errors import check_flag, check_known, check_positive, check_weight, fail

MIXINGS = ("joint", "sum")


class Choices(NamedTuple):
    gate: str
    feature_map: str
    mixing: str
    mix: float
    normalize: bool
    pool: str | None


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
    check_known("gate", gate, with_gate())
    if pool is not None:
        check_known("pool", pool, POOLINGS)
    form = gate_named(gate)
    rule = rule_named(rule_behind(form, pool))
    erasing, complement = form.strength is not None, rule.key is None
    own = complement or rule.slots
    apart, bare = erasing or own, erasing or rule.slots
    why = "which erases" if erasing else f"which writes {'complement' if complement else 'slots'}"
    usual = "unit" if erasing else "softmax" if own else "kernel"
    feature_map = usual if feature_map is None else feature_map
    mixing = ("sum" if apart else "joint") if mixing is None else mixing
    check_known("feature_map", feature_map, FEATURE_MAPS)
    check_known("mixing", mixing, MIXINGS)
    normalize = not bare if normalize is None else normalize
    mix = (0.05 if apart else 1.0) if mix is None else mix
    check_flag("normalize", normalize)
    check_weight("mix", mix)
    if own and pool == "width":
        fail("pool", f"identity or heads with gate {gate!r}, {why}", repr(pool))
    if apart and mixing == "joint":
        fail("mixing", f"'sum' with gate {gate!r}, {why}", repr(mixing))
    if bare and normalize:
        fail("normalize", f"False with gate {gate!r}, {why}", normalize)
    if not erasing and not FEATURE_MAPS[feature_map].log:
        fail("feature_map", f"a positive one with gate {gate!r}", repr(feature_map))
    if own and FEATURE_MAPS[feature_map].paired:
        fail("feature_map", f"one for queries alone with gate {gate!r}, {why}", repr(feature_map))
    return Choices(gate, feature_map, mixing, mix, normalize, pool)


def check_memories(memories: int, top_k: int) -> None:
    """How many routed memories there are, and how many of them a token uses."""
    check_positive("memories", memories, 0)
    check_positive("top_k", top_k)
    if memories and top_k > memories:
        fail("top_k", f"an integer from 1 to {memories} memories", top_k)


def check_recall(recall: int, chosen: Choices) -> None:
    """How many tokens stay exact beyond the window, for which window and recurrence must share a softmax."""
    check_positive("recall", recall, 0)
    if recall and chosen.mixing != "joint":
        fail("recall", f"0 with mixing={chosen.mixing!r}, as gate {chosen.gate!r} has it", recall)


def register_gate(name: str, gate: Gate) -> None:
    """Add a gate under a new name, for LigerAttention, `linearize` and patterns; who loads such a model adds it too.

    Raises:
        ValueError: the name is taken, or the gate contradicts the recurrence that it names.
    """
    if not isinstance(name, str) or not name.isidentifier():
        fail("name", "an identifier", repr(name))
    if not isinstance(gate, Gate):
        fail("gate", "a Gate", type(gate).__name__)
    if name in RECURRENCES:
        fail("name", "a new name", f"{name!r}, which exists ({', '.join(RECURRENCES)})")
    for what, table in (("layer", KINDS), ("feature map", FEATURE_MAPS), ("pooling", POOLINGS)):
        if name in table:
            fail("name", "a new name", f"{name!r}, which is a {what}")
    fitting = {"gla", "hgrn2", "gsa"} if gate.per_channel and gate.log_decay is not None else {"simple_gla"}
    fitting = {rule_behind(gate._replace(recurrence=None), None)} | (fitting if gate.strength is None else set())
    if gate.recurrence is not None and gate.recurrence not in fitting:
        fail("recurrence", f"None or one of {', '.join(sorted(fitting))} for such a gate", repr(gate.recurrence))
    RECURRENCES[name] = Recurrence(None, gate)
