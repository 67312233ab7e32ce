"""What a layer remembers between calls: constant in size from the first token on.

Shapes: B batch, H key/value heads, D width, V value width, W window, P sinks, M features or memories,
R routed memories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from liger_ops.errors import fail

# What decides about a state in the layer that it comes from, by name.
Origin = tuple[tuple[str, Any], ...]
# The shape of a part of a state behind the batch, a list where it is several tensors, None where a layer keeps nothing.
# None in it is the number of columns seen, none at first.
Part = tuple[int | None, ...] | list[tuple[int, ...]] | None
# A part that is there.
Held = torch.Tensor | tuple[torch.Tensor, ...]
Self = TypeVar("Self", bound="_State")
_KINDS = dict(visible=torch.bool, position=torch.long)
# Parts that are sums, or are compared, in more than the keys' digits.
_WIDE = ("recurrent", "memories", "scores")


@dataclass(kw_only=True)
class _State:
    """Batch-first tensors, tuples of them, or None where a layer keeps nothing; and the layer's `origin`."""

    origin: Origin = ()

    def map(self: Self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply a function of a batch-first tensor to every tensor held: reorder beams, move, repeat."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, x in held.items():
            if name != "origin" and x is not None:
                held[name] = tuple(map(function, x)) if isinstance(x, tuple) else function(x)
        return type(self)(**held)

    def check_origin(self, origin: Origin) -> None:
        """ValueError for a state of a layer that was told something else."""
        given = dict(self.origin)
        for name, wanted in origin:
            if name not in given or given[name] != wanted:
                fail("state", f"one of a layer with {name} {wanted}", f"one with {given.get(name, 'none')}")

    def nbytes(self) -> int:
        held = (getattr(self, f.name) for f in fields(self) if f.name != "origin")
        return sum(x.nbytes for part in held if part is not None for x in (part if isinstance(part, tuple) else [part]))


def each(function: Callable[..., torch.Tensor], *held: Held) -> Held:
    """A function of one tensor from each argument: of all that stand at the same place where they are tuples."""
    if isinstance(held[0], tuple):
        return tuple(function(*x) for x in zip(*held, strict=True))
    return function(*held)


@dataclass
class LigerState(_State):
    """Columns are the sinks, then the last W tokens; `visible` [B,P+W] hides unfilled slots, padding and repeats.

    k [B,P+W,H,D] as the window scores them, v [B,P+W,H,V], raw [B,W,H,D] the unrotated keys that the recurrence reads
    when a token leaves the window (None when it reads tokens at once), recurrent [B,H,M,V+1] or [B,H,M,V] in
    float32 (a tuple of two where slots are between), position [B] the tokens seen, padding excluded, memories
    [B,R,H,M,...] those that tokens are routed to. With recall, scores [B,W,H] of the tokens in the window, and recalled
    those beyond it which stay exact, as `liger_attention` returns them.
    """

    k: torch.Tensor | None
    v: torch.Tensor | None
    visible: torch.Tensor | None
    raw: torch.Tensor | None
    recurrent: Held | None
    position: torch.Tensor
    memories: Held | None = None
    scores: torch.Tensor | None = None
    recalled: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def zeros(
        cls, parts: Mapping[str, Part], batch: int, origin: Origin, device: torch.device, dtype: torch.dtype
    ) -> LigerState:
        """The state of a layer before the first token; dtype is that of keys."""
        made: dict[str, Any] = {}
        wide = torch.promote_types(dtype, torch.float32)
        for name, part in parts.items():
            kind = wide if name in _WIDE else _KINDS.get(name, dtype)
            if isinstance(part, list):
                # What is recalled is keys and values, and then what enters the recurrence.
                kinds = (dtype, dtype, wide) if name == "recalled" else (kind,) * len(part)
                sizes = zip(part, kinds, strict=True)
                made[name] = tuple(torch.zeros((batch, *shape), device=device, dtype=kind) for shape, kind in sizes)
            elif part is None:
                made[name] = None
            else:
                made[name] = torch.zeros((batch, *(size or 0 for size in part)), device=device, dtype=kind)
        return cls(**made, origin=origin)


@dataclass
class MemoryState(_State):
    """memories: tensors [B,M,H,...] in float32, as many as the update rule keeps, the shared memory last.

    inputs [B,conv_size-1,hidden] are the tokens that the convolution and a shifted router still see; None without one.
    """

    memories: tuple[torch.Tensor, ...]
    inputs: torch.Tensor | None
