"""What a config resolves to is what a saved model is built from: resolving it again changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from liger_models import LigerConfig
from tests.models.tiny import linearize_tiny, tiny

DEPTH = 3
NAMES = st.sampled_from(["liger", "full", "window", "own", "memories", "liger:gla", "liger:kda"])
PATTERNS = st.lists(NAMES, max_size=DEPTH).map(tuple) | st.dictionaries(st.integers(-DEPTH, DEPTH - 1), NAMES)


@given(
    PATTERNS,
    st.lists(st.integers(-DEPTH, DEPTH - 1), max_size=DEPTH).map(tuple),
    st.sampled_from([0, 2, 3]),
    st.lists(st.sampled_from([None, 4, 100]), min_size=DEPTH, max_size=DEPTH),
)
def test_a_resolved_config_resolves_to_itself(pattern, keep, memories, own):
    try:
        resolved = LigerConfig(pattern=pattern, keep=keep, memories=memories).resolve(own)
    except ValueError as error:
        known = "memories: expected 0", "pattern: expected a window of its own", "pattern: expected a layer once"
        assert str(error).startswith(known)
        return
    assert resolved.resolve(own) == resolved
    assert LigerConfig(**resolved.to_dict()).resolve(own) == resolved
    assert bool(resolved.memories) == ("memories" in resolved.pattern)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", dict(keep=[0, 1, 2])),
        ("llama", dict(pattern="MFF", keep=[0])),
        ("gemma2", dict(keep=[1, 2])),
        ("gemma2", dict(pattern={0: "memories"})),
    ],
)
def test_memories_whose_layers_all_stay_are_none_and_the_model_comes_back(name, options, tmp_path):
    model = linearize_tiny(tiny(name), memories=2, window=16, **options)
    assert model.config.liger["memories"] == 0
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.liger == model.config.liger


def test_memories_in_one_layer_come_back(tmp_path):
    model = linearize_tiny(tiny(), memories=2, pattern="LML", keep=[0], window=8)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.liger == model.config.liger
    assert [layer.self_attn.memories is not None for layer in again.model.layers[1:]] == [True, False]


@pytest.mark.parametrize(
    "pattern", ["GSX", ["liger:gla", "liger:gsa", "liger:mlstm"], {0: "liger:gla", 1: "liger:gsa", 2: "liger:mlstm"}]
)
def test_gates_in_a_pattern_take_what_was_given(pattern):
    model = linearize_tiny(tiny(), window=8, pattern=pattern, mix=0.25, pool="heads")
    layers = [layer.self_attn for layer in model.model.layers]
    assert [layer.recurrence.chosen.gate for layer in layers] == ["gla", "gsa", "mlstm"]
    assert all((layer.mix.weight == 0.25).all() and layer.recurrence.chosen.pool == "heads" for layer in layers)


def test_gates_in_a_pattern_take_what_a_preset_says():
    config = LigerConfig.from_preset("paper-gla", pattern=["liger:gsa", "liger:gla"]).resolve([None, None])
    gsa, gla = (config.options(name) for name in config.pattern)
    assert gsa == gla | dict(gate="gsa")


def test_gates_in_a_pattern_have_their_own_of_the_rest():
    config = LigerConfig(pattern="LGS").resolve([None] * 3)
    gates = {name: LigerConfig(**{**config.options(f"liger:{name}"), "pattern": ()}) for name in ("gla", "gsa")}
    assert gates["gla"].mixing == "joint" and gates["gla"].mix == 1.0 and gates["gla"].normalize
    assert gates["gsa"].mixing == "sum" and gates["gsa"].mix == 0.05 and not gates["gsa"].normalize
    assert gates["gsa"].feature_map == "softmax"


def test_what_does_not_suit_a_gate_in_a_pattern_is_refused():
    with pytest.raises(ValueError, match="feature_map: expected one for queries alone with gate 'hgrn2'"):
        linearize_tiny(tiny(), gate="kda", feature_map="kernel", pattern="LH")


def test_a_pattern_saved_when_gates_stood_alone_is_read():
    saved = LigerConfig(pattern="LGF").resolve([None] * 3).to_dict()
    old = saved | dict(pattern=["liger", "gla", "full"])
    assert LigerConfig.from_saved(old) == LigerConfig.from_saved(saved)


@pytest.mark.parametrize(
    ("options", "longest", "wanted"),
    [
        ({}, None, 128),
        ({}, 8192, 128),
        ({}, 100, 32),
        ({}, 40, 0),
        (dict(window=512), 600, 84),
        (dict(gate="gsa"), None, 0),
        (dict(preset="paper-gla"), None, 0),
        (dict(pattern="W"), None, 0),
        (dict(keep=range(DEPTH)), None, 0),
        (dict(recall=0), None, 0),
        (dict(recall=7), 100, 7),
    ],
)
def test_as_many_tokens_are_recalled_as_suit_unless_a_number_is_given(options, longest, wanted):
    resolved = LigerConfig.from_preset(**options).resolve([None] * DEPTH, longest)
    assert resolved.recall == wanted
    assert LigerConfig.from_saved(resolved.to_dict()).resolve([None] * DEPTH) == resolved


def test_layers_that_share_no_softmax_recall_nothing_beside_others_that_do(tmp_path):
    for gate, pattern in (("gated_retention", ["liger", "liger:gsa", "full"]), ("gsa", ["liger:gla", "liger", "full"])):
        model = linearize_tiny(tiny(), gate=gate, pattern=pattern, recall=5, window=8)
        model.save_pretrained(tmp_path)
        for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
            recalls = [each.model.layers[i].self_attn.recall for i in (0, 1)]
            assert recalls == [5, 0], gate


def test_what_was_saved_before_there_was_recall_has_none():
    saved = LigerConfig().resolve([None] * DEPTH).to_dict()
    del saved["recall"]
    assert LigerConfig.from_saved(saved).resolve([None] * DEPTH).recall == 0
