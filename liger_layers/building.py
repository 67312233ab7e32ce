"""A layer from its name in a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from liger_layers._alone import FullAttention, GatedRecurrence, SlidingWindowAttention
from liger_layers._attention import LigerAttention
from liger_layers.mixture_of_memories import LinearMixer, MixtureOfMemories
from liger_layers.patterns import KINDS, MEMORIES, split
from liger_ops.errors import fail

# The kinds that need no pretrained layer.
MADE_ANEW: dict[str, type[nn.Module]] = {
    "liger": LigerAttention,
    "recurrence": GatedRecurrence,
    "memories": LigerAttention,
    "mixer": LinearMixer,
    "mom": MixtureOfMemories,
    "window": SlidingWindowAttention,
    "full": FullAttention,
}


def make_layer(name: str, hidden_size: int, num_heads: int, options: Mapping[str, Any]) -> nn.Module:
    """The layer that a pattern calls so, with further arguments of its class."""
    kind, recurrence = split(name)
    said: dict[str, Any] = {} if recurrence is None else {str(KINDS[kind]): recurrence}
    if twice := said.keys() & options.keys():
        fail("options", f"no {min(twice)} beside {name!r}", repr(options[min(twice)]))
    if kind == "memories":
        said["memories"] = MEMORIES
    return MADE_ANEW[kind](hidden_size, num_heads, **{**said, **options})
