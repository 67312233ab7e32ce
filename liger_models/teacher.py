"""The pretrained model that a linearized one came from, on the same weights: its own teacher.

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from liger_layers.calls import Attention, attending_in_full
from liger_models._decoder import Decoder
from liger_models.families import family_of, own_windows
from liger_models.generation import base_of, evaluating
from liger_models.modeling import LigerMixin
from liger_ops.errors import fail

# In a config: the weights are no longer those of the model that was linearized.
_TUNED = "liger_tuned"


def mark_tuned(model: PreTrainedModel) -> None:
    """Say in a linearized model's config, which is saved with it, that adapters were merged into its weights."""
    if isinstance(model, LigerMixin):
        setattr(model.config, _TUNED, True)


def is_tuned(model: nn.Module) -> bool:
    """Whether it is known that a model's weights are no longer those that were linearized."""
    return bool(getattr(base_of(model).config, _TUNED, False))


def check_original(model: nn.Module, name: str = "model") -> None:
    """ValueError unless adapters off and attention in full make the model what it was linearized from."""
    if is_tuned(model):
        fail(name, "weights as they were linearized, or a teacher beside them", "a model whose adapters were merged")


@contextmanager
def as_original(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """A linearized model as the pretrained one for a while: no second copy of its weights is needed.

    Adapters are off, modules trained as a whole are those from before, every linearized layer attends to whatever its
    pretrained attention did, and the model is in its evaluation mode. Logits are those of the original. It keeps no
    cache: call it with use_cache=False or leave that out. A model that is not linearized only loses its adapters.

    Raises:
        ValueError: a model whose adapters were merged, which is no longer its original.
    """
    check_original(model)
    base = base_of(model)
    with ExitStack() as stack:
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        stack.enter_context(attending_in_full(_spans(base)))
        stack.enter_context(evaluating(model))
        yield


def _spans(base: PreTrainedModel) -> dict[Attention, int | None]:
    """The linearized layers, and the window that the pretrained attention of each had."""
    if not isinstance(base, LigerMixin):
        return {}
    windows = own_windows(base.config)
    return {layer: windows[index] for index, layer in linearized_layers(base).items()}


def linearized_layers(model: PreTrainedModel | PeftModel) -> dict[int, Attention]:
    """The layers of a linearized model by index that are not what they were: neither kept nor with their own window."""
    base = base_of(model)
    if not isinstance(base, LigerMixin):
        return {}
    decoder, names = Decoder(base), enumerate(base.config.liger["pattern"])
    return {i: cast(Attention, decoder.attention(i)) for i, name in names if name not in ("own", "full")}


def original(model: PreTrainedModel) -> PreTrainedModel:
    """The pretrained model again, of its own class, on the very tensors of a linearized one: it generates as before.

    ValueError for a model that is not linearized, carries adapters, or whose adapters were merged.
    """
    if not isinstance(model, LigerMixin):
        fail("model", "a linearized model without adapters", type(model).__name__)
    check_original(model)
    family, config = family_of(model.config), model.config.to_dict()
    for name in ("liger", "model_type", "architectures", "auto_map", _TUNED):
        config.pop(name, None)
    made = family.config.from_dict(config)
    made._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        plain = cast(PreTrainedModel, family.model(made))
    held = dict(model.state_dict())
    plain.load_state_dict({name: held[name] for name in plain.state_dict()}, assign=True)
    buffers = dict(model.named_buffers())
    for name, _ in list(plain.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        plain.get_submodule(parent).register_buffer(leaf, buffers[name], persistent=False)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.requires_grad_(False).eval()
