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
Self = TypeVar("Self", bound="_State")


class _State:
    """Batch-first tensors, tuples of them, or None where a layer keeps nothing; and the layer's `origin`."""

    origin: Origin

    def map(self: Self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply a function of a batch-first tensor to every tensor held: reorder beams, move, repeat."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: x if name == "origin" else each(function, x) for name, x in held.items()})

    def check_origin(self, origin: Origin) -> None:
        """ValueError for a state of a layer that was told something else."""
        if self.origin == origin:
            return
        given = dict(self.origin)
        for name, wanted in origin:
            if name not in given or given[name] != wanted:
                fail("state", f"one of a layer with {name} {wanted}", f"one with {given.get(name, 'none')}")

    def nbytes(self) -> int:
        held = (getattr(self, f.name) for f in fields(self) if f.name != "origin")
        return sum(x.nbytes for part in held if part is not None for x in (part if isinstance(part, tuple) else [part]))


def each(function: Callable, *held):
    """A function of one tensor from each argument: of all that stand at the same place where they are tuples."""
    if isinstance(held[0], tuple):
        return tuple(function(*x) for x in zip(*held, strict=True))
    return None if held[0] is None else function(*held)


@dataclass
class LigerState(_State):
    """Columns are the sinks, then the last W tokens; `visible` [B,P+W] hides unfilled slots, padding and repeats.

    k [B,P+W,H,D] as the window scores them, v [B,P+W,H,V], raw [B,W,H,D] the unrotated keys that the recurrence reads
    when a token leaves the window (None when it reads tokens at once), recurrent [B,H,M,V+1] or [B,H,M,V] in
    float32 (a tuple of two where slots are between), position [B] the tokens seen, padding excluded, memories
    [B,R,H,M,...] those that tokens are routed to.
    """

    k: torch.Tensor | None
    v: torch.Tensor | None
    visible: torch.Tensor | None
    raw: torch.Tensor | None
    recurrent: torch.Tensor | tuple[torch.Tensor, ...] | None
    position: torch.Tensor
    memories: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    origin: Origin = ()

    @classmethod
    def zeros(cls, shapes: Mapping[str, Any], origin: Origin, device: torch.device, dtype: torch.dtype) -> LigerState:
        """A state of parts of these shapes, as a layer's state_shapes gives them; dtype is that of keys."""
        kinds = dict(visible=torch.bool, position=torch.long, recurrent=torch.float32, memories=torch.float32)

        def make(name: str, shape: Any) -> Any:
            if isinstance(shape, list):
                return tuple(make(name, part) for part in shape)
            return None if shape is None else torch.zeros(shape, device=device, dtype=kinds.get(name, dtype))

        return cls(**{name: make(name, shape) for name, shape in shapes.items()}, origin=origin)

    def check(self, shapes: Mapping[str, Any], origin: Origin) -> None:
        """ValueError unless the state comes from such a layer and every part has its shape."""
        self.check_origin(origin)
        for name, shape in shapes.items():
            part = getattr(self, name)
            given = [tuple(x.shape) for x in part] if isinstance(part, tuple) else part if part is None else part.shape
            if given != shape:
                given = given if given is None or isinstance(given, list) else tuple(given)
                fail("state", f"{name} of shape {shape}", given)


@dataclass
class MemoryState(_State):
    """memories: tensors [B,M,H,...] in float32, as many as the update rule keeps, the shared memory last.

    inputs [B,conv_size-1,hidden] are the tokens that the convolution and a shifted router still see; None without one.
    """

    memories: tuple[torch.Tensor, ...]
    inputs: torch.Tensor | None
    origin: Origin = ()
