"""The families that linearize knows, and what the attention of each does to its queries, keys and values.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

# Of the model types of linearized models.
PREFIX = "liger_"


@dataclass(frozen=True)
class Family:
    """A config, its causal LM, where that holds its attention, and what the config alone says of its scores.

    All else is read off the attention itself: fused projections, norms over a head or over all of them, the scale,
    layers without rotary positions. A mixture of experts says so in its forward.

    softcap, clip: fields of the config that bound scores, or queries, keys and values.
    decoder: the module in the causal LM that takes ids and returns hidden states. In it, layers is the list of its
    layers and rotary the embedding that turns queries and keys (None: nothing does). attention: the module in a layer.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    softcap: str | None = None
    clip: str | None = None
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str | None = "rotary_emb"


KNOWN: dict[str, Family] = {
    family.config.model_type: family
    for family in (
        Family(LlamaConfig, LlamaForCausalLM),
        Family(MistralConfig, MistralForCausalLM),
        Family(Qwen2Config, Qwen2ForCausalLM),
        Family(Qwen3Config, Qwen3ForCausalLM),
        Family(Gemma2Config, Gemma2ForCausalLM, softcap="attn_logit_softcapping"),
        Family(Gemma3TextConfig, Gemma3ForCausalLM),
        Family(Phi3Config, Phi3ForCausalLM),
        Family(SmolLM3Config, SmolLM3ForCausalLM),
        Family(Olmo2Config, Olmo2ForCausalLM),
        Family(GraniteConfig, GraniteForCausalLM),
        Family(MixtralConfig, MixtralForCausalLM),
        Family(Qwen2MoeConfig, Qwen2MoeForCausalLM),
        Family(Qwen3MoeConfig, Qwen3MoeForCausalLM),
        Family(OlmoeConfig, OlmoeForCausalLM, clip="clip_qkv"),
    )
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model with this config, whose type may already be the linearized one."""
    return KNOWN[config.model_type.removeprefix(PREFIX)]


class Traits(NamedTuple):
    """One pretrained attention: its sizes, the factor and bound of its scores, the bound of q, k and v, and whether its
    layer turns queries and keys by their positions."""

    heads: int
    kv_heads: int
    width: int
    scale: float
    softcap: float | None
    clip: float | None
    rotary: bool

    @property
    def projections(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        return self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width


def traits(attention: nn.Module, config: PreTrainedConfig) -> Traits:
    """What a pretrained attention does in a model with this config, whose type may already be the linearized one."""
    family = family_of(config)
    softcap, clip = (None if name is None else getattr(config, name) for name in (family.softcap, family.clip))
    return Traits(
        config.num_attention_heads,
        config.num_key_value_heads,
        cast(int, attention.head_dim),
        cast(float, attention.scaling),
        softcap,
        clip,
        family.rotary is not None and bool(getattr(attention, "use_rope", True)),
    )


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window that each layer has by itself, None where it sees everything."""
    window, kinds = getattr(config, "sliding_window", None) or None, getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def longest_text(config: PreTrainedConfig) -> int | None:
    """The tokens of the longest text that a model was made for, None where it does not say."""
    return getattr(config, "max_position_embeddings", None) or None


def project(attention: nn.Module, x: torch.Tensor, t: Traits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unrotated q [B,T,HQ,D], k and v [B,T,H,D] of x [B,T,hidden], normed and clipped as the family does."""
    fused = getattr(attention, "qkv_proj", None)
    if fused is not None:
        q, k, v = fused(x).split(t.projections, -1)
    else:
        q, k, v = (getattr(attention, f"{name}_proj")(x) for name in "qkv")
    q, k, v = (y.unflatten(-1, (-1, t.width)) for y in (q, k, v))
    q, k, v = _finish(attention, t, q=q, k=k, v=v)
    return q, k, v


def _finish(attention: nn.Module, t: Traits, **projected: torch.Tensor) -> list[torch.Tensor]:
    """Norm and bound of projected queries q, keys k or values v [...,heads,D]."""
    done = []
    for name, x in projected.items():
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None:
            # Some norm every head by itself, some all heads together.
            x = norm(x) if norm.weight.shape[-1] == t.width else norm(x.flatten(-2)).view(x.shape)
        done.append(x if t.clip is None else x.clamp(-t.clip, t.clip))
    return done


class Projections(nn.Module):
    """Of a layer on the modules of a pretrained attention, as its family does them."""

    traits: Traits

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return project(self, x, self.traits)

    def finish(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = _finish(self, self.traits, k=k, v=v)
        return k, v

    def key_and_value(self) -> tuple[nn.Linear, nn.Linear]:
        """The linear maps of keys and of values, cut out of a fused one as copies."""
        fused = getattr(self, "qkv_proj", None)
        if fused is None:
            return cast(nn.Linear, self.k_proj), cast(nn.Linear, self.v_proj)
        weights = fused.weight.detach().split(self.traits.projections)[1:]
        biases = (None, None) if fused.bias is None else fused.bias.detach().split(self.traits.projections)[1:]
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            part = nn.Linear(fused.in_features, len(weight), bias is not None, device=weight.device, dtype=weight.dtype)
            part.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
            parts.append(part)
        return parts[0], parts[1]


def weight_shapes(attention: nn.Module, config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """The shape [out, in] that each projection must have."""
    t, hidden = traits(attention, config), config.hidden_size
    out = {"o_proj": (hidden, t.projections[0])}
    if hasattr(attention, "qkv_proj"):
        return {"qkv_proj": (sum(t.projections), hidden), **out}
    return {f"{name}_proj": (size, hidden) for name, size in zip("qkv", t.projections, strict=True)} | out
