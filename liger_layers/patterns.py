"""Patterns: what each layer of a stack is, as a short string, a list of names, or names by index."""

from collections.abc import Collection, Mapping, Sequence

from liger_layers.recurrences import with_gate, with_rule
from liger_ops.errors import fail

# How many memories a layer with some has unless told.
MEMORIES = 4
# The kinds of layers, and what a recurrence named behind a colon is to them: a gate, a rule, or nothing.
KINDS: dict[str, str | None] = {
    "liger": "gate",
    "recurrence": "gate",
    "memories": "gate",
    "mixer": "rule",
    "mom": "rule",
    "window": None,
    "full": None,
    "own": None,
}

LETTERS: dict[str, str] = {
    "L": "liger",
    "F": "full",
    "W": "window",
    "M": "memories",
    "O": "mom",
    "G": "liger:gla",
    "S": "liger:gsa",
    "H": "liger:hgrn2",
    "B": "liger:mamba2",
    "X": "liger:mlstm",
    "R": "liger:gated_retention",
    "V": "liger:rwkv6",
    "T": "liger:retention",
    "N": "liger:linear",
    "D": "liger:deltanet",
    "E": "liger:gated_deltanet",
    "K": "liger:kda",
}

Pattern = str | Sequence[str] | Mapping[int, str]


def split(name: str) -> tuple[str, str | None]:
    """ "liger:gla" -> the kind of layer and the recurrence named behind it, or None."""
    kind, colon, recurrence = name.partition(":")
    return kind, recurrence if colon else None


def check_layer(argument: str, name: object, kinds: Collection[str]) -> None:
    """ValueError unless the name is of one of the kinds, alone or with a recurrence that fits it."""
    if not isinstance(name, str) or not name:
        fail(argument, f"names of {', '.join(kinds)}", repr(name))
    kind, recurrence = split(name)
    if kind not in kinds:
        gates, rules = (kind in known for known in (with_gate(), with_rule()))
        fit = [k for k in kinds if (KINDS[k] == "gate" and gates) or (KINDS[k] == "rule" and rules)]
        hint = f"; a recurrence is named behind a layer: {' or '.join(f'{k}:{kind}' for k in fit)}" if fit else ""
        fail(argument, f"names of {', '.join(kinds)}{hint}", repr(name))
    if recurrence is not None:
        known = {"gate": with_gate(), "rule": with_rule(), None: {}}[KINDS[kind]]
        if recurrence not in known:
            wanted = f"{kind} alone" if not known else f"{kind}, alone or with one of {', '.join(known)}"
            fail(argument, wanted, repr(name))


def read_pattern(pattern: Pattern, kinds: Collection[str] = KINDS) -> tuple[str, ...] | dict[int, str]:
    """Names of layers, in order or by index, of a string of LETTERS, a list of names, or names by index.

    A name is a kind of layer, alone or with a recurrence behind a colon: "window", "liger:gla", "mixer:kda".

    Raises:
        ValueError: lists the letters or names there are.
    """
    if isinstance(pattern, str):
        if unknown := [letter for letter in pattern if letter not in LETTERS]:
            known = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())
            fail("pattern", f"letters of {known}", repr(unknown[0]))
        return read_pattern([LETTERS[letter] for letter in pattern], kinds)
    if not isinstance(pattern, Sequence | Mapping):
        fail("pattern", "letters, a list of names, or names by index", repr(pattern))
    for name in pattern.values() if isinstance(pattern, Mapping) else pattern:
        check_layer("pattern", name, kinds)
    return dict(pattern) if isinstance(pattern, Mapping) else tuple(pattern)


def spread(pattern: tuple[str, ...] | dict[int, str], depth: int, rest: str = "liger") -> list[str]:
    """A name for each of `depth` layers: a pattern repeats, the last time as far as there is room for.

    Layers that names by index leave out are `rest`. ValueError for a pattern that does not fit the depth.
    """
    if isinstance(pattern, Mapping):
        if bad := [i for i in pattern if isinstance(i, bool) or not isinstance(i, int) or not -depth <= i < depth]:
            fail("pattern", f"layer indices from {-depth} to {depth - 1}", bad)
        chosen = {i % depth: name for i, name in pattern.items()}
        if len(chosen) < len(pattern):
            fail("pattern", "a layer once", f"indices {sorted(pattern)} of {depth} layers")
        return [chosen.get(i, rest) for i in range(depth)]
    if not pattern:
        fail("pattern", "at least one layer", "none")
    if len(pattern) > depth:
        fail("pattern", f"at most {depth} layers, as deep as the model", len(pattern))
    return [pattern[i % len(pattern)] for i in range(depth)]
