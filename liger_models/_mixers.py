"""The mixers of a decoder from random weights, by their names in its config."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from liger_layers.building import MADE_ANEW, make_layer
from liger_layers.patterns import split
from liger_layers.recurrences import with_rule

# The kinds of layers whose state does not grow, and with routers of one kind at most.
MIXERS = ("liger", "recurrence", "mixer", "mom", "window")
# Arguments of mixers that the config has fields for, or that make no sense there.
_SETTLED = {"hidden_size", "num_heads", "num_kv_heads", "head_dim", "memories", "top_k", "conv_size"}
_SETTLED |= {"layer_idx", "num_layers", "projections"}


def listed(mixers: str | list[str]) -> list[str]:
    return [mixers] if isinstance(mixers, str) else list(mixers)


def whole_name(mixer: str) -> str:
    return f"mixer:{mixer}" if mixer in with_rule() else mixer


def known_options(mixer: str) -> list[str]:
    """The arguments of a mixer's class that the config does not settle."""
    kind, recurrence = split(mixer)
    settled = _SETTLED if recurrence is None else _SETTLED | {"rule", "gate"}
    return [name for name in inspect.signature(MADE_ANEW[kind]).parameters if name not in settled]


def make_mixer(config: Any, index: int) -> nn.Module:
    """The mixer of layer `index`: forward(x [B,T,hidden], mask, state) returns (y [B,T,hidden], state)."""
    name = config.layer_mixers[index]
    options = dict(head_dim=config.head_dim, num_kv_heads=config.num_key_value_heads)
    kind = split(name)[0]
    if kind in ("mixer", "mom"):
        options |= dict(conv_size=config.conv_size, layer_idx=index, num_layers=config.num_hidden_layers)
    if kind == "mom":
        options |= dict(memories=config.memories, top_k=config.memories_per_token)
    options |= (config.mixer_options or {}).get(name, {})
    return make_layer(name, config.hidden_size, config.num_attention_heads, options)
