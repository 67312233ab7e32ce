"""What layers are told for a while: to attend to everything, or to keep a shorter window.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from liger_layers._alone import SlidingWindowAttention
from liger_layers._attention import Attention, LigerAttention
from liger_layers._state import LigerState
from liger_layers.rotary import rotary_tables, rotate
from liger_ops.errors import check_window, fail


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


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    span: int | None,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Exact causal softmax of rotated q [B,T,HQ,D] over the last `span` columns (None: all) of k and v [B,T,H,D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    T, seen = q.shape[2], None
    if mask is not None or (span is not None and span < T) or softcap is not None:
        key = torch.arange(T, device=q.device)
        query = key[:, None]
        seen = key <= query if span is None else (key <= query) & (key > query - span)
        # Padding sees itself: a row that sees nothing would be NaN.
        seen = seen[None] if mask is None else seen & mask[:, None] | (key == query)
        seen = seen[:, None]
    if softcap is not None:
        return _bounded(q, k, v, seen, scale, softcap).transpose(1, 2)
    # Without a mask where none is needed, which kernels take to be quick.
    options: dict[str, Any] = dict(attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _bounded(q, k, v, seen, scale: float | None, softcap: float) -> torch.Tensor:
    """Softmax attention [B,HQ,T,D] whose scores s are bounded to softcap tanh(s / softcap)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * (scores / softcap).tanh()).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@contextmanager
def with_window(layers: Iterable[LigerAttention], size: int) -> Iterator[None]:
    """Let layers keep a window of another size, so that more or less is left to their recurrence.

    States are of the window that they were made under: another is refused. ValueError for a size below 1.
    """
    check_window(size, 0)
    layers = list(layers)
    before = [(layer, layer.window, layer.parts, layer.origin) for layer in layers]
    try:
        for layer, window, parts, origin in before:
            layer.window = window._replace(size=size)
            layer.parts = {name: _resized(name, part, size - window.size) for name, part in parts.items()}
            layer.origin = tuple((name, size if name == "window" else value) for name, value in origin)
        yield
    finally:
        for layer, window, parts, origin in before:
            layer.window, layer.parts, layer.origin = window, parts, origin


# Parts of a state that have a place for every token in the window.
_IN_WINDOW = ("k", "v", "visible", "raw", "scores")


def _resized(name: str, part: Any, more: int) -> Any:
    return (part[0] + more, *part[1:]) if name in _IN_WINDOW and part is not None else part
