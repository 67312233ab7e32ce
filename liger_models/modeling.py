"""Hugging Face classes of linearized models: a config and a causal LM per family, made from transformers' own.

Shapes: B batch, T time, D head width.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from liger_layers import LigerAttention, SlidingWindowAttention, load_balancing_loss, router_parameters
from liger_layers.patterns import split
from liger_models._decoding import ConstantCacheMixin
from liger_models._inputs import CACHE, argument_names, by_name, take_cache, token_positions
from liger_models._remote import PortableConfig
from liger_models.cache import admit, fit_cache, layer_and_state, make_cache
from liger_models.configuration import LigerConfig
from liger_models.families import KNOWN, PREFIX, Family, finish, key_and_value, own_windows, project, traits


class _Pretrained:
    """A layer of liger_layers on the modules of a pretrained attention, under their own names, with its signature."""

    def __init__(self, old: nn.Module, hf: PreTrainedConfig, **options: Any):
        # Before the modules are there, which routed memories ask for their keys and values.
        self.traits = own = traits(old, hf)
        super().__init__(
            hf.hidden_size,
            own.heads,
            own.kv_heads,
            own.width,
            projections=dict(old.named_children()),
            scale=own.scale,
            softcap=own.softcap,
            rope_theta=None,
            **options,
        )
        self.layer_idx, self.training = old.layer_idx, old.training
        pretrained = dict(old.named_children())
        for name, module in self.named_children():
            # Those of the pretrained attention are as they are to be.
            if name not in pretrained:
                module.to(old.o_proj.weight.device).train(old.training)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return project(self, x, self.traits)

    def finish(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return finish(self, "k", k, self.traits), finish(self, "v", v, self.traits)

    def key_and_value(self) -> tuple[nn.Linear, nn.Linear]:
        return key_and_value(self, self.traits)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        liger_router_logits: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None and "liger_mask" not in kwargs:
            raise ValueError("attention_mask: expected liger_mask beside it, as the decoder hands it on, got it alone")
        layer, state = layer_and_state(take_cache(kwargs), self.layer_idx, hidden_states.device)
        tables = position_embeddings if self.traits.rotary else None
        out, state = super().forward(hidden_states, kwargs.get("liger_mask"), state, tables, liger_router_logits)
        if layer is not None:
            layer.store(state, hidden_states.shape[1])
        return out, None


class LinearizedAttention(_Pretrained, LigerAttention):
    """Window and recurrence."""


class LinearizedWindow(_Pretrained, SlidingWindowAttention):
    """The window alone."""


def linearized(name: str, old: nn.Module, hf: PreTrainedConfig, liger: LigerConfig) -> nn.Module:
    """What takes the place of a pretrained attention in a layer that the pattern calls so."""
    window = own_windows(hf)[old.layer_idx]
    kind = split(name)[0]
    if kind == "own":
        return LinearizedWindow(old, hf, window=window, sinks=0)
    if kind == "window":
        return LinearizedWindow(old, hf, window=min(liger.window, window or liger.window), sinks=liger.sinks)
    return LinearizedAttention(old, hf, **liger.options(name))


def _before_decoder(names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hand the padding mask to the Liger layers, spare them the square one, check mask, positions and cache."""
    kwargs = by_name(names, args, kwargs)
    cache, ids = take_cache(kwargs), kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    if tokens is None:
        # The decoder says what it wants.
        return (), kwargs
    use_cache = kwargs.get("use_cache")
    if cache is not None:
        fit_cache(cache, module.config, tokens.shape[0])
    elif module.training:
        # Nobody reads a cache while training, and with gradient checkpointing none may be written.
        kwargs["use_cache"] = False
    elif module.config.use_cache if use_cache is None else use_cache:
        cache = make_cache(module.config)
    mask, shown = admit(cache, tokens, ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), kwargs)
    if mask is not None and kwargs.get("position_ids") is None:
        # Padding takes no position, wherever it stands.
        kwargs["position_ids"] = token_positions(mask, tokens.shape[1])
    kwargs |= {CACHE: cache, "liger_mask": shown}
    if len(module.config.liger["keep"]) == 0:
        # A mask that is already four-dimensional is passed through, so no T x T mask is built for nobody.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    return (), kwargs


class LigerMixin(ConstantCacheMixin):
    """Behaviour every linearized causal LM adds to its family's class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not isinstance(config.liger, Mapping):
            raise ValueError(f"config: expected that of a linearized model, with a section liger, got {config.liger!r}")
        liger = LigerConfig.from_saved(config.liger).resolve(own_windows(config))
        config.liger = liger.to_dict()
        swap_attention(self, new_attention(self, liger))

    def __init_subclass__(cls, **kwargs):
        """What inspects a model's forward is to see that of its family."""
        super().__init_subclass__(**kwargs)
        if LigerMixin in cls.__bases__:
            cls.forward = _with_routers(cls.forward)


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


def new_attention(model: PreTrainedModel, liger: LigerConfig) -> dict[int, nn.Module]:
    """By index of its layer, what takes the place of each attention that is not to stay. The model is as before."""
    layers = enumerate(zip(model.model.layers, liger.pattern, strict=True))
    return {i: linearized(name, layer.self_attn, model.config, liger) for i, (layer, name) in layers if name != "full"}


def swap_attention(model: PreTrainedModel, attention: Mapping[int, nn.Module]) -> None:
    """Put each attention in its layer, in place."""
    for index, module in attention.items():
        model.model.layers[index].self_attn = module
    hook = functools.partial(_before_decoder, argument_names(model.model))
    model.model.register_forward_pre_hook(hook, with_kwargs=True)


def _twins(family: Family) -> tuple[type, type]:
    """The linearized twins of a family's config and causal LM, registered with the Auto classes."""
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
    return config, model


FAMILIES: dict[str, tuple[type, type]] = {name: _twins(family) for name, family in KNOWN.items()}
# Saved configs and pickles look classes up by name.
globals().update({cls.__name__: cls for pair in FAMILIES.values() for cls in pair})
