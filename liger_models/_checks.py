"""What is linearized, and one line for what is not: whole models of the families, with weights that can be used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from liger_layers.patterns import split
from liger_models._decoder import Decoder
from liger_models.configuration import LigerConfig
from liger_models.families import KNOWN, weight_shapes
from liger_models.modeling import FAMILIES, LigerMixin
from liger_ops.errors import fail

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUANTIZE = "linearize first, quantize afterwards"


def check_architecture(model: PreTrainedModel) -> None:
    """ValueError that says which families are supported and why this model is not."""
    if reason := _no_model(model) or _no_family(model):
        fail("model", f"one of {', '.join(FAMILIES)}", f"{type(model).__name__}: {reason}")


def _no_model(model: Any) -> str | None:
    """Why this is not a pretrained model by itself."""
    if isinstance(model, str | Path):
        return f"open {str(model)!r} with checkpoint.load first, or convert a folder with linearize_on_disk"
    if not isinstance(model, nn.Module):
        return "it is no model"
    adapters = _imported("peft.tuners.tuners_utils", "BaseTunerLayer")
    if any(isinstance(x, adapters) for x in model.modules()) or getattr(model, "_hf_peft_config_loaded", False):
        return "it carries adapters, which are to be merged first"
    if not isinstance(model, PreTrainedModel):
        inside = next((type(x).__name__ for x in model.modules() if isinstance(x, PreTrainedModel)), None)
        return f"linearize the {inside} in it, and wrap that" if inside else "it is no pretrained model"
    return None


def _imported(module: str, name: str) -> type | tuple[()]:
    """A class of a module that is slow to import. Where nobody has imported it, nobody has an object of it."""
    return getattr(sys.modules.get(module), name, ())


def _no_family(model: PreTrainedModel) -> str | None:
    """Why this pretrained model is none that is linearized."""
    config, name = model.config, type(model).__name__
    if isinstance(model, LigerMixin):
        return "it is already linearized"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; only decoders are linearized"
    if getattr(config, "kv_lora_rank", None):
        return "it uses multi-head latent attention (MLA), which has no per-head keys to gate"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "it uses ALiBi position biases, which the window branch does not have"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is not causal"
    if config.model_type not in KNOWN:
        return f"its architecture {config.model_type!r} is not in the list"
    own = KNOWN[config.model_type].model
    if not isinstance(model, own):
        return f"it is a {name}; only the causal LM of a family is linearized"
    if type(model) is not own:
        return f"its class, which is derived from {own.__name__}, would be lost; linearize a {own.__name__} itself"
    decoder = Decoder(model)
    for attention in map(decoder.attention, range(len(decoder.layers))):
        if type(attention).__module__ != own.__module__:
            return f"its attention is a {type(attention).__name__}, whose code would be lost"
    return None


def check_weights(model: PreTrainedModel, config: LigerConfig) -> None:
    """ValueError for a weight that is missing, misshapen, not finite, elsewhere, or packed so that it cannot be used.

    Quantized weights of a tensor type of their own stay as they are; memories, which start as copies, want others.
    """
    decoder = Decoder(model)
    for index, kind in enumerate(map(str, config.pattern)):
        attention = decoder.attention(index)
        for name, shape in weight_shapes(attention, model.config).items():
            copied = split(kind)[0] == "memories" and name in ("k_proj", "v_proj", "qkv_proj")
            where = f"{decoder.where(index)}.{name}.weight"
            _check_projection(where, getattr(attention, name, None), shape, copied)
    spread = _imported("torch.distributed.tensor", "DTensor")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            fail(name, "a loaded weight", "one on the meta device")
        if isinstance(parameter, spread):
            fail(name, "a whole weight", "one that is spread over processes")
        if _plain(parameter) and not torch.isfinite(parameter).all():
            fail(name, "finite values", "NaN or infinity")


def _plain(weight: torch.Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in FLOATS


def _check_projection(where: str, module: nn.Module | None, shape: tuple[int, int], copied: bool) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        fail(where, f"a weight {list(shape)}", "none" if weight is None else f"one packed away; {_QUANTIZE}")
    # Quantized weights have shapes of their own.
    sizes = [getattr(module, name, None) for name in ("out_features", "in_features")]
    if sizes != list(shape) or (_plain(weight) and list(weight.shape) != sizes):
        fail(where, f"shape {list(shape)}", list(weight.shape))
    if not _plain(weight) and (copied or type(weight) is nn.Parameter):
        given = weight.dtype if type(weight) is nn.Parameter else f"a {type(weight).__name__}"
        fail(where, f"{', '.join(str(x) for x in FLOATS)}{' with memories' if copied else ''}", f"{given}; {_QUANTIZE}")
