"""A causal LM by its parts: the decoder, its layers and their attention, wherever its family has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from liger_models.families import family_of
from liger_ops.errors import fail


class Rotation(NamedTuple):
    """The rotary frequencies of a layer, and the factor that rotated queries and keys are multiplied by."""

    frequencies: torch.Tensor
    factor: float


class Decoder:
    """The one way to what is inside a model of a family. ValueError where it is not as the family says.

    module takes ids and returns hidden states; layers are its own, which may be replaced one by one.
    """

    def __init__(self, model: PreTrainedModel):
        self.config, self.family = model.config, family_of(model.config)
        self.path = f"{self.family.decoder}.{self.family.layers}"
        self.module = _part(model, "a decoder", self.family.decoder)
        layers = _part(model, "layers", self.path)
        if not isinstance(layers, nn.ModuleList):
            fail("model", f"layers at {self.path!r}, as its family says", f"a {type(layers).__name__} there")
        self.layers = layers

    def attention(self, index: int) -> nn.Module:
        return _part(self.layers[index], f"an attention in layer {index}", self.family.attention)

    def put(self, index: int, attention: nn.Module) -> None:
        """Another attention in the place of a layer's own."""
        parent, _, name = self.family.attention.rpartition(".")
        setattr(self.layers[index].get_submodule(parent), name, attention)

    def where(self, index: int) -> str:
        """The name of a layer's attention among the modules of the model."""
        return f"{self.path}.{index}.{self.family.attention}"

    def rotation(self, index: int) -> Rotation:
        if self.family.rotary is None:
            return Rotation(torch.zeros(0), 1.0)
        rotary = _part(self.module, "a rotary embedding", self.family.rotary)
        # Some families turn their sliding layers at other frequencies.
        prefix = "" if hasattr(rotary, "inv_freq") else f"{self.config.layer_types[index]}_"
        return Rotation(getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling", 1.0))


def _part(module: nn.Module, what: str, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        fail("model", f"{what} at {path!r}, as its family says", f"none in {type(module).__name__}")
