"""CPU ops against torch's causal attention: 9 query and 3 key/value heads of width 64, as SmolLM2-135M has them.

Shapes: T tokens, HQ query heads, H key/value heads, D width.
"""

import pytest
import torch
import torch.nn.functional as F

from liger_layers import LigerAttention
from liger_layers.rotary import rotary_tables
from liger_ops import (
    chunk_gated_delta_rule,
    chunk_gla,
    chunk_kda,
    chunk_simple_gla,
    liger_attention,
    sliding_window_attention,
)

HQ, H, D, WINDOW, SINKS = 9, 3, 64, 64, 4


def inputs(T):
    torch.manual_seed(0)
    return torch.randn(1, T, HQ, D), torch.randn(1, T, H, D), torch.randn(1, T, H, D)


def sdpa(T):
    q, k, v = (x.transpose(1, 2) for x in inputs(T))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def liger(T):
    """Everything between the projections: RoPE, feature maps, gate, window, recurrence, next state."""
    layer = LigerAttention(HQ * D, HQ, H, window=WINDOW, sinks=SINKS)
    q, k, v = inputs(T)
    mask = torch.ones(1, T, dtype=torch.bool)
    state = layer.initial_state(1, q.device, q.dtype)
    tables = rotary_tables(torch.arange(T)[None], D, 10000.0)
    return lambda: layer.mixer(q, k, v, mask, state, tables)


def liger_op(T):
    """The op alone, as SDPA is: queries, keys, features and gates given."""
    q, k, v = inputs(T)
    k, v = (torch.cat([torch.zeros(1, WINDOW, H, D), x], 1) for x in (k, v))
    visible = torch.arange(WINDOW + T)[None] >= WINDOW
    features = torch.randn(1, T, HQ, D), torch.randn(1, T, H, D)
    g = -torch.rand(1, T, H) / 1024
    return lambda: liger_attention(q, k, v, *features, g, window=WINDOW, sinks=SINKS, visible=visible)


def window(T):
    q, k, v = inputs(T)
    return lambda: sliding_window_attention(q, k, v, WINDOW, SINKS)


def gla(T):
    q, k, v = inputs(T)
    g = -torch.rand(1, T, H, D) / 16
    return lambda: chunk_gla(q, k, v, g)


def simple_gla(T):
    q, k, v = inputs(T)
    g = -torch.rand(1, T, H) / 16
    return lambda: chunk_simple_gla(q, k, v, g)


def gated_delta_rule(T):
    q, k, v = inputs(T)
    g, beta = -torch.rand(1, T, H) / 16, torch.rand(1, T, H)
    return lambda: chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)


def kda(T):
    q, k, v = inputs(T)
    g, beta = -torch.rand(1, T, H, D) / 16, torch.rand(1, T, H)
    return lambda: chunk_kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)


OPS = {f.__name__: f for f in (sdpa, liger_op, liger, window, gla, simple_gla, gated_delta_rule, kda)}


@pytest.mark.parametrize("T", [512, 2048, 8192])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_forward(benchmark, name, T):
    benchmark.group = f"T={T}"
    benchmark.pedantic(OPS[name](T), rounds=7, warmup_rounds=2)
