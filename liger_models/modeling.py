"""Hugging Face classes of linearized models: a config and a causal LM per family, made from transformers' own.

Shapes: B batch, T time, D head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from liger_layers import LigerAttention, load_balancing_loss
from liger_models.cache import ConstantCacheMixin, fit_cache, layer_and_state, make_cache
from liger_models.configuration import LigerConfig

PREFIX = "liger_"


class LinearizedAttention(LigerAttention):
    """LigerAttention on the modules of a pretrained attention, under their own names, with its call signature."""

    def __init__(self, old: nn.Module, hf: PreTrainedConfig, liger: LigerConfig):
        options = liger.to_dict()
        for name in ("keep", "router_aux_loss_coef"):
            options.pop(name)
        super().__init__(
            hf.hidden_size,
            hf.num_attention_heads,
            hf.num_key_value_heads,
            old.head_dim,
            projections=dict(old.named_children()),
            scale=old.scaling,
            **options,
        )
        self.layer_idx = old.layer_idx
        weight = old.q_proj.weight
        self.to(weight.device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        liger_mask: torch.Tensor | None = None,
        liger_router_logits: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        layer, state = layer_and_state(past_key_values, self.layer_idx, hidden_states.device)
        out, state = super().forward(hidden_states, liger_mask, state, position_embeddings, liger_router_logits)
        if layer is not None:
            layer.store(state, hidden_states.shape[1])
        return out, None


def refuse_packing(position: torch.Tensor | None, mask: torch.Tensor | None, others: Mapping[str, Any]) -> None:
    """ValueError if several documents share a row, which the recurrence would carry one of into the next.

    Positions that start again tell so, or the other arguments by which transformers bounds documents.
    """
    if torch.compiler.is_compiling():
        return
    bounds, index = others.get("cu_seq_lens_q"), others.get("seq_idx")
    several = {
        "cu_seq_lens_q": bounds is not None and len(bounds) > 2,
        "seq_idx": index is not None and bool((index != index[:, :1]).any()),
    }
    for name, found in several.items():
        if found:
            raise ValueError(f"{name}: expected one document per row, got bounds of several (packed documents)")
    if position is None or position.ndim != 2 or position.shape[1] < 2:
        return
    again = position[:, 1:] <= position[:, :-1]
    if mask is not None and mask.shape == position.shape:
        again = again & mask[:, 1:] & mask[:, :-1]
    if again.any():
        raise ValueError(
            "position_ids: expected one document per row, got positions that start again (packed documents)"
        )


def _before_decoder(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hand the padding mask to the Liger layers, spare them the square one, and see that the cache fits."""
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        kwargs["liger_mask"] = mask[:, -tokens.shape[1] :].bool()
    elif mask is not None:
        raise ValueError("attention_mask: expected [batch, tokens] marking padding, got a prepared attention pattern")
    refuse_packing(kwargs.get("position_ids"), kwargs.get("liger_mask"), kwargs)
    if len(module.config.liger["keep"]) == 0:
        # A mask that is already four-dimensional is passed through, so no T x T mask is built for nobody.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    use_cache = kwargs.get("use_cache")
    use_cache = module.config.use_cache if use_cache is None else use_cache
    cache = kwargs.get("past_key_values")
    if cache is not None:
        fit_cache(cache, module.config)
    elif module.training:
        # Nobody reads a cache while training, and with gradient checkpointing none may be written.
        kwargs["use_cache"] = False
    elif use_cache:
        kwargs["past_key_values"] = make_cache(module.config)
    return (), kwargs


class LigerMixin(ConstantCacheMixin):
    """Behaviour every linearized causal LM adds to its family's class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        swap_attention(self, LigerConfig(**config.liger))

    def __init_subclass__(cls, **kwargs):
        """What inspects a model's forward is to see that of its family."""
        super().__init_subclass__(**kwargs)
        if LigerMixin in cls.__bases__:
            cls.forward = _with_routers(cls.forward)


def _with_routers(forward):
    """A family's forward that, with output_router_logits, tells of routed memories as a mixture of experts does.

    The output has router_logits, a tuple of [B*T,M] per Liger layer, and aux_loss, which joins the loss with the weight
    router_aux_loss_coef.
    """

    @functools.wraps(forward)
    def call(self, *args, output_router_logits: bool | None = None, **kwargs):
        if output_router_logits is None:
            output_router_logits = getattr(self.config, "output_router_logits", False)
        liger = self.config.liger
        if not output_router_logits or not liger["memories"] or len(liger["keep"]) == self.config.num_hidden_layers:
            return forward(self, *args, **kwargs)
        given, logits = inspect.signature(forward).bind(self, *args, **kwargs).arguments, []
        out = forward(self, *args, **{**kwargs, "return_dict": True}, liger_router_logits=logits)
        if torch.is_grad_enabled() and out.logits.requires_grad and not logits[0].requires_grad:
            raise RuntimeError("aux_loss: expected non-reentrant gradient checkpointing, which reentrant one cuts off")
        mask = given.get("attention_mask")
        tokens = len(logits[0]) // out.logits.shape[0]
        aux = load_balancing_loss(logits, liger["top_k"], None if mask is None else mask[:, -tokens:])
        loss = out.loss if out.loss is None else out.loss + liger["router_aux_loss_coef"] * aux.to(out.loss.device)
        fields = {**out, "loss": loss, "aux_loss": aux, "router_logits": tuple(logits)}
        return MoeCausalLMOutputWithPast(**fields)

    return call


def swap_attention(model: PreTrainedModel, liger: LigerConfig) -> None:
    """Replace the attention of every layer not kept, in place."""
    for index, layer in enumerate(model.model.layers):
        if index not in liger.keep:
            layer.self_attn = LinearizedAttention(layer.self_attn, model.config, liger).train(layer.training)
    model.model.register_forward_pre_hook(_before_decoder, with_kwargs=True)


def _family(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> tuple[type, type]:
    """The linearized twins of a config and a causal LM, registered with the Auto classes."""
    config = type(
        f"Liger{config_class.__name__}",
        (config_class,),
        {"model_type": PREFIX + config_class.model_type, "__module__": __name__, "liger": None},
    )
    model = type(
        f"Liger{model_class.__name__}",
        (LigerMixin, model_class),
        {"config_class": config, "__module__": __name__, "_no_split_modules": model_class._no_split_modules},
    )
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, model)
    return config, model


FAMILIES: dict[str, tuple[type, type]] = {
    config.model_type: _family(config, model)
    for config, model in (
        (LlamaConfig, LlamaForCausalLM),
        (MistralConfig, MistralForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3ForCausalLM),
    )
}
# Saved configs and pickles look classes up by name.
globals().update({cls.__name__: cls for pair in FAMILIES.values() for cls in pair})
