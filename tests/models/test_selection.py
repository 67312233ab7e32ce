"""Keys hidden in text, and the layers that looking them up needs."""

import re
from types import SimpleNamespace

import pytest
import torch

from liger_models import evaluate, linearize, retrieval, select_layers, selection
from liger_models.configuration import LigerConfig
from liger_models.families import own_windows
from liger_models.retrieval import make_prompt
from liger_models.text import to_blocks
from tests.models.test_exactness import ids
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

CALIBRATION = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(2))


class Reader:
    """Answers as a perfect model would, or with the first key it sees."""

    def __init__(self, tokenizer, perfect=True):
        self.tokenizer, self.perfect, self.prompts = tokenizer, perfect, []
        self.training, self.generation_config = False, None

    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(1000, 1))

    def modules(self):
        return [self]

    def train(self, training=True):
        self.training = training

    def eval(self):
        self.train(False)

    def generate(self, ids, **options):
        # Without white space, which the tokenizer does not know.
        text = re.sub(r"\s|<unk>", "", self.tokenizer.decode(ids[0]))
        self.prompts.append(text)
        name = re.search(r"Thepasskey(ofthe[a-z]+?)?is$", text).group(1) or ""
        key = re.search(rf"Thepasskey{name if self.perfect else '(?:ofthe[a-z]+?)?'}is([0-9]+)", text).group(1)
        return torch.cat([ids, torch.tensor([self.tokenizer(f" {key}")["input_ids"]])], 1)


class Plain:
    """A tokenizer whose decoded text has no spaces between the characters."""

    def __init__(self):
        self.inner = tiny_tokenizer()

    def __call__(self, *args, **options):
        return self.inner(*args, **options)

    def decode(self, ids):
        return "".join(self.inner.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("keys", [1, 4])
def test_a_model_that_reads_finds_every_key(keys):
    reader = Reader(Plain())
    assert retrieval(reader, reader.tokenizer, TEXT, 600, keys=keys) == 1.0
    places = [[m.start() for m in re.finditer("Rememberit", text)] for text in reader.prompts]
    assert all(len(p) == keys for p in places)
    assert len(set(reader.prompts)) == 8
    if keys == 1:
        assert [p[0] for p in places] == sorted(p[0] for p in places)
    else:
        assert len({re.search(r"ofthe([a-z]+)is$", text).group(1) for text in reader.prompts}) > 3
        blind = Reader(Plain(), perfect=False)
        assert retrieval(blind, blind.tokenizer, TEXT, 600, keys=keys) < 0.6


@pytest.mark.parametrize("depths", [1, 3])
def test_a_key_stands_once_at_each_depth(depths):
    reader = Reader(Plain())
    assert retrieval(reader, reader.tokenizer, TEXT, 600, depths=depths) == 1.0
    places = [text.index("Rememberit") / len(text) for text in reader.prompts]
    assert len(places) == depths
    assert all(abs(place - (i + 0.5) / depths) < 0.2 for i, place in enumerate(places))


def test_evaluate_hides_keys_when_asked():
    model = linearize_tiny(tiny(), window=8)
    figures = evaluate(model, tiny_tokenizer(), TEXT, length=32, max_blocks=1, contexts=[64, 128], depths=2, keys=3)
    assert {n for n in figures if "key" in n} == {"passkey_64", "multikey_64", "passkey_128", "multikey_128"}
    assert all(0 <= figures[n] <= 1 for n in figures if "key" in n)
    assert not any("key" in n for n in evaluate(model, tiny_tokenizer(), TEXT, length=32, max_blocks=1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "granite"])
def test_what_layers_cost_is_the_loss_of_the_model_with_them(name):
    model, options = tiny(name), dict(window=8, sinks=2)
    rows = selection.hidden_keys(tiny_tokenizer(), TEXT, 200, torch.device("cpu"))
    config = LigerConfig.from_preset(**options).resolve(own_windows(model.config))
    open_to = [i for i, kind in enumerate(config.pattern) if kind == "liger"]
    with selection._Bench.of(model, config, open_to, rows, CALIBRATION) as bench:
        inputs = bench.inputs(open_to[:1])
        for first in open_to:
            kept = {open_to[0], first}
            got = bench.loss(kept, first, inputs)
            other = linearize(tiny(name), calibration=CALIBRATION, keep=kept, **options)
            wanted = sum(selection.key_loss(other, *row) for row in rows) / len(rows)
            assert abs(got - wanted) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_selection_leaves_the_model_as_it_was(name):
    model, x = tiny(name).train(), ids(1, 30)
    modules, kind = list(model.modules()), type(model)
    with torch.no_grad():
        before = model(x).logits
    chosen = select_layers(
        model, TEXT, 2, tokenizer=tiny_tokenizer(), length=100, calibration=CALIBRATION, window=8, sinks=2
    )
    assert len(set(chosen)) == 2 and set(chosen) <= ({1, 2} if name == "gemma2" else {0, 1, 2})
    assert list(model.modules()) == modules and type(model) is kind and model.training
    with torch.no_grad():
        assert torch.equal(model(x).logits, before)
    assert linearize_tiny(model, keep=chosen, window=8).config.liger["keep"] == sorted(chosen)


def test_what_is_refused():
    tokenizer, model = tiny_tokenizer(), tiny()
    for call, message in (
        (lambda: select_layers(model, TEXT, 4, tokenizer=tokenizer), "keep: expected a number of layers from 0 to 3"),
        (
            lambda: select_layers(model, TEXT, 1, tokenizer=tokenizer, calibration=CALIBRATION + 97),
            "calibration: expected ids from 0 to 96",
        ),
        (lambda: select_layers(model, TEXT, 1), "tokenizer: expected the model's, found none under its name ''"),
        (lambda: select_layers(model, "short", 1, tokenizer=tokenizer), "text: expected at least 512 tokens of filler"),
        (lambda: select_layers(linearize_tiny(tiny()), TEXT, 1, tokenizer=tokenizer), "it is already linearized"),
        (lambda: retrieval(model, tokenizer, TEXT, 64, keys=9), "keys: expected 1 to 8, got 9"),
        (lambda: retrieval(model, tokenizer, TEXT, 0), "length: expected at least one token of filler, got 0"),
        (lambda: retrieval(model, tokenizer, TEXT, 64, depths=0), "depths: expected at least 1, got 0"),
        (lambda: retrieval(model, tokenizer, TEXT, 10**6), "text: expected at least 1000000 tokens of filler"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_prompt_holds_the_text_around_the_key():
    tokenizer = tiny_tokenizer()
    filler = to_blocks(tokenizer, TEXT, 2).flatten()
    prompt = make_prompt(tokenizer, filler, 100, 3, 0.25)
    hidden = tokenizer(f"\n\nThe pass key is {prompt.key}. Remember it: {prompt.key} is the pass key.\n\n")["input_ids"]
    assert prompt.ids[25 : 25 + len(hidden)] == hidden
    rest = prompt.ids[:25] + prompt.ids[25 + len(hidden) :]
    assert any(rest[:100] == filler[s : s + 100].tolist() for s in range(0, len(filler) - 100, 512))
