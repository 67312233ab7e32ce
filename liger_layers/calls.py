"""What layers are told for a while: to attend to everything, to keep another window, to recall more or less.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from liger_layers._alone import SlidingWindowAttention
from liger_layers._attention import Attention, LigerAttention
from liger_layers._full import full_attention
from liger_layers._state import LigerState, Origin
from liger_layers.rotary import rotary_tables, rotate
from liger_ops.errors import check_positive, check_window, fail


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
        if "attend" in vars(layer):
            fail("layers", "layers that attend as they are", "one that attends in full already")
    try:
        for layer, span in layers.items():
            # On the object, where it stands before that of its class.
            vars(layer)["attend"] = functools.partial(_attend, layer, span)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("attend", None)


@contextmanager
def as_it_is(layer: Attention) -> Iterator[None]:
    """A layer that attends in full as it is otherwise, for a while."""
    told = vars(layer).pop("attend", None)
    try:
        yield
    finally:
        if told is not None:
            vars(layer)["attend"] = told


def _attend(layer: Any, span: int | None, x, mask, state, tables, router_logits) -> tuple[torch.Tensor, LigerState]:
    """In the place of a layer's `attend`; what it returns as a state is none to go on from."""
    if state is not None:
        fail("state", "none while the layer attends in full", type(state).__name__)
    q, k, v = layer.project(x)
    count = torch.ones_like(x[..., 0], dtype=torch.long) if mask is None else mask.long()
    if tables is None and layer.rope_theta is not None:
        tables = rotary_tables((count.cumsum(1) - 1).clamp(min=0), layer.head_dim, layer.rope_theta)
    if tables is not None:
        q, k = (rotate(y, *tables) for y in (q, k))
    o = full_attention(q, k, v, mask, span, layer.window.scale, layer.window.softcap)
    nothing = dict.fromkeys(("k", "v", "visible", "raw", "recurrent"))
    return layer.o_proj(o.flatten(2).to(x.dtype)), LigerState(**nothing, position=count.sum(1))


@contextmanager
def with_window(layers: Iterable[LigerAttention], size: int) -> Iterator[None]:
    """Let layers keep a window of another size, so that more or less is left to their recurrence.

    States are of the window that they were made under: another is refused. ValueError for a size below 1.
    """
    check_window(size, 0)
    with _as_before(layers) as changing:
        for layer in changing:
            more = size - layer.window.size
            layer.window = layer.window._replace(size=size)
            layer.parts = {name: _resized(name, part, more) for name, part in layer.parts.items()}
            layer.origin = _told(layer.origin, window=size)
        yield


@contextmanager
def with_recall(layers: Iterable[LigerAttention], recall: int) -> Iterator[None]:
    """Let layers keep another number of tokens exact beyond window and sinks, by the scores that they have; 0 for none.

    States are of the number that they were made under: another is refused. ValueError for a number below 0, or for a
    layer without scores.
    """
    check_positive("recall", recall, 0)
    with _as_before(layers) as changing:
        for layer in changing:
            recalled = layer.parts["recalled"]
            if not isinstance(recalled, list):
                fail("layers", "layers that score tokens", "one without recall")
            layer.recall, layer.origin = recall, _told(layer.origin, recall=recall)
            layer.parts = layer.parts | {"recalled": [(recall, *part[1:]) for part in recalled]}
        yield


@contextmanager
def _as_before(layers: Iterable[LigerAttention]) -> Iterator[list[LigerAttention]]:
    """Layers whose window and recall are as they were when it is over."""
    layers = list(layers)
    before = [(layer, layer.window, layer.recall, layer.parts, layer.origin) for layer in layers]
    try:
        yield layers
    finally:
        for layer, window, recall, parts, origin in before:
            layer.window, layer.recall, layer.parts, layer.origin = window, recall, parts, origin


def _told(origin: Origin, **changes: Any) -> Origin:
    return tuple((name, changes.get(name, value)) for name, value in origin)


# Parts of a state that have a place for every token in the window.
_IN_WINDOW = ("k", "v", "visible", "raw", "scores")


def _resized(name: str, part: Any, more: int) -> Any:
    return (part[0] + more, *part[1:]) if name in _IN_WINDOW and part is not None else part
