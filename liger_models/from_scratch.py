"""A small decoder of liger_layers' mixers that trains from random weights: config, model and causal LM.

Shapes: B batch, T time, S tokens seen before and now, M memories.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock, MixtralTopKRouter
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from liger_layers import load_balancing_loss, router_parameters
from liger_layers.patterns import MEMORIES, check_layer, split
from liger_models._decoding import ConstantCacheMixin
from liger_models._inputs import CACHE, refuse_unread
from liger_models._mixers import MIXERS, known_options, listed, make_mixer, whole_name
from liger_models._remote import PortableConfig
from liger_models._rollback import Given
from liger_models.cache import (
    admit,
    check_source,
    end_call,
    fit_cache,
    layer_and_state,
    make_cache,
    one_at_a_time,
    read_call,
    take_cache,
)
from liger_models.modeling import refuse_cut_off
from liger_ops.documents import Documents
from liger_ops.errors import check_known, check_positive, fail

_MLPS = {"dense": LlamaMLP, "moe": MixtralSparseMoeBlock}
# Linears of a mixer, or parts of them, that its class starts.
_GATES = ("gate_proj.bias", "router_gate.")
# The integers of the config, and the least that each may be.
_COUNTS = dict(vocab_size=1, hidden_size=1, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
_COUNTS |= dict(intermediate_size=1, num_experts=1, experts_per_token=1, memories_per_token=1, memories=0, conv_size=0)


class LigerModelConfig(PortableConfig, PreTrainedConfig):
    """Sizes and mixers of a LigerForCausalLM.

    mixers: a name, or a list of names that repeats over the layers, as in patterns: "mixer" (LinearMixer), "mom"
    (MixtureOfMemories), "liger" (LigerAttention), "recurrence" (GatedRecurrence) or "window" (SlidingWindowAttention),
    where "mixer:gla" and "liger:gla" say which recurrence.
    mixer_options: further arguments of a mixer's class, by name: {"mom": {"rule": "gla"}, "window": {"sinks": 0}}.
    memories, memories_per_token: of "mom", there called memories and top_k, which is a name of generation here.
    conv_size: taps of the short convolution of linear memories; 0 for none.
    mlp: "dense" (Llama's) or "moe" (Mixtral's, experts_per_token of num_experts).
    intermediate_size: width of the MLP, or of one expert; 4 * hidden_size if None.
    num_key_value_heads, head_dim: num_attention_heads and hidden_size / num_attention_heads if None.
    router_aux_loss_coef: weight of load_balancing_loss, which joins the loss where output_router_logits is true.

    Raises:
        ValueError: names the argument, what was expected and what was given; here or when a model is built.
    """

    model_type = "liger"
    auto_classes = {  # noqa: RUF012
        "AutoConfig": "LigerModelConfig",
        "AutoModel": "LigerModel",
        "AutoModelForCausalLM": "LigerForCausalLM",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    mixers: str | list[str] = "mom"
    mixer_options: dict[str, dict[str, Any]] | None = None
    memories: int = MEMORIES
    memories_per_token: int = 2
    conv_size: int = 4
    mlp: str = "dense"
    intermediate_size: int | None = None
    num_experts: int = 8
    experts_per_token: int = 2
    router_jitter_noise: float = 0.0
    hidden_act: str = "silu"
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Of a saved model too whose mixers were named by their rules alone."""
        config_dict = dict(config_dict)
        if mixers := config_dict.get("mixers"):
            config_dict["mixers"] = [whole_name(name) for name in listed(mixers)]
        if options := config_dict.get("mixer_options"):
            config_dict["mixer_options"] = {whole_name(name): further for name, further in options.items()}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None and isinstance(self.hidden_size, int):
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)
        self.check()

    @property
    def layer_mixers(self) -> list[str]:
        """The mixer of every layer."""
        pattern = listed(self.mixers)
        return pattern * (self.num_hidden_layers // len(pattern))

    def check(self) -> None:
        """ValueError for a size or a name that cannot be."""
        for name, least in _COUNTS.items():
            check_positive(name, getattr(self, name), least)
        for name in ("rms_norm_eps", "initializer_range", "router_jitter_noise", "router_aux_loss_coef"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                fail(name, "a number >= 0", repr(value))
        if self.head_dim is not None:
            check_positive("head_dim", self.head_dim)
        elif self.hidden_size % self.num_attention_heads:
            wanted = f"a multiple of num_attention_heads {self.num_attention_heads} without head_dim"
            fail("hidden_size", wanted, self.hidden_size)
        shared = self.num_key_value_heads or self.num_attention_heads
        if self.num_attention_heads % shared:
            wanted = f"a multiple of num_key_value_heads {shared}"
            fail("num_attention_heads", wanted, self.num_attention_heads)
        if self.experts_per_token > self.num_experts:
            fail("experts_per_token", f"at most num_experts {self.num_experts}", self.experts_per_token)
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            fail("pad_token_id", f"an id below vocab_size {self.vocab_size}", self.pad_token_id)
        self._check_names()

    def _check_names(self) -> None:
        for name, known in (("mlp", _MLPS), ("hidden_act", ACT2FN)):
            check_known(name, getattr(self, name), known)
        pattern = [self.mixers] if isinstance(self.mixers, str) else self.mixers
        if not isinstance(pattern, list | tuple) or not pattern or self.num_hidden_layers % len(pattern):
            wanted = f"a name, or names that repeat to num_hidden_layers {self.num_hidden_layers}"
            fail("mixers", wanted, repr(self.mixers))
        for name in pattern:
            check_layer("mixers", name, MIXERS)
        if any(split(name)[0] == "mom" for name in pattern) and self.memories_per_token > max(self.memories, 1):
            wanted = f"at most memories {self.memories}" if self.memories else "1 without memories"
            fail("memories_per_token", wanted, self.memories_per_token)
        options = {} if self.mixer_options is None else self.mixer_options
        if not isinstance(options, dict) or not all(isinstance(x, dict) for x in options.values()):
            fail("mixer_options", "a dict of dicts, arguments by name of a mixer", repr(options))
        for mixer, further in options.items():
            check_layer("mixer_options", mixer, MIXERS)
            for name in further:
                check_known(f"mixer_options[{mixer!r}]", name, known_options(mixer))


class LigerDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)). forward(x [B,T,hidden]) returns [B,T,hidden]."""

    def __init__(self, config: LigerModelConfig, index: int):
        super().__init__()
        self.index = index
        self.mixer_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = make_mixer(config, index)
        self.mlp_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLPS[config.mlp](config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        router_logits: list[torch.Tensor] | None = None,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        layer, state = layer_and_state(cache, self.index, x.device)
        h = self.mixer_norm(x)
        if documents is not None:
            told = dict(cu_seqlens=documents.bounds, router_logits=router_logits)
            y = self.mixer(h.reshape(1, -1, h.shape[2]), documents.mask, **told)[0].view_as(x)
        elif layer is None:
            y = self.mixer(h, mask, state, router_logits=router_logits)[0]
        else:
            mix = lambda g, s, told: self.mixer(g.x, g.mask, s, router_logits=told)  # noqa: E731
            y = layer.run(mix, Given(h, None, mask), state, router_logits)
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class LigerPreTrainedModel(PreTrainedModel):
    """Loading, saving and starting weights of the decoder."""

    config_class = LigerModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LigerDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LigerDecoderLayer,
        "expert_logits": OutputRecorder(MixtralTopKRouter),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights and zero biases, as in Llama and Mixtral."""
        super()._init_weights(module)
        if isinstance(module, MixtralTopKRouter | MixtralExperts):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, std=self.config.initializer_range)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """What a mixer holds beside weights of Linears starts where its class starts it; loaded values stay."""
        super().initialize_weights()
        # Not in _init_weights, which never sees modules that hold no parameters of their own.
        for layer in self.modules():
            if isinstance(layer, LigerDecoderLayer):
                with init.no_init_weights():
                    fresh = make_mixer(self.config, layer.index)
                for name, parameter in layer.mixer.named_parameters():
                    owner = fresh.get_submodule(name.rpartition(".")[0])
                    if name.startswith(_GATES) or not isinstance(owner, nn.Linear | nn.RMSNorm):
                        init.copy_(parameter, fresh.get_parameter(name))


class LigerModel(LigerPreTrainedModel):
    """Embedding, decoder layers and a last norm."""

    def __init__(self, config: LigerModelConfig):
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LigerDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        router_logits: list[torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Arguments as LigerForCausalLM; router_logits is a list that takes in those of every layer that routes.

        Returns last_hidden_state [B,T,hidden], and expert_logits if asked.
        """
        if (input_ids is None) == (inputs_embeds is None):
            fail("input_ids, inputs_embeds", "one of the two", "none" if input_ids is None else "both")
        hidden = self.config.hidden_size
        if inputs_embeds is not None and (inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != hidden):
            fail("inputs_embeds", f"[batch, tokens, {hidden}]", tuple(inputs_embeds.shape))
        if input_ids is not None and input_ids.ndim != 2:
            fail("input_ids", "[batch, tokens]", tuple(input_ids.shape))
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        kwargs |= {"past_key_values": past_key_values, "cache": cache}
        cache = take_cache(kwargs)
        refuse_unread(kwargs)
        if cache is not None:
            fit_cache(cache, self.config, x.shape[0])
        call = read_call(cache, x, attention_mask, position_ids, kwargs)
        if cache is None and use_cache and not self.training and call.documents is None:
            # Nobody reads a cache while training.
            cache = make_cache(self.config)
        check_source(cache, self, x.shape[1])
        admit(cache, call, input_ids, (x.shape[0], x.shape[1]))
        for layer in self.layers:
            x = layer(x, call.shown, cache=cache, router_logits=router_logits, documents=call.documents)
        end_call(cache)
        held: dict[str, Any] = {CACHE: cache}
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x), **held)


class LigerForCausalLM(ConstantCacheMixin, LigerPreTrainedModel, GenerationMixin):
    """A causal LM from random weights, whose cache does not grow (arXiv 2502.13685 with mixers="mom").

    forward(input_ids [B,T]) returns logits [B,T,vocab]; attention_mask [B,T], longer by what the cache holds, marks
    real tokens (padding may stand anywhere), past_key_values, or cache, is a cache of `make_cache` or None.
    output_router_logits adds router_logits, [B*T,M] for every layer that routes to M memories, and their
    load_balancing_loss (the experts' too, with mlp="moe") as aux_loss; with labels [B,T] the loss is next-token cross
    entropy + router_aux_loss_coef * aux_loss.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LigerModelConfig):
        super().__init__(config)
        self.model = LigerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @one_at_a_time
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        routing = self.config.output_router_logits if output_router_logits is None else output_router_logits
        # Hooks that move inputs between devices would copy a list, and leave ours empty.
        router_logits = deque() if routing else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            router_logits=router_logits,
            output_expert_logits=routing,
            **kwargs,
        )
        x = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        # Gradient checkpointing fills the list again when it recomputes.
        router_logits = tuple(router_logits) if router_logits else None
        aux_loss = self._balance(router_logits, outputs, attention_mask, x) if routing else None
        if loss is not None and aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            router_logits=router_logits,
        )

    def _balance(
        self,
        router_logits: tuple[torch.Tensor, ...] | None,
        outputs: MoeModelOutputWithPast,
        attention_mask: torch.Tensor | None,
        x: torch.Tensor,
    ) -> torch.Tensor | None:
        """load_balancing_loss of the memories plus that of the experts; None where nothing routes."""
        mask = None if attention_mask is None else attention_mask[:, attention_mask.shape[1] - x.shape[1] :].reshape(-1)
        memories = (router_logits, self.config.memories_per_token)
        experts = (outputs["expert_logits"], self.config.experts_per_token)
        gates = (p for part in self.modules() if isinstance(part, MixtralTopKRouter) for p in part.parameters())
        routers = (*router_parameters(self), *gates)
        refuse_cut_off(routers, x, (y for logits, _ in (memories, experts) for y in logits or ()))
        losses = [load_balancing_loss(logits, top_k, mask) for logits, top_k in (memories, experts) if logits]
        return sum(losses[1:], losses[0]) if losses else None


AutoConfig.register(LigerModelConfig.model_type, LigerModelConfig)
AutoModel.register(LigerModelConfig, LigerModel)
AutoModelForCausalLM.register(LigerModelConfig, LigerForCausalLM)
