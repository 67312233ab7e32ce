"""linearize(model): swap the attention of a pretrained causal LM for Liger Attention, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from liger_layers import FEATURE_MAPS
from liger_layers._choices import settle
from liger_models._calibration import calibrate, check_calibration, draw_text, measure
from liger_models.configuration import LigerConfig
from liger_models.families import own_windows, weight_shapes
from liger_models.modeling import FAMILIES, LigerMixin, swap_attention

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

    Raises:
        ValueError: an architecture outside the list, a damaged weight, or an option that does not exist; the model is
            untouched then.
    """
    config = resolved(model, config, preset, keep, changes)
    check_weights(model)

    training = model.training
    moments, layers = moments_of(model, config, calibration)
    before, after = model.config, linearized_config(model, config)
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = after
    model.__class__ = FAMILIES[before.model_type][1]
    swap_attention(model, config)
    calibrate(model, moments, layers)
    return model.train(training)


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
) -> tuple[list[tuple[torch.Tensor, ...]], list[int]]:
    """What `measure` finds for the layers whose features are fitted, as config's pattern says, and their indices.

    ValueError for a calibration that is not token ids of the model.
    """
    if calibration is not None:
        check_calibration(calibration, model.config.vocab_size)
    layers = fitted_layers(config)
    if not layers:
        return [], []
    training = model.training
    model.eval()
    try:
        return measure(model, draw_text(model) if calibration is None else calibration, layers), layers
    finally:
        model.train(training)


def fitted_layers(config: LigerConfig) -> list[int]:
    """The layers that have features to fit to moments, as a resolved config's pattern says."""
    found = []
    for index, name in enumerate(config.pattern):
        if name not in _WINDOWS:
            told = config.options(name)
            chosen = settle(*(told[part] for part in ("gate", "feature_map", "mixing", "mix", "normalize", "pool")))
            if hasattr(FEATURE_MAPS[chosen.feature_map], "calibrate"):
                found.append(index)
    return found


def check_architecture(model: PreTrainedModel) -> None:
    """ValueError that says which families are supported and why this model is not."""
    config = model.config
    reason = None
    if isinstance(model, LigerMixin):
        reason = "it is already linearized"
    elif getattr(model, "_hf_peft_config_loaded", False):
        reason = "it carries adapters, which are to be merged first"
    elif config.is_encoder_decoder:
        reason = "it is an encoder-decoder; only decoders are linearized"
    elif getattr(config, "kv_lora_rank", None):
        reason = "it uses multi-head latent attention (MLA), which has no per-head keys to gate"
    elif getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        reason = "it uses ALiBi position biases, which the window branch does not have"
    elif getattr(config, "use_bidirectional_attention", None):
        reason = "its attention is not causal"
    elif config.model_type not in FAMILIES:
        reason = f"its architecture {config.model_type!r} is not in the list"
    elif not isinstance(model, FAMILIES[config.model_type][1].__bases__[1]):
        reason = f"it is a {type(model).__name__}; only the causal LM of a family is linearized"
    if reason:
        raise ValueError(f"model: expected one of {', '.join(FAMILIES)}, got {type(model).__name__}: {reason}")


def check_weights(model: PreTrainedModel) -> None:
    """ValueError for a missing, misshapen or non-finite weight."""
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for name, shape in weight_shapes(attention, model.config).items():
            module = getattr(attention, name, None)
            where = f"model.layers.{index}.self_attn.{name}.weight"
            if module is None or getattr(module, "weight", None) is None:
                raise ValueError(f"{where}: expected a weight {list(shape)}, got none")
            if (module.in_features, module.out_features) != shape[::-1]:
                raise ValueError(f"{where}: expected shape {list(shape)}, got {list(module.weight.shape)}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name}: expected a loaded weight, got one on the meta device")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
