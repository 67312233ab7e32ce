"""Figures say what the weights do: not the model's settings, and they leave the model as it was."""

import pytest
import torch

from liger_models import evaluate, perplexity, retrieval
from liger_models._calibration import draw_text
from tests.models.test_exactness import ids
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

SETTINGS = dict(repetition_penalty=5.0, no_repeat_ngram_size=2, num_return_sequences=2, return_dict_in_generate=True)


def generated(model, monkeypatch):
    """Every sequence that models of its class generate from here on."""
    found, generate = [], type(model).generate

    def listen(self, *args, **kwargs):
        found.append(generate(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(type(model), "generate", listen)
    return found


def test_generation_settings_reach_neither_keys_nor_calibration(monkeypatch):
    model = tiny()
    found = generated(model, monkeypatch)
    for settings in ({}, SETTINGS):
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        own = model.generation_config
        retrieval(model, tiny_tokenizer(), TEXT, 40, depths=2)
        draw_text(model, 2, 20)
        assert model.generation_config is own
    half = len(found) // 2
    assert half == 3 and all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


@pytest.mark.parametrize(("name", "options"), [("olmoe", {}), ("llama", dict(memories=3))])
def test_routers_do_not_count_into_perplexity(name, options):
    model = linearize_tiny(tiny(name), window=8, **options)
    plain = perplexity(model, ids(2, 40))
    model.config.output_router_logits = True
    assert perplexity(model, ids(2, 40)) == plain


@pytest.mark.parametrize("training", [True, False])
def test_a_model_stays_in_its_mode(training):
    model = tiny().train(training)
    retrieval(model, tiny_tokenizer(), TEXT, 40, depths=1)
    assert model.training is training
    for wrong in (dict(contexts=[0]), dict(contexts=[40], keys=9), dict(contexts=[10**6])):
        with pytest.raises(ValueError, match=r"length|keys|text"):
            evaluate(model, tiny_tokenizer(), TEXT, length=32, max_blocks=1, **wrong)
        assert model.training is training
