"""Which weights a decoder has: a name that other weights do not share, cheap enough to ask for at every token."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from liger_models._inputs import scattered

# Words of 8 bytes that are summed before their place counts.
_CHUNK = 4096


class _Named(NamedTuple):
    """Where a decoder's tensors and adapters hang, how all of them were, and the name for that."""

    tensors: Sequence[Mapping[str, torch.Tensor | None]]
    adapters: list[Any]
    stamp: tuple
    name: str


_NAMED: WeakKeyDictionary[nn.Module, _Named] = WeakKeyDictionary()


def name_of_weights(decoder: nn.Module, anew: bool) -> str:
    """The name of a decoder's parameters, buffers and active adapters, the same wherever they lie.

    They are read when one of them was written, replaced or moved; `anew` looks for modules that were put in, too. What
    was written through `.data` in place goes unnoticed, and so do weights that are not in memory, or are of a type of
    their own or made in inference mode, and differ in nothing but their values.
    """
    known = _NAMED.get(decoder)
    if known is None or anew:
        modules = list(decoder.modules())
        # A rotary embedding changes its buffers as texts grow.
        held = [x for m in modules for x in (m._parameters, {} if m._non_persistent_buffers_set else m._buffers) if x]
        adapters = [m for m in modules if hasattr(m, "_disable_adapters")]
    else:
        held, adapters = known.tensors, known.adapters
    stamp = _stamp(held, adapters)
    if known is not None and known.stamp == stamp:
        return known.name
    told = [_sum(x) for tensors in held for x in tensors.values() if x is not None], stamp[1]
    name = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    _NAMED[decoder] = _Named(held, adapters, stamp, name)
    return name


def _stamp(held: Sequence[Mapping[str, torch.Tensor | None]], adapters: list[Any]) -> tuple:
    """What changes with the tensors: their versions, their places; and which adapters are active."""
    present = [x for tensors in held for x in tensors.values() if x is not None]
    active = [(m._disable_adapters, m._active_adapter) for m in adapters]
    try:
        return [(x._version, x.data_ptr()) for x in present], active
    except RuntimeError:
        # One was made in inference mode, or is in a format of its own: the others have both all the same.
        return [_place(x) for x in present], active


def _place(x: torch.Tensor) -> tuple[int, ...]:
    try:
        return x._version, x.data_ptr()
    except RuntimeError:
        return (id(x),)


@torch.no_grad()
def _sum(x: torch.Tensor) -> tuple:
    """Sums of a tensor's bits, by chunks that are told apart, and its shape."""
    if type(x) not in (torch.Tensor, nn.Parameter) or x.device.type == "meta":
        return (tuple(x.shape),)
    flat = x.detach().contiguous().flatten().view(torch.uint8)
    whole = len(flat) // 8 * 8
    # Whatever is viewed as words must start at one.
    words = (flat[:whole] if flat.storage_offset() % 8 == 0 else flat[:whole].clone()).view(torch.int64)
    chunks = len(words) // _CHUNK * _CHUNK
    parts = words[:chunks].view(-1, _CHUNK).sum(1), words[chunks:], flat[whole:].long()
    return tuple(x.shape), *(int(scattered(y + torch.arange(len(y), device=y.device)).sum()) for y in parts)
