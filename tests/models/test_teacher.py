"""A linearized model is its own original for a while, and says so when it no longer is."""

import copy

import pytest
import torch
from torch import nn

from liger_layers import FullAttention, LigerAttention
from liger_layers.calls import as_it_is, attending_in_full, now, with_window
from liger_models import as_original, finetune, load
from liger_models.checkpoint import quiet_peft
from liger_models.teacher import is_tuned, mark_tuned, original
from tests.models.tiny import NAMES, TEXT, linearize_tiny, tiny, tiny_tokenizer

IDS = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(1))
# Padding on the left of one row and on the right of the other.
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0
MASK[1, -5:] = 0
# Of what learns as a whole, and of adapters.
QUICK = dict(length=32, batch=4, steps=3, warmup=1, learning_rate=1e-2)


@pytest.mark.parametrize("pattern", ["L", "MWF"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_original(name, pattern):
    whole = tiny(name)
    model = linearize_tiny(copy.deepcopy(whole), window=8, sinks=2, pattern=pattern)
    with torch.no_grad():
        wanted, padded, before = whole(IDS).logits, whole(IDS, attention_mask=MASK).logits, model(IDS).logits
        with as_original(model):
            assert (model(IDS).logits - wanted).abs().max() <= 1e-5
            found = model(IDS, attention_mask=MASK).logits
            assert (found - padded)[MASK.bool()].abs().max() <= 1e-5
        assert (before - wanted).abs().max() > 1e-3
        assert torch.equal(model(IDS).logits, before)
        assert (original(model)(IDS).logits - wanted).abs().max() <= 1e-6
    assert original(model).lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "olmo2"])
def test_in_double_precision(name):
    whole = tiny(name).double()
    model = linearize_tiny(copy.deepcopy(whole), window=8, sinks=2)
    with torch.no_grad(), as_original(model):
        assert (model(IDS).logits - whole(IDS).logits).abs().max() <= 1e-10


def test_a_window_that_the_original_had_by_itself():
    whole = tiny("mistral", sliding_window=20)
    model = linearize_tiny(copy.deepcopy(whole), window=8, sinks=2)
    assert model.config.liger["pattern"] == ["liger"] * 3
    with torch.no_grad(), as_original(model):
        assert (model(IDS).logits - whole(IDS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("memories", [0, 2])
def test_adapters_and_what_learned_as_a_whole_are_off(memories):
    whole = tiny()
    model = linearize_tiny(copy.deepcopy(whole), window=8, sinks=2, memories=memories)
    tuned = finetune(model, tiny_tokenizer(), TEXT, merge=False, objective="kl+match", **QUICK).train()
    learning = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        before = tuned(IDS).logits
        with as_original(tuned):
            assert not any(module.training for module in tuned.modules())
            assert (tuned(IDS).logits - whole(IDS).logits).abs().max() <= 1e-5
        assert torch.equal(tuned(IDS).logits, before) and (before - whole(IDS).logits).abs().max() > 1e-2
    assert tuned.training and tuned.get_base_model().config.use_cache
    assert learning == {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert any("feature_map" in name for name in learning) and any("lora" in name for name in learning)


def test_what_was_merged_is_no_longer_its_original(tmp_path):
    whole, tokenizer = tiny(), tiny_tokenizer()
    tuned = finetune(linearize_tiny(copy.deepcopy(whole), window=8), tokenizer, TEXT, **QUICK)
    tuned.save_pretrained(tmp_path)
    message = (
        "expected weights as they were linearized, or a teacher beside them, got a model whose adapters were merged"
    )
    for model in (tuned, type(tuned).from_pretrained(tmp_path)):
        for objective in ("kl", "next+match"):
            with pytest.raises(ValueError, match=f"^teacher: {message}$"):
                finetune(model, tokenizer, TEXT, objective=objective, **QUICK)
        with pytest.raises(ValueError, match=message), as_original(model):
            pass
        with pytest.raises(ValueError, match=message):
            original(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    finetune(model, tokenizer, TEXT, objective="kl", teacher=whole, **QUICK)
    # The original of a model that is not linearized is itself, whatever it was tuned on before.
    plain = finetune(copy.deepcopy(whole), tokenizer, TEXT, **QUICK)
    mark_tuned(plain)
    with as_original(plain):
        pass


def test_adapters_that_were_merged_while_loading(tmp_path):
    linearize_tiny(tiny(), window=8).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    model, tokenizer = load(tmp_path / "small")
    assert not is_tuned(model)
    with quiet_peft():
        finetune(model, tokenizer, TEXT, merge=False, **QUICK).save_pretrained(tmp_path / "adapters")
    assert is_tuned(load(tmp_path / "adapters")[0])


def test_a_cache_is_refused():
    model = linearize_tiny(tiny(), window=8)
    with as_original(model), pytest.raises(ValueError, match="state: expected none while the layer attends in full"):
        model.generate(IDS, max_new_tokens=3, use_cache=True, do_sample=False)


@pytest.mark.parametrize("mixing", ["joint", "sum"])
def test_a_layer_in_full_is_full_attention(mixing):
    torch.manual_seed(0)
    gate = dict(gate="gla", feature_map="softmax") if mixing == "sum" else {}
    layer = LigerAttention(32, 4, 2, window=4, sinks=1, memories=2, mixing=mixing, **gate).double()
    nn.init.ones_(layer.memories.mix.weight)
    full = FullAttention(32, 4, 2).double()
    full.load_state_dict({name: x for name, x in layer.state_dict().items() if name in full.state_dict()})
    x, mask = torch.randn(2, 20, 32, dtype=torch.double), MASK[:, :20].bool()
    for shown in (None, mask):
        wanted, plain = full(x, shown)[0], layer(x, shown)[0]
        with attending_in_full({layer: None}):
            found, state = layer(x, shown)
            with as_it_is(layer):
                assert torch.equal(layer(x, shown)[0], plain)
            with pytest.raises(ValueError, match="state: expected none"):
                layer(x, shown, state)
            with pytest.raises(ValueError, match="layers: expected layers that attend as they are"):
                attending_in_full({layer: None}).__enter__()
        assert (found - wanted)[slice(None) if shown is None else shown].abs().max() <= 1e-12
        assert (plain - wanted).abs().max() > 1e-3 and torch.equal(layer(x, shown)[0], plain)
    with pytest.raises(ValueError, match="layers: expected layers with a window, got FullAttention"):
        attending_in_full({full: None}).__enter__()


def test_a_shorter_window_is_that_of_a_layer_made_with_it():
    torch.manual_seed(0)
    layer, short = (LigerAttention(32, 4, 2, window=size, sinks=2).double() for size in (8, 3))
    short.load_state_dict(layer.state_dict())
    x = torch.randn(2, 30, 32, dtype=torch.double)
    before, state = layer(x[:, :12])
    with with_window([layer], 3):
        wanted, found = short(x), layer(x)
        assert torch.equal(found[0], wanted[0]) and now(layer) == now(short)
        with pytest.raises(ValueError, match="state: expected one of a layer with window 3, got one with 8"):
            layer(x[:, 12:], state=state)
        assert torch.equal(layer(x, state=found[1])[0], short(x, state=wanted[1])[0])
    assert torch.equal(layer(x[:, :12])[0], before) and not torch.equal(wanted[0][:, :12], before)
    with pytest.raises(ValueError, match="window: expected an integer >= 1, got 0"):
        with_window([layer], 0).__enter__()
