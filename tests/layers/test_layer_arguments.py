"""What layers are told and given: one line that names the argument, for every layer that takes it."""

import dataclasses
import inspect
import math

import pytest
import torch

from liger_layers import (
    FullAttention,
    GatedRecurrence,
    InterleavedStack,
    LigerAttention,
    LinearMixer,
    MixtureOfMemories,
    SlidingWindowAttention,
)
from liger_layers.feature_maps import FEATURE_MAPS
from liger_models import LigerConfig, LigerForCausalLM, LigerModelConfig

LAYERS = (LigerAttention, GatedRecurrence, SlidingWindowAttention, FullAttention)
NO_NUMBERS = (-1.0, math.nan, math.inf, -math.inf, True, "1", [1.0])
NO_FACTORS = (*NO_NUMBERS, 0, 0.0)
NO_COUNTS = (0, -4, 2.0, "4", True)
NO_FLAGS = (0, 1, "no", 1.0)

REFUSED = [
    *(("hidden_size", value, "an integer >= 1") for value in (*NO_COUNTS, None)),
    *(("num_heads", value, "an integer >= 1") for value in (*NO_COUNTS, None)),
    *(("num_kv_heads", value, "an integer >= 1") for value in NO_COUNTS),
    *(("head_dim", value, "an integer >= 1") for value in NO_COUNTS),
    *(("window", value, "an integer >= 1") for value in NO_COUNTS),
    *(("sinks", value, "an integer >= 0") for value in (-4, 2.0, "4", True)),
    *(("mix", value, "a weight >= 0 of at most 1e+09") for value in NO_NUMBERS),
    *(("tau", value, "a number > 0") for value in (*NO_FACTORS, None)),
    *((name, value, "a number > 0, or None") for name in ("scale", "softcap", "rope_theta") for value in NO_FACTORS),
    *((name, value, "True or False") for name in ("learn_mix", "normalize", "bias") for value in NO_FLAGS),
    *(("memories", value, "an integer >= 0") for value in (-1, False, 0.0, "2", None)),
    *(("top_k", value, "an integer >= 1") for value in NO_COUNTS),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_what_cannot_be_is_named(layer):
    own = list(inspect.signature(layer).parameters)
    for name, value, wanted in REFUSED:
        error = ValueError if name in own else TypeError
        with pytest.raises(error) as refused:
            layer(**dict(hidden_size=64, num_heads=4) | {name: value})
        unknown = f"{layer.__name__}: unexpected argument {name!r}; expected one of {', '.join(own)}"
        assert str(refused.value) == (f"{name}: expected {wanted}, got {value!r}" if name in own else unknown)


EVERY = (*LAYERS, LinearMixer, MixtureOfMemories, InterleavedStack)


@pytest.mark.parametrize("layer", EVERY, ids=lambda layer: layer.__name__)
def test_an_unknown_keyword_is_answered_with_the_choices(layer):
    with pytest.raises(TypeError, match=f"{layer.__name__}: unexpected argument 'foo'; expected one of hidden_size, "):
        layer(64, 4, foo=1)


def test_no_layer_takes_what_it_would_not_use():
    with pytest.raises(TypeError, match="SlidingWindowAttention: unexpected argument 'tau'"):
        SlidingWindowAttention(16, 4, tau=-1, mix=99.0)
    for layer, name in ((GatedRecurrence, "window"), (FullAttention, "softcap"), (LinearMixer, "top_k")):
        assert name not in inspect.signature(layer).parameters


STATES = {
    "window and sinks": (dict(window=8, sinks=2), dict(window=4, sinks=6), "window 8, got one with 4"),
    "gate": (dict(gate="gla", mixing="sum"), dict(gate="mamba2", mixing="sum"), "gate gla, got one with mamba2"),
    "tau": (dict(tau=2.0), dict(tau=4.0), "tau 2.0, got one with 4.0"),
    "pool": (dict(pool="heads"), dict(pool="identity"), "pool heads, got one with identity"),
    "features": (dict(feature_map="softmax"), {}, "feature_map softmax, got one with kernel"),
    "positions": (dict(rope_theta=100.0), {}, "rope_theta 100.0, got one with 10000.0"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_layer_is_refused(name):
    one, other, message = STATES[name]
    x = torch.randn(1, 12, 32)
    _, state = LigerAttention(32, 4, **dict(window=6, sinks=2) | other)(x)
    with pytest.raises(ValueError, match=f"state: expected one of a layer with {message}"):
        LigerAttention(32, 4, **dict(window=6, sinks=2) | one)(x, state=state)


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (torch.zeros(3, dtype=torch.bool), r"visible of shape \(1, 8\), got \(3,\)"),
        ([True], r"visible of shape \(1, 8\), got list"),
        (torch.ones(1, 8, dtype=torch.long), r"visible of torch.bool, got torch.int64"),
    ],
)
def test_a_state_that_was_changed_by_hand_is_named(visible, message):
    layer, x = LigerAttention(32, 4, window=6, sinks=2), torch.randn(1, 3, 32)
    state = dataclasses.replace(layer(x)[1], visible=visible)
    with pytest.raises(ValueError, match=f"state: expected {message}"):
        layer(x, state=state)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_those_of_queries_or_of_keys(name):
    with pytest.raises(ValueError, match="side: expected one of query, key, got 'Key'"):
        FEATURE_MAPS[name](4, 2, 8)(torch.randn(1, 3, 4, 8), "Key")


def test_a_state_of_another_kind_of_layer_is_refused():
    x = torch.randn(1, 12, 32)
    makers = [lambda layer=layer: layer(32, 4) for layer in EVERY[:-1]] + [lambda: LinearMixer(32, 4, rule="kda")]
    states = [make()(x)[1] for make in makers]
    for i, make in enumerate(makers):
        for j, state in enumerate(states):
            if i != j:
                with pytest.raises(ValueError, match="state: expected "):
                    make()(x, state=state)
        make()(x, state=states[i])
    with pytest.raises(ValueError, match=r"state: expected k of shape \(2, 68, 4, 8\), got \(1, 68, 4, 8\)"):
        LigerAttention(32, 4)(torch.randn(2, 3, 32), state=states[0])


@pytest.mark.parametrize("layer", [*LAYERS, MixtureOfMemories, LinearMixer], ids=lambda layer: layer.__name__)
def test_heads_share_out_the_whole_width(layer):
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of num_heads 5 without head_dim, got 64"):
        layer(64, 5)
    assert layer(64, 5, head_dim=12)(torch.randn(1, 3, 64))[0].shape == (1, 3, 64)
    with pytest.raises(ValueError, match="num_heads: expected a multiple of num_kv_heads 3, got 4"):
        layer(64, 4, num_kv_heads=3)


@pytest.mark.parametrize("layer", [*LAYERS, MixtureOfMemories], ids=lambda layer: layer.__name__)
@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.randn(9, 32), None, r"x: expected \[batch, time, 32\], got \(9, 32\)"),
        (torch.randn(1, 2, 9, 32), None, r"x: expected \[batch, time, 32\], got \(1, 2, 9, 32\)"),
        (torch.randn(2, 9, 24), None, r"x: expected \[batch, time, 32\], got \(2, 9, 24\)"),
        ([[0.0]], None, "x: expected a tensor, got list"),
        (torch.randn(2, 9, 32), torch.ones(2, 9), r"mask: expected bool \[2, 9\], got torch.float32 \(2, 9\)"),
        (torch.randn(2, 9, 32), torch.ones(2, 9).long(), r"mask: expected bool \[2, 9\], got torch.int64"),
        (torch.randn(2, 9, 32), torch.ones(9, dtype=torch.bool), r"mask: expected bool \[2, 9\], got .* \(9,\)"),
        (torch.randn(2, 9, 32), torch.ones(1, 9, dtype=torch.bool), r"mask: expected bool \[2, 9\], got .* \(1, 9\)"),
        (torch.randn(2, 9, 32), [True], "mask: expected a tensor, got list"),
    ],
)  # fmt: skip
def test_what_a_layer_is_given(layer, x, mask, message):
    with pytest.raises(ValueError, match=message):
        layer(32, 4)(x, mask)


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        (dict(mix=-1), r"mix: expected a weight >= 0 of at most 1e\+09, got -1"),
        (dict(tau=0), "tau: expected a number > 0, got 0"),
        (dict(rope_theta=0), "rope_theta: expected a number > 0, or None, got 0"),
        (dict(sinks=-1), "sinks: expected an integer >= 0, got -1"),
    ],
)
def test_options_that_travel_are_checked_too(option, wanted):
    with pytest.raises(ValueError, match=wanted):
        InterleavedStack(32, 2, 4, "LW", options={"liger": option})
    sizes = dict(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    for name, layer in (("liger", LigerAttention), ("recurrence", GatedRecurrence), ("window", SlidingWindowAttention)):
        known = set(option) <= set(inspect.signature(layer).parameters)
        with pytest.raises(ValueError, match=wanted if known else "mixer_options"):
            LigerForCausalLM(LigerModelConfig(**sizes, mixers=name, mixer_options={name: option}))
    if "rope_theta" not in option:
        with pytest.raises(ValueError, match=wanted):
            LigerConfig(**option)


@pytest.mark.parametrize("name", ["hidden_size", "num_heads", "intermediate_size", "head_dim", "num_kv_heads"])
def test_a_stack_checks_its_sizes(name):
    for value in NO_COUNTS:
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got {value!r}"):
            InterleavedStack(**dict(hidden_size=32, num_layers=2, num_heads=4, pattern="M") | {name: value})
