"""Stacks of different layers: pieces equal the whole, padding, patterns, and full attention against the formula."""

import pytest
import torch

from liger_layers import (
    FEATURE_MAPS,
    POOLINGS,
    RECURRENCES,
    FullAttention,
    Gate,
    GatedRecurrence,
    InterleavedStack,
    LigerAttention,
    LinearMixer,
    MixtureOfMemories,
    SlidingWindowAttention,
    register_gate,
)
from liger_layers.patterns import KINDS, LETTERS, read_pattern, spread
from liger_layers.recurrences import with_gate
from liger_layers.rotary import rotary_tables, rotate
from liger_ops import naive_sliding_window_attention

NEAR = {name: dict(window=6, sinks=2) for name in ("liger", "window", "liger:gated_deltanet", "liger:hgrn2")}


def stack(pattern="LWFOEH", layers=6, **options):
    torch.manual_seed(0)
    names = set(spread(read_pattern(pattern), layers))
    return InterleavedStack(
        32, layers, 4, pattern, options={n: o for n, o in NEAR.items() if n in names}, num_kv_heads=2, **options
    )


def test_a_pattern_says_what_the_layers_are():
    kinds = [LigerAttention, SlidingWindowAttention, FullAttention, MixtureOfMemories, LigerAttention, LigerAttention]
    layers = stack().layers
    assert [type(layer.mixer) for layer in layers] == kinds
    assert [layers[i].mixer.recurrence.chosen.gate for i in (0, 4, 5)] == ["gated_retention", "gated_deltanet", "hgrn2"]
    assert InterleavedStack(16, 10, 2).pattern == ["liger"] * 7 + ["full"] + ["liger"] * 2


@pytest.mark.parametrize("recording", [True, False])
def test_pieces_equal_the_whole(recording):
    model, x = stack(), torch.randn(2, 40, 32)
    whole, _ = model(x)
    parts, states = [], None
    with torch.set_grad_enabled(recording):
        for part in x.split([1, 17, 1, 1, 20], 1):
            y, states = model(part, states=states)
            parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5


def test_left_padding_changes_no_real_token():
    model, x = stack(), torch.randn(2, 30, 32)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :11] = False
    y, states = model(x, mask)
    assert torch.isfinite(y).all()
    alone, after = model(x[1:, 11:])
    assert (y[1, 11:] - alone[0]).abs().max() <= 1e-5
    more = torch.randn(2, 5, 32)
    later, _ = model(more, states=states)
    assert (later[1] - model(more[1:], states=after)[0][0]).abs().max() <= 1e-5


def test_every_parameter_learns_and_routers_report():
    model, x, logits = stack(), torch.randn(2, 40, 32, requires_grad=True), []
    y, _ = model(x, router_logits=logits)
    (y.square().mean() + sum(z.square().mean() for z in logits)).backward()
    assert [tuple(z.shape) for z in logits] == [(80, 4)]
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_full_attention_is_softmax_over_everything():
    layer, x = FullAttention(32, 4, 2).double(), torch.randn(2, 30, 32, dtype=torch.float64)
    q, k, v = layer.project(x)
    tables = [t.double() for t in rotary_tables(torch.arange(30)[None], 8, 10000.0)]
    q, k = rotate(q, *tables), rotate(k, *tables)
    wanted = layer.o_proj(naive_sliding_window_attention(q, k, v, 30).flatten(2))
    assert (layer(x)[0] - wanted).abs().max() <= 1e-6


def test_a_gate_of_ones_own_has_a_place_in_a_pattern():
    register_gate("test_gate", Gate(False, lambda pooled, tau: -pooled.abs() / tau))
    try:
        model = InterleavedStack(16, 2, 2, ["liger:test_gate", "full"])
        assert model.layers[0].mixer.recurrence.chosen.gate == "test_gate"
    finally:
        del RECURRENCES["test_gate"]


def test_letters_name_every_gate_once():
    assert len(set(LETTERS.values())) == len(LETTERS)
    assert set(LETTERS.values()) >= {f"liger:{gate}" for gate in with_gate()}


def test_a_name_means_one_thing():
    """Layers, recurrences, features and poolings share no name: what stands before a colon is never behind one."""
    tables = (KINDS, RECURRENCES, FEATURE_MAPS, POOLINGS)
    assert sum(len(table) for table in tables) == len({name for table in tables for name in table})
    with pytest.raises(ValueError, match=r"a recurrence is named behind a layer: .*liger:gla or .*mixer:gla"):
        read_pattern(["gla"])
    names = ["liger:gla", "recurrence:gla", "memories:gla", "mixer:gla", "mom:gla", "window"]
    stack = InterleavedStack(16, 6, 2, names)
    kinds = [LigerAttention, GatedRecurrence, LigerAttention, LinearMixer, MixtureOfMemories, SlidingWindowAttention]
    assert [type(layer.mixer) for layer in stack.layers] == kinds
    assert stack.layers[2].mixer.memories is not None and stack.layers[0].mixer.memories is None
    assert stack.layers[3].mixer.rule == stack.layers[4].mixer.rule == "gla"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InterleavedStack(16, 4, 2, "LQ"), "pattern: expected letters of L liger, .*, got 'Q'"),
        (lambda: InterleavedStack(16, 4, 2, ["liger", "L"]), "pattern: expected names of liger, .*, got 'L'"),
        (lambda: InterleavedStack(16, 2, 2, "LLF"), "pattern: expected at most 2 layers, as deep as the model, got 3"),
        (lambda: InterleavedStack(16, 2, 2, ""), "pattern: expected at least one layer"),
        (lambda: InterleavedStack(16, 2, 2, {7: "full"}), r"pattern: expected layer indices from -2 to 1, got \[7\]"),
        (lambda: InterleavedStack(16, 2, 2, ["own"]), "pattern: expected names of liger, .*, full, got 'own'"),
        (lambda: InterleavedStack(16, 2, 2, "F", options={"liger": {}}), "options: expected names in the pattern"),
        (lambda: InterleavedStack(16, 0, 2), "num_layers: expected an integer >= 1, got 0"),
        (lambda: stack()(torch.randn(1, 3, 32), states=[None]), "states: expected one for each of 6 layers, got 1"),
        (lambda: InterleavedStack(16, 2, 2, ["window:gla"]), "pattern: expected window alone, got 'window:gla'"),
        (lambda: InterleavedStack(16, 2, 2, ["liger:no"]), "pattern: expected liger, alone or with one of gla, .*:no'"),
        (lambda: InterleavedStack(16, 1, 2, ["mom:kda"], options={"mom:kda": {"rule": "gla"}}), "expected no rule"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
