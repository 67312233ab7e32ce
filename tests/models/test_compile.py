"""Compiled and exported models: the numbers of eager ones, and no graph for each length.

Shapes: B batch, T time.
"""

import pytest
import torch
from torch.export import Dim

from liger_layers.recurrences import with_rule
from liger_models import LigerForCausalLM, LigerModelConfig
from liger_models.from_scratch import MIXERS
from tests.models.tiny import linearize_tiny, tiny

# Shorter and longer than the window of 8, blocks of 32 and chunks of 16 and 32, and multiples of them.
LENGTHS = (20, 33, 5, 8, 9, 64, 70, 31, 2, 130)


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def layers(names, conv_size):
    """A model with one layer of each mixer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    options = {name: dict(window=8) for name in ("liger", "window")}
    mixers = dict(mixers=names, num_hidden_layers=len(names), conv_size=conv_size, mixer_options=options)
    return LigerForCausalLM(LigerModelConfig(**sizes, **mixers)).eval()


def others():
    return layers([name for name in MIXERS if name != "mixer"], 4)


def rules():
    """Without convolutions, which are slow to trace; the memories of `others` have the same."""
    return layers([f"mixer:{rule}" for rule in with_rule()], 0)


def default():
    return linearize_tiny(tiny(num_hidden_layers=1), window=8)


def recalling():
    return linearize_tiny(tiny(num_hidden_layers=1), window=8, recall=5)


def tokens(batch, length):
    return torch.randint(3, 97, (batch, length))


def padded(length):
    """A row without padding and one that begins with a third of it."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 3] = 0
    return dict(input_ids=tokens(2, length), attention_mask=mask)


@torch.no_grad()
def worst(model, run, inputs):
    """How far logits of `run` are from the model's, at real tokens."""
    wanted, got = model(**inputs).logits, run(**inputs).logits
    distance = (wanted - got).abs().amax(-1)
    return (distance * inputs["attention_mask"] if "attention_mask" in inputs else distance).max()


@pytest.mark.parametrize("given", [lambda T: dict(input_ids=tokens(2, T)), padded], ids=["plain", "padded"])
def test_ten_lengths_make_two_graphs(given):
    """The first length as it is, and any."""
    torch._dynamo.reset()
    model, backend = default(), Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert max(worst(model, compiled, given(length)) for length in LENGTHS) <= 1e-5
    assert backend.graphs <= 2


@pytest.mark.parametrize("make", [others, rules])
def test_ten_lengths_make_one_graph_of_every_mixer(make):
    """With the first length marked as one of many, which saves its own graph and refuses guards on it."""
    torch._dynamo.reset()
    model, backend = make(), Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = [padded(length) | dict(use_cache=False) for length in LENGTHS]
    for name in ("input_ids", "attention_mask"):
        torch._dynamo.mark_dynamic(inputs[0][name], 1)
    assert max(worst(model, compiled, each) for each in inputs) <= 1e-5
    assert backend.graphs == 1


@pytest.mark.parametrize("make", [default, recalling, others, rules])
def test_export_with_free_batch_and_length_is_exact(make):
    model, shapes = make(), dict(input_ids={0: Dim("batch"), 1: Dim("length")}, use_cache=None)
    program = torch.export.export(model, (), dict(input_ids=tokens(3, 24), use_cache=False), dynamic_shapes=shapes)
    sizes = ((2, 5), (3, 40), (2, 100), (4, 2), (1, 1))
    given = [dict(input_ids=tokens(*size), use_cache=False) for size in sizes]
    assert max(worst(model, program.module(), inputs) for inputs in given) <= 1e-5
