"""linearize(model): swap the attention of a pretrained causal LM for Liger Attention, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_models._checks import check_architecture, check_weights
from liger_models._conversion import converted, plan_layers, swap_attention
from liger_models._snapshot import whole_or_not
from liger_models.configuration import LigerConfig
from liger_models.families import longest_text, own_windows
from liger_models.modeling import FAMILIES, AnyModel, forget_name
from liger_ops.errors import fail


def linearize(
    model: AnyModel,
    config: LigerConfig | None = None,
    *,
    preset: str = "default",
    keep: Iterable[int] | None = None,
    calibration: torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **changes: Any,
) -> AnyModel:
    """Turn a causal LM of a family in FAMILIES into a gated linear-recurrent one, in place, and return it.

    The pretrained modules stay where they are under their own names. The default preset needs no training to work:
    its recurrent features are fitted to second moments of the model's own queries and keys, measured on text that the
    model draws from itself (a few forward passes) or on `calibration`, token ids [rows, length]. So is the score by
    which 128 tokens beyond the window stay exact, to what its queries ask of tokens that far.

    Args:
        model: a transformers model of a supported family, or of one that `register_family` made known.
        config: a complete LigerConfig; excludes preset, keep and changes.
        preset: a name in PRESETS; "paper-gla", "paper-gsa" and "paper-hgrn2" are the published conversions.
        keep: indices of layers that stay full attention (negative ones count from the end). Layers that slide by
            themselves keep just their window, if others do not slide or if it is not wider than `window`.
        calibration: token ids to measure instead of the model's own draw.
        tokenizer: with recall or fit_mix, hides facts in the calibration and asks for them; loaded by the model's name
            if None, and where there is none, or less than 256 tokens, parts of the text are said again instead. Where
            no row reaches beyond the window, the latest tokens are recalled.
        changes: fields of LigerConfig: gate, pattern, window, sinks, recall, mix, fit_mix, tau, feature_map, memories,
            ...

    Quantized weights that are tensors of a type of their own (bitsandbytes, torchao) stay as they are; there are no
    memories then. Whatever stops the conversion, an interrupt too, leaves the model as it was.

    Raises:
        ValueError: no model, or one that is wrapped, carries adapters, or is of no class in the list itself; a damaged
            weight; an option that does not exist.
    """
    config = resolved(model, config, preset, keep, changes)
    check_weights(model, config)
    plans = plan_layers(model.config, config)
    with whole_or_not(model):
        attention = dict(converted(model, plans, calibration, tokenizer))
        before, after = model.config, linearized_config(model, config)
        swap_attention(model, attention)
        for module in model.modules():
            if getattr(module, "config", None) is before:
                cast(Any, module).config = after
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
        fail("config", "alone", "further options beside it")
    config = LigerConfig.from_preset(preset, keep=keep, **changes) if config is None else config
    if not isinstance(config, LigerConfig):
        fail("config", "a LigerConfig", repr(config))
    check_architecture(model)
    longest = longest_text(model.config)
    if config.recall and longest and config.recall > longest - config.window - config.sinks:
        limit = f"at most the {longest} tokens of the model's longest text, less window and sinks"
        fail("recall", limit, config.recall)
    return config.resolve(own_windows(model.config), longest)


def linearized_config(model: PreTrainedModel, config: LigerConfig) -> PreTrainedConfig:
    """The config of what the model becomes: a copy, for other models may share the model's own."""
    config_class, model_class = FAMILIES[model.config.model_type]
    after = copy.deepcopy(model.config)
    after.__class__ = config_class
    told = dict(model_type=config_class.model_type, architectures=[model_class.__name__], liger=config.to_dict())
    for name, value in told.items():
        setattr(after, name, value)
    return after
