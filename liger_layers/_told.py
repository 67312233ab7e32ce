"""What a layer may be told otherwise for a while: kept beside it, for the thread that says so and for no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from liger_layers._state import Origin, Part
from liger_layers._window import Window


class Told(NamedTuple):
    """What a call of a layer goes by, under the names that the layer has for it."""

    window: Window
    recall: int
    parts: dict[str, Part]
    origin: Origin
    full: bool
    span: int | None


class _Here(threading.local):
    """In each thread, what modules are told: a layer a Told, a Mix the weight that all its heads have."""

    # torch.compile watches an attribute of the object, not one of its class.
    def __init__(self):
        self.told: Mapping[nn.Module, Any] = {}


HERE = _Here()


@contextmanager
def telling(told: Mapping[nn.Module, Any]) -> Iterator[None]:
    """This thread's calls go by what is told, and by nothing else that was told before."""
    before = HERE.told
    HERE.told = told
    try:
        yield
    finally:
        HERE.told = before


def now(layer: Any) -> Told:
    """What a call of the layer from here would go by."""
    own: dict[str, Any] = {name: getattr(layer, name, 0) for name in Told._fields}
    return HERE.told.get(layer) or Told(**own)
