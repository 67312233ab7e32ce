"""linearize(model): swap the attention of a pretrained causal LM for Liger Attention, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from liger_layers import FEATURE_MAPS
from liger_layers.choices import settle
from liger_layers.patterns import split
from liger_models._calibration import calibrate, check_calibration, draw_text, measure
from liger_models._checks import check_architecture, check_weights
from liger_models._snapshot import looked_at, whole_or_not
from liger_models.configuration import LigerConfig
from liger_models.families import own_windows
from liger_models.modeling import FAMILIES, forget_name, new_attention, swap_attention

# Layers without a recurrence.
_WINDOWS = ("full", "window", "own")


def linearize(
    model: PreTrainedModel,
    config: LigerConfig | None = None,
    *,
    preset: str = "default",
    keep: Iterable[int] | None = None,
    calibration: torch.Tensor | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Turn a causal LM of a family in FAMILIES into a gated linear-recurrent one, in place, and return it.

    The pretrained modules stay where they are under their own names. The default preset needs no training to work:
    its recurrent features are fitted to second moments of the model's own queries and keys, measured on text that the
    model draws from itself (a few forward passes) or on `calibration`, token ids [rows, length].

    Args:
        model: a transformers model of a supported family.
        config: a complete LigerConfig; excludes preset, keep and changes.
        preset: a name in PRESETS; "paper-gla", "paper-gsa" and "paper-hgrn2" are the published conversions.
        keep: indices of layers that stay full attention (negative ones count from the end). Layers that slide by
            themselves keep just their window, if others do not slide or if it is not wider than `window`.
        calibration: token ids to measure instead of the model's own draw.
        changes: fields of LigerConfig: gate, pattern, window, sinks, mix, tau, feature_map, memories, top_k, ...

    Quantized weights that are tensors of a type of their own (bitsandbytes, torchao) stay as they are; there are no
    memories then. Whatever stops the conversion, an interrupt too, leaves the model as it was.

    Raises:
        ValueError: no model, or one that is wrapped, carries adapters, or is of no class in the list itself; a damaged
            weight; an option that does not exist.
    """
    config = resolved(model, config, preset, keep, changes)
    check_weights(model, config)
    with whole_or_not(model):
        moments, attention = moments_of(model, config, calibration), new_attention(model, config)
        for index, found in moments.items():
            calibrate(model, attention[index], found)
        before, after = model.config, linearized_config(model, config)
        swap_attention(model, attention)
        for module in model.modules():
            if getattr(module, "config", None) is before:
                module.config = after
        model.__class__ = FAMILIES[before.model_type][1]
        forget_name(model)
    return model


def resolved(
    model: PreTrainedModel,
    config: LigerConfig | None,
    preset: str,
    keep: Iterable[int] | None,
    changes: dict[str, Any],
) -> LigerConfig:
    """What `linearize` was told, with a name for every layer of the model; ValueError if the two do not fit."""
    if config is not None and (preset != "default" or keep is not None or changes):
        raise ValueError("config: expected alone, got further options beside it")
    config = LigerConfig.from_preset(preset, **changes) if config is None else config
    if not isinstance(config, LigerConfig):
        raise ValueError(f"config: expected a LigerConfig, got {config!r}")
    check_architecture(model)
    if keep is not None:
        config = replace(config, keep=keep)
    return config.resolve(own_windows(model.config))


def linearized_config(model: PreTrainedModel, config: LigerConfig) -> PreTrainedConfig:
    """The config of what the model becomes: a copy, for other models may share the model's own."""
    config_class, model_class = FAMILIES[model.config.model_type]
    after = copy.deepcopy(model.config)
    after.__class__ = config_class
    after.model_type, after.architectures = config_class.model_type, [model_class.__name__]
    after.liger = config.to_dict()
    return after


def moments_of(
    model: PreTrainedModel, config: LigerConfig, calibration: torch.Tensor | None
) -> dict[int, tuple[torch.Tensor, ...]]:
    """What `measure` finds for the layers whose features are fitted, as config's pattern says. The model is as before.

    ValueError for a calibration that is not token ids of the model.
    """
    if calibration is not None:
        check_calibration(calibration, model.config.vocab_size)
    layers = fitted_layers(config)
    if not layers:
        return {}
    with looked_at(model):
        return measure(model, draw_text(model) if calibration is None else calibration, layers)


def fitted_layers(config: LigerConfig) -> list[int]:
    """The layers that have features to fit to moments, as a resolved config's pattern says."""
    found = []
    for index, name in enumerate(config.pattern):
        if split(name)[0] not in _WINDOWS:
            told = config.options(name)
            chosen = settle(*(told[part] for part in ("gate", "feature_map", "mixing", "mix", "normalize", "pool")))
            if hasattr(FEATURE_MAPS[chosen.feature_map], "calibrate"):
                found.append(index)
    return found
