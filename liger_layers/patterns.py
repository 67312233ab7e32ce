"""Patterns: what each layer of a stack is, as a short string, a list of names, or names by index."""

from collections.abc import Mapping, Sequence

from liger_layers.gates import GATES, PLACES

LETTERS: dict[str, str] = {
    "L": "liger",
    "F": "full",
    "W": "window",
    "M": "memories",
    "G": "gla",
    "S": "gsa",
    "H": "hgrn2",
    "B": "mamba2",
    "X": "mlstm",
    "R": "gated_retention",
    "V": "rwkv6",
    "T": "retention",
    "N": "linear",
    "D": "deltanet",
    "E": "gated_deltanet",
    "K": "kda",
}

Pattern = str | Sequence[str] | Mapping[int, str]


def _name(entry: str, letters: bool) -> str:
    if letters and entry in LETTERS:
        return LETTERS[entry]
    if not letters and isinstance(entry, str) and (entry in PLACES or entry in GATES):
        return entry
    known = [f"{letter} {name}" for letter, name in LETTERS.items()] if letters else [*PLACES, *GATES]
    raise ValueError(f"pattern: expected {'letters' if letters else 'names'} of {', '.join(known)}; got {entry!r}")


def read_pattern(pattern: Pattern) -> tuple[str, ...] | dict[int, str]:
    """Names of layers, in order or by index, of a string of LETTERS, a list of names, or names by index.

    Raises:
        ValueError: lists the letters or names there are.
    """
    if isinstance(pattern, Mapping):
        return {index: _name(name, False) for index, name in pattern.items()}
    if not isinstance(pattern, Sequence):
        raise ValueError(f"pattern: expected letters, a list of names, or names by index, got {pattern!r}")
    return tuple(_name(entry, isinstance(pattern, str)) for entry in pattern)


def spread(pattern: tuple[str, ...] | dict[int, str], depth: int, rest: str = "liger") -> list[str]:
    """A name for each of `depth` layers: a pattern repeats, the last time as far as there is room for.

    Layers that names by index leave out are `rest`. ValueError for a pattern that does not fit the depth.
    """
    if isinstance(pattern, Mapping):
        if bad := [i for i in pattern if isinstance(i, bool) or not isinstance(i, int) or not -depth <= i < depth]:
            raise ValueError(f"pattern: expected layer indices from {-depth} to {depth - 1}, got {bad}")
        chosen = {i % depth: name for i, name in pattern.items()}
        if len(chosen) < len(pattern):
            raise ValueError(f"pattern: expected a layer once, got indices {sorted(pattern)} of {depth} layers")
        return [chosen.get(i, rest) for i in range(depth)]
    if not pattern:
        raise ValueError("pattern: expected at least one layer, got none")
    if len(pattern) > depth:
        raise ValueError(f"pattern: expected at most {depth} layers, as deep as the model, got {len(pattern)}")
    return [pattern[i % len(pattern)] for i in range(depth)]
