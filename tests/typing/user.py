"""A user's file, which the type checker reads and nobody runs: what is public says what it takes and gives."""

import torch
from torch import nn
from transformers import LlamaForCausalLM

from liger_layers import InterleavedStack, LigerAttention, LigerState, MixtureOfMemories
from liger_models import LigerForCausalLM, LigerModelConfig, linearize, make_cache, perplexity
from liger_ops import chunk_gla, sliding_window_attention


def ops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    o, state = chunk_gla(q, k, v, g, output_final_state=True)
    assert state is not None
    near: torch.Tensor = sliding_window_attention(q, k, v, 64)
    near, lse = sliding_window_attention(q, k, v, 64, return_lse=True)
    return o + near * lse.unsqueeze(-1)


def layers(x: torch.Tensor) -> LigerState:
    layer = LigerAttention(64, 4, num_kv_heads=2, window=32, gate="gla")
    nn.init.zeros_(layer.q_proj.weight)
    y, state = layer(x)
    width: int = layer.o_proj.out_features
    assert y.shape[-1] == width
    memories = MixtureOfMemories(64, 4)
    memories(x)
    InterleavedStack(64, 2, 4)(x)
    return state


def models(ids: torch.Tensor) -> LlamaForCausalLM:
    model: LlamaForCausalLM = linearize(LlamaForCausalLM.from_pretrained("folder"), window=64)
    worse: float = perplexity(model, ids) - 1
    assert worse > 0
    cache = make_cache(model.config)
    fresh = LigerForCausalLM(LigerModelConfig(hidden_size=64))
    fresh(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    return model
