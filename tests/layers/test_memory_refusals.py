"""What a mixture of memories refuses: one clear line that names the argument."""

import pytest
import torch

from liger_layers import MixtureOfMemories, load_balancing_loss
from tests.layers.test_memories import HIDDEN, make


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rule="mamba9"), "rule: expected one of gla, .*simple_gla, got 'mamba9'"),
        (dict(top_k=0), "top_k: expected a number from 1 to memories = 4, got 0"),
        (dict(top_k=5), "top_k: expected a number from 1 to memories = 4, got 5"),
        (dict(memories=-1), "memories: expected an integer >= 0, got -1"),
        (dict(memories=0, shared=False), "shared: expected True when memories is 0"),
        (dict(num_kv_heads=3), "num_heads: expected a multiple of num_kv_heads 3, got 4"),
        (dict(num_kv_heads=0), "num_kv_heads: expected an integer >= 1, got 0"),
        (dict(num_kv_heads=2.0), "num_kv_heads: expected an integer >= 1, got 2.0"),
        (dict(hidden_size="32"), "hidden_size: expected an integer >= 1, got '32'"),
        (dict(hidden_size=-24, head_dim=8), "hidden_size: expected an integer >= 1, got -24"),
        (dict(hidden_size=30), "hidden_size: expected a multiple of num_heads 4 without head_dim, got 30"),
        (dict(head_dim=0), "head_dim: expected an integer >= 1, got 0"),
        (dict(value_dim=0), "value_dim: expected an integer >= 1, got 0"),
        (dict(router_shift=1), "router_shift: expected True or False, got 1"),
        (dict(router_shift=True, memories=0), "router_shift: expected False when memories is 0, got True"),
        (dict(router_shift=True, conv_size=1), "conv_size: expected 2 or more with router_shift, got 1"),
        (dict(router_shift=True, conv_size=None), "conv_size: expected 2 or more with router_shift, got None"),
        (dict(conv_size=-2), "conv_size: expected an integer >= 0, got -2"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfMemories(**dict(hidden_size=32, num_heads=4) | options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=torch.randn(2, 9, 5)), r"x: expected \[batch, time, 24\], got \(2, 9, 5\)"),
        (dict(mask=torch.ones(2, 8, dtype=torch.bool)), r"mask: expected bool \[2, 9\], got torch.bool \(2, 8\)"),
        (dict(mask=torch.ones(2, 9)), r"mask: expected bool \[2, 9\], got torch.float32"),
        (dict(cu_seqlens=torch.tensor([0, 9])), "cu_seqlens: expected batch 1"),
        (dict(x=torch.randn(1, 9, HIDDEN), cu_seqlens=torch.tensor([0, 8])), "cu_seqlens: expected bounds"),
        (dict(state=make().initial_state(3, torch.device("cpu"), torch.float32)), "state: expected tensors of shapes"),
        (
            dict(state=make("mlstm").initial_state(2, torch.device("cpu"), torch.float32)),
            "with rule gated_deltanet, got one with mlstm",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(**dict(x=torch.randn(2, 9, HIDDEN)) | arguments)


def test_what_load_and_its_loss_refuse():
    layer, logits = make(memories=4), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"router_logits: expected \[tokens, memories\] = \[tokens, 4\], got \(6, 7\)"):
        layer.load(torch.randn(6, 7))
    for refused in (layer.load, lambda x, mask: load_balancing_loss(x, 2, mask)):
        with pytest.raises(ValueError, match=r"mask: expected 6 tokens as in router_logits, got \(5,\)"):
            refused(logits, torch.ones(5))
    with pytest.raises(ValueError, match=r"top_k: expected a number from 1 to 4 memories, got 2\.0"):
        load_balancing_loss(logits, 2.0)
