"""What layers are told for a while: to attend to everything, to keep another window, to recall or estimate less.

It is told to the calls of one thread: the layers stay as they are, and calls from other threads too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from liger_layers._alone import SlidingWindowAttention
from liger_layers._attention import Attention, LigerAttention
from liger_layers._state import Origin
from liger_layers._told import HERE, Told, now, telling
from liger_layers.gates import Mix
from liger_ops.errors import check_positive, check_weight, check_window, fail


@contextmanager
def attending_in_full(layers: Mapping[Attention, int | None]) -> Iterator[None]:
    """Let layers with a window attend to all tokens before each, or to as many of the last columns as are given.

    What a layer estimates, recurrence, mix and routed memories, is left out: with the weights of a pretrained
    attention it is that attention. A state is refused. ValueError for a layer without a window, or one that attends
    in full already.
    """
    for layer in layers:
        if not isinstance(layer, (LigerAttention, SlidingWindowAttention)):
            fail("layers", "layers with a window", type(layer).__name__)
        if now(layer).full:
            fail("layers", "layers that attend as they are", "one that attends in full already")
    with telling({**HERE.told, **{x: now(x)._replace(full=True, span=span) for x, span in layers.items()}}):
        yield


@contextmanager
def as_it_is(layer: Attention) -> Iterator[None]:
    """A layer that attends in full as it is otherwise, for a while."""
    with telling({**HERE.told, layer: now(layer)._replace(full=False)}):
        yield


@contextmanager
def with_window(layers: Iterable[LigerAttention], size: int) -> Iterator[None]:
    """Let layers keep a window of another size, so that more or less is left to their recurrence.

    States are of the window that they were made under: another is refused. ValueError for a size below 1.
    """
    check_window(size, 0)
    told = dict(HERE.told)
    for layer in layers:
        before = now(layer)
        parts = {name: _resized(name, part, size - before.window.size) for name, part in before.parts.items()}
        origin = _with(before.origin, window=size)
        told[layer] = before._replace(window=before.window._replace(size=size), parts=parts, origin=origin)
    with telling(told):
        yield


@contextmanager
def with_recall(layers: Iterable[LigerAttention], recall: int) -> Iterator[None]:
    """Let layers keep another number of tokens exact beyond window and sinks, by the scores that they have; 0 for none.

    States are of the number that they were made under: another is refused. ValueError for a number below 0, or for a
    layer without scores.
    """
    check_positive("recall", recall, 0)
    told = dict(HERE.told)
    for layer in layers:
        before = now(layer)
        recalled = before.parts["recalled"]
        if not isinstance(recalled, list):
            fail("layers", "layers that score tokens", "one without recall")
        parts = before.parts | {"recalled": [(recall, *part[1:]) for part in recalled]}
        told[layer] = before._replace(recall=recall, parts=parts, origin=_with(before.origin, recall=recall))
    with telling(told):
        yield


@contextmanager
def with_mix(mixes: Iterable[Mix], weight: float) -> Iterator[None]:
    """Let recurrences and routed memories in at one weight for all heads; 0 leaves what is exact.

    ValueError for a weight below 0.
    """
    check_weight("weight", weight)
    with telling({**HERE.told, **dict.fromkeys(mixes, weight)}):
        yield


def told_mixes(module: nn.Module) -> list[tuple[int, float]]:
    """The weights that mixes in a module are told from here, each by its place: what no state of a layer knows."""
    return [(i, told) for i, told in _told_in(module) if not isinstance(told, Told)]


def attends_in_full(module: nn.Module) -> bool:
    """Whether a layer in a module is told so from here."""
    return any(isinstance(told, Told) and told.full for _, told in _told_in(module))


def _told_in(module: nn.Module) -> list[tuple[int, Any]]:
    # A compiler would look at every module.
    if not HERE.told or torch.compiler.is_compiling():
        return []
    return [(i, HERE.told[m]) for i, m in enumerate(module.modules()) if m in HERE.told]


def _with(origin: Origin, **changes: Any) -> Origin:
    return tuple((name, changes.get(name, value)) for name, value in origin)


# Parts of a state that have a place for every token in the window.
_IN_WINDOW = ("k", "v", "visible", "raw", "scores")


def _resized(name: str, part: Any, more: int) -> Any:
    return (part[0] + more, *part[1:]) if name in _IN_WINDOW and part is not None else part
