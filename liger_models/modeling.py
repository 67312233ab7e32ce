"""Hugging Face classes of linearized models: a config and a causal LM per family, made from transformers' own.

Shapes: B batch, T time, M memories.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from liger_layers import load_balancing_loss, router_parameters
from liger_models._conversion import build, plan_layers, swap_attention
from liger_models._decoder import Decoder
from liger_models._decoding import ConstantCacheMixin
from liger_models._inputs import CACHE
from liger_models._linearized import LinearizedAttention as LinearizedAttention
from liger_models._linearized import LinearizedWindow as LinearizedWindow
from liger_models._remote import PortableConfig
from liger_models.cache import one_at_a_time, take_cache
from liger_models.configuration import LigerConfig
from liger_models.families import KNOWN, PREFIX, Family, longest_text, own_windows
from liger_ops.errors import fail

# A linearized model is still one of its family's class.
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


class LigerMixin(ConstantCacheMixin):
    """Behaviour every linearized causal LM adds to its family's class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not isinstance(config.liger, Mapping):
            fail("config", "that of a linearized model, with a section liger", repr(config.liger))
        liger = LigerConfig.from_saved(config.liger).resolve(own_windows(config), longest_text(config))
        config.liger = liger.to_dict()
        decoder, plans = Decoder(self), plan_layers(config, liger)
        swap_attention(self, {plan.index: build(plan, decoder.attention(plan.index), config) for plan in plans})

    def __init_subclass__(cls, **kwargs):
        """What inspects a model's forward is to see that of its family."""
        super().__init_subclass__(**kwargs)
        if LigerMixin in cls.__bases__:
            cls.forward = one_at_a_time(_with_routers(cls.forward))


def refuse_cut_off(
    routers: Iterable[nn.Parameter], outputs: torch.Tensor, router_logits: Iterable[torch.Tensor]
) -> None:
    """RuntimeError if what the routers said carries no gradient, though the outputs do and routers are to learn."""
    if not outputs.requires_grad or any(x.requires_grad for x in router_logits):
        return
    if any(p.requires_grad for p in routers):
        raise RuntimeError("aux_loss: expected non-reentrant gradient checkpointing, which reentrant one cuts off")


def _with_routers(forward):
    """A family's forward that, with output_router_logits, tells of routed memories as a mixture of experts does.

    The output has router_logits, a tuple of [B*T,M] per Liger layer, and aux_loss, which joins the loss with the weight
    router_aux_loss_coef. Those of a family's own experts come first, under the weight in its own config.
    """
    experts = "output_router_logits" in inspect.signature(forward).parameters

    @functools.wraps(forward)
    def call(self, *args, output_router_logits: bool | None = None, **kwargs):
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        if experts:
            kwargs["output_router_logits"] = output_router_logits
        if (cache := take_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        liger = self.config.liger
        if not output_router_logits or not liger["memories"]:
            return forward(self, *args, **kwargs)
        # Hooks that move inputs between devices would copy a list, and leave ours empty.
        given, logits = inspect.signature(forward).bind(self, *args, **kwargs).arguments, deque()
        out = forward(self, *args, **{**kwargs, "return_dict": True}, liger_router_logits=logits)
        refuse_cut_off(router_parameters(self), out.logits, logits)
        mask = given.get("attention_mask")
        tokens = len(logits[0]) // max(out.logits.shape[0], 1)
        aux = load_balancing_loss(logits, liger["top_k"], None if mask is None else mask[:, -tokens:])
        loss = out.loss if out.loss is None else out.loss + liger["router_aux_loss_coef"] * aux.to(out.loss.device)
        if experts:
            aux, logits = out.aux_loss + aux.to(out.aux_loss.device), [*out.router_logits, *logits]
        fields = {**out, "loss": loss, "aux_loss": aux, "router_logits": tuple(logits)}
        out = MoeCausalLMOutputWithPast(**fields)
        asked = kwargs.get("return_dict")
        return out if (self.config.return_dict if asked is None else asked) else out.to_tuple()

    return call


def forget_name(model: PreTrainedModel) -> None:
    """The folder or hub name that it was loaded from holds other weights: adapters would name it as their model."""
    model.config.name_or_path = model.name_or_path = ""


def _twins(family: Family) -> tuple[type, type]:
    """The linearized twins of a family's config and causal LM, here by name and registered with the Auto classes."""
    config_class, model_class = family.config, family.model
    names = [f"Liger{cls.__name__}" for cls in (config_class, model_class)]
    config = type(
        names[0],
        (PortableConfig, config_class),
        {
            "model_type": PREFIX + config_class.model_type,
            "__module__": __name__,
            "auto_classes": dict(zip(("AutoConfig", "AutoModelForCausalLM"), names, strict=True)),
            "liger": None,
        },
    )
    model = type(
        names[1],
        (LigerMixin, model_class),
        {
            "config_class": config,
            "__module__": __name__,
            "_no_split_modules": model_class._no_split_modules,
            # Before 5.21 transformers gave Gemma 2 to sdpa, which drops the bound of its scores.
            "_supports_sdpa": model_class._supports_sdpa and family.softcap is None,
        },
    )
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
    # Experts lie in files one by one and in memory together, which transformers looks up by the type's name.
    if (mapping := get_checkpoint_conversion_mapping(config_class.model_type)) is not None:
        register_checkpoint_conversion_mapping(config.model_type, mapping, overwrite=True)
    # Saved configs and pickles look classes up by name.
    globals().update(zip(names, (config, model), strict=True))
    return config, model


FAMILIES: dict[str, tuple[type, type]] = {name: _twins(family) for name, family in KNOWN.items()}


def add_family(family: Family) -> None:
    """Make the twins of a family that is not known yet; ValueError if its type, or a twin's name, is taken."""
    kind, names = family.config.model_type, [f"Liger{cls.__name__}" for cls in (family.config, family.model)]
    if kind in KNOWN or kind.startswith(PREFIX):
        fail("family", "a model type that is not taken", repr(kind))
    if taken := [name for name in names if name in globals()]:
        fail("family", "classes of names that are not taken", taken[0].removeprefix("Liger"))
    FAMILIES[kind] = _twins(family)
    KNOWN[kind] = family
