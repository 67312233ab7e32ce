"""What a config resolves to is what a saved model is built from: resolving it again changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from liger_models import LigerConfig
from tests.models.tiny import linearize_tiny, tiny

DEPTH = 3
NAMES = st.sampled_from(["liger", "full", "window", "own", "memories", "gla", "kda"])
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
        assert str(error).startswith(("memories: expected 0", "pattern: expected a window of its own"))
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
