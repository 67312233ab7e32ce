"""How many layers a GGUF file holds, before transformers spends minutes on those that its settings claim."""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path

# Bytes of each kind of value but strings (8) and arrays (9).
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_BLOCK = re.compile(rb"\w+\.(\d+)\.")


class _Reader:
    """A place in a file; struct.error behind its end."""

    def __init__(self, content: mmap.mmap):
        self.content, self.place = content, 0

    def number(self, form: str) -> int:
        found = struct.unpack_from("<" + form, self.content, self.place)[0]
        self.place += struct.calcsize(form)
        return found

    def text(self) -> bytes:
        size = self.number("Q")
        self.place += size
        return self.content[self.place - size : self.place]

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.place += _SIZES[inner] * count
                return
            for _ in range(count):
                self.skip(inner)
        else:
            self.place += _SIZES[kind]


def blocks(path: Path) -> int | None:
    """Layers that a file has tensors of; None where it is malformed, which whoever reads it tells."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader, found = _Reader(content), 0
            if content[:4] != b"GGUF" or struct.unpack_from("<I", content, 4)[0] not in (2, 3):
                return None
            reader.place = 8
            tensors, settings = reader.number("Q"), reader.number("Q")
            for _ in range(settings):
                reader.text()
                reader.skip(reader.number("I"))
            for _ in range(tensors):
                if named := _BLOCK.match(reader.text()):
                    found = max(found, int(named[1]) + 1)
                dimensions = reader.number("I")
                reader.place += 8 * dimensions + 12
            return found
    except (struct.error, ValueError, KeyError, IndexError, OverflowError, RecursionError):
        return None
