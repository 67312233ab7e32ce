"""Seeded damage to a model's folder: what a file of JSON, or the header of safetensors, may become."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", WEIGHTS)
_VALUES = (None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, -(2**40), 0.5, -0.5, 1e300, float("nan"), float("inf"))
_VALUES += ("", "x", "../x", "🦀" * 5, [], [1, 2], ["x"], [[]], {}, {"x": 1}, {"type": "x"}, [None], "0", "true")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def damaged(
    files: dict[str, bytes], count: int, seed: int = 0, names: Sequence[str] = FILES
) -> Iterator[tuple[str, str, bytes]]:
    """`count` times: the name of a file, what was done to it, and its bytes afterwards."""
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        header, weights = _split(files[name]) if name == WEIGHTS else (files[name], b"")
        what, text = _mutated(header.decode(), draw)
        content = text.encode()
        if name == WEIGHTS:
            content = len(content).to_bytes(8, "little") + content + weights
        yield name, f"{number}: {what}", content


def _split(content: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def _mutated(text: str, draw: random.Random) -> tuple[str, str]:
    kind = draw.choice(("value", "value", "value", "value", "value", "key", "key", "text"))
    if kind == "text":
        start = draw.randrange(len(text))
        what, new = draw.choice(
            (("empty", ""), ("cut", text[:start]), ("nested", nested(100_000)), ("zeros", "\0" * 9), ("list", "[1]"))
        )
        return what, new
    tree = json.loads(text)
    holder, key = draw.choice(list(_places(tree)))
    if kind == "key":
        del holder[key]
        return f"without {key!r}", json.dumps(tree)
    value = draw.choice(_VALUES)
    holder[key] = value
    return f"{key!r} = {value!r}", json.dumps(tree)


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every object with a key, and every list with an index, but few of a long one."""
    keys = list(tree if isinstance(tree, dict) else range(len(tree))) if isinstance(tree, dict | list) else []
    for key in keys[:3] if len(keys) > 40 else keys:
        # So that what stands at the top is not lost among what does not.
        for _ in range(3 if depth == 0 else 1):
            yield tree, key
        yield from _places(tree[key], depth + 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}
