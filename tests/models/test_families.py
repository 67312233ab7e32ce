"""What families differ in, every gate in each of them, and layers of different kinds in one model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from liger_layers import SlidingWindowAttention
from liger_layers.recurrences import with_gate
from liger_models import FAMILIES, cache_bytes, evaluate, finetune, make_cache
from liger_models._inputs import CACHE
from liger_models.modeling import LinearizedAttention, LinearizedWindow
from tests.models.test_exactness import ids
from tests.models.test_memories import stir
from tests.models.tiny import NAMES, TEXT, checkpoint_activations, linearize_tiny, tiny, tiny_tokenizer

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


@pytest.mark.parametrize("gate", with_gate())
@pytest.mark.parametrize("name", NAMES)
def test_every_gate_in_every_family(name, gate, tmp_path):
    """Forward, backward, generation with a cache, and a folder that gives the same logits."""
    model = linearize_tiny(tiny(name), window=8, sinks=2, gate=gate)
    x = ids(2, 24)
    model(x, labels=x).loss.backward()
    for n, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), n
    layer = next(m for m in model.modules() if isinstance(m, LinearizedAttention))
    assert layer.o_proj.weight.grad.any() and layer.mix.weight.grad.any()
    model.zero_grad()
    with torch.no_grad():
        out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=4, eos_token_id=None, do_sample=False)
        whole = model(out, use_cache=False).logits
        assert torch.equal(whole[:, 23:-1].argmax(-1), out[:, 24:])
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(again) is type(model)
        assert torch.equal(again(out, use_cache=False).logits, whole)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_lie_in_files_as_in_the_original(name, tmp_path):
    original = tiny(name)
    original.save_pretrained(tmp_path / "before")
    linearize_tiny(original, window=8).save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after"))
    assert any("experts.3." in n for n in before)
    assert all(torch.equal(value, after[n]) for n, value in before.items())


@pytest.mark.parametrize("name", EXPERTS)
def test_routers_of_experts_and_of_memories_are_told_together(name):
    x = ids(2, 20)
    plain = linearize_tiny(tiny(name), window=8)
    out = plain(x, labels=x, output_router_logits=True)
    assert len(out.router_logits) == 3 and out.aux_loss > 0
    model = stir(linearize_tiny(tiny(name), window=8, memories=3))
    alone, both = model(x, labels=x), model(x, labels=x, output_router_logits=True)
    assert [y.shape[-1] for y in both.router_logits] == [4] * 3 + [3] * 3
    assert both.loss > alone.loss and torch.equal(both.logits, alone.logits)
    both.loss.backward()
    assert all(layer.self_attn.memories.router.weight.grad.any() for layer in model.model.layers)


SLIDING = {
    "mistral": dict(sliding_window=12),
    "phi3": dict(sliding_window=12),
    "mixtral": dict(sliding_window=12),
    "qwen2": dict(use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3": dict(use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen2_moe": dict(use_sliding_window=True, sliding_window=12, max_window_layers=2),
    "qwen3_moe": dict(use_sliding_window=True, sliding_window=12),
    "gemma2": {},
    "gemma3_text": {},
}


@torch.no_grad()
@pytest.mark.parametrize("name", SLIDING)
def test_a_family_keeps_its_own_windows(name):
    x, options = ids(2, 40), SLIDING[name]
    wanted = tiny(name, **options)(x).logits
    everywhere = tiny(name, **{**options, "sliding_window": 4000})(x).logits
    assert (wanted - everywhere).abs().max() > 1e-3
    model = linearize_tiny(tiny(name, **options), window=40)
    assert (model(x).logits - wanted).abs().max() <= 1e-4
    assert "own" in model.config.liger["pattern"] and not model.config.liger["keep"]
    cache = make_cache(model.config)
    pieces = [model(part, **{CACHE: cache}).logits for part in x.split([13, 1, 1, 25], 1)]
    assert (torch.cat(pieces, 1) - wanted).abs().max() <= 1e-4


def test_layers_that_slide_among_others_just_slide_and_all_of_them_recur_if_all_slide():
    gemma = linearize_tiny(tiny("gemma2"), window=8)
    assert gemma.config.liger["pattern"] == ["own", "memories" if gemma.config.liger["memories"] else "liger", "liger"]
    assert isinstance(gemma.model.layers[0].self_attn, LinearizedWindow)
    assert gemma.model.layers[0].self_attn.window.size == 12
    mistral = linearize_tiny(tiny("mistral", sliding_window=12), window=8)
    assert mistral.config.liger["pattern"] == ["liger"] * 3
    asked = linearize_tiny(tiny("gemma2"), window=8, pattern="L")
    assert asked.config.liger["pattern"] == ["liger"] * 3


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    model = linearize_tiny(tiny(name), window=8).train()
    x, found = ids(2, 24), []
    for use in (False, True):
        model.zero_grad()
        if use:
            checkpoint_activations(model, use_reentrant=False)
        model(x, labels=x).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_adapters_learn_and_merge(name):
    model = linearize_tiny(tiny(name), window=8)
    before = {n: p.clone() for n, p in model.named_parameters()}
    tuned = finetune(model, tiny_tokenizer(), TEXT, steps=2, length=32, batch=2)
    assert type(tuned).__name__ == FAMILIES[name][1].__name__
    moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert {n.rsplit(".", 2)[1] for n in moved} >= ({"qkv_proj"} if name == "phi3" else {"q_proj", "k_proj", "v_proj"})
    assert not any("mlp" in n or "embed" in n for n in moved)


PATTERNS = {
    "LLF": ["liger", "liger", "full"],
    "WF": ["window", "full", "window"],
    "MED": ["memories", "liger:gated_deltanet", "liger:deltanet"],
    "SHW": ["liger:gsa", "liger:hgrn2", "window"],
    ("liger:kda", "full"): ["liger:kda", "full", "liger:kda"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layers_of_different_kinds(pattern, tmp_path):
    names = PATTERNS[pattern]
    model = linearize_tiny(tiny(), window=8, sinks=2, pattern=pattern)
    assert model.config.liger["pattern"] == names
    assert model.config.liger["keep"] == [i for i, n in enumerate(names) if n == "full"]
    for layer, name in zip(model.model.layers, names, strict=True):
        attention = layer.self_attn
        assert isinstance(attention, SlidingWindowAttention) == (name == "window")
        assert isinstance(attention, LinearizedAttention) == (name not in ("window", "full"))
        if isinstance(attention, LinearizedAttention):
            assert attention.recurrence.chosen.gate == (name.partition(":")[2] or "gated_retention")
            assert (attention.memories is not None) == (name == "memories")
    x = ids(2, 40)
    model(x, labels=x).loss.backward()
    with torch.no_grad():
        wanted = model(x, use_cache=False).logits
        cache = make_cache(model.config)
        pieces = [model(part, **{CACHE: cache}).logits for part in x.split([13, 1, 26], 1)]
        assert (torch.cat(pieces, 1) - wanted).abs().max() <= 1e-4
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(x, use_cache=False).logits, wanted)
    assert evaluate(model, tiny_tokenizer(), TEXT, length=32, max_blocks=1)["perplexity"] > 1


def test_a_pattern_by_index_and_memories_in_it():
    model = linearize_tiny(tiny(), window=8, pattern={-1: "full"}, memories=3)
    assert model.config.liger["pattern"] == ["memories", "memories", "full"]
    assert model.config.liger["memories"] == 3
    some = linearize_tiny(tiny(), window=8, pattern="ML", memories=3)
    assert some.config.liger["pattern"] == ["memories", "liger", "memories"]
    assert some.model.layers[1].self_attn.memories is None


def test_a_config_without_a_pattern_still_builds():
    model = linearize_tiny(tiny(), window=8, keep=[1])
    config = copy.deepcopy(model.config)
    del config.liger["pattern"], config.liger["pool"]
    again = type(model)(config)
    assert again.config.liger == model.config.liger
    assert set(again.state_dict()) == set(model.state_dict())


def test_windows_alone_fine_tune_too():
    model = linearize_tiny(tiny(), window=8, pattern="W")
    assert (
        type(finetune(model, tiny_tokenizer(), TEXT, steps=1, length=32, batch=2)).__name__ == "LigerLlamaForCausalLM"
    )
    cache = make_cache(model.config)
    model(ids(1, 50), **{CACHE: cache})
    held = cache_bytes(cache)
    model(ids(1, 50), **{CACHE: cache})
    assert cache_bytes(cache) == held > 0
