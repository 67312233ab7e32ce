"""Names survive linearizing, folders reload to the same logits, and nothing half-written stays behind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from liger_models import checkpoint
from tests.models.test_exactness import ids
from tests.models.tiny import NAMES, linearize_tiny, tiny, tiny_tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_names_and_weights_stay(name):
    model = tiny(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    assert linearize_tiny(model, window=8) is model
    after = model.state_dict()
    assert set(before) <= set(after)
    assert all(torch.equal(value, after[n]) for n, value in before.items())
    new = sum(p.numel() for n, p in after.items() if n not in before)
    assert 0 < new < 0.5 * sum(p.numel() for p in before.values())


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(window=8, sinks=2), dict(preset="paper-gla"), dict(keep=[0, -1])], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_save_and_reload_gives_the_same_logits(name, options, tmp_path):
    model = linearize_tiny(tiny(name), **options)
    x = ids(2, 30)
    wanted = model(x, use_cache=False).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert again.config.liger == model.config.liger
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"liger_{name}"
    assert (again(x, use_cache=False).logits - wanted).abs().max() <= 1e-5
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    out = half.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, eos_token_id=None)
    assert out.shape == (2, 35)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"), "found no model.layers.1.self_attn.k_proj.weight"),
        (lambda w: w.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}), "could not load"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "model")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model: could not load"):
        checkpoint.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"model_type": "llama", "num_hidden_layers": "two"}),
        ("config.json", []),
        ("config.json", {"model_type": "liger_llama", "liger": {"gates": "gla"}}),
        ("config.json", {"model_type": "liger_llama", "liger": [1]}),
        ("tokenizer.json", {}),
        ("tokenizer_config.json", []),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, file, content):
    checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "model")
    (tmp_path / "model" / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model: could not load"):
        checkpoint.load(tmp_path / "model")


def test_other_models_keep_a_shared_config():
    config = tiny().config
    one, other = (type(tiny())(config) for _ in range(2))
    linearize_tiny(one, window=8)
    assert other.config is config and config.model_type == "llama"
    assert one.config.model_type == one.model.config.model_type == "liger_llama"


def test_load_names_what_it_looked_for(tmp_path):
    for name, message in (
        (tmp_path / "no.gguf", "expected a GGUF file"),
        (tmp_path, "expected a folder with a config.json"),
        ("./nowhere", "expected a folder, a .gguf file or a hub name"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.load(name)


def test_save_and_load_a_pair(tmp_path):
    checkpoint.save(linearize_tiny(tiny(), window=8), tiny_tokenizer(), tmp_path / "m")
    model, tokenizer = checkpoint.load(tmp_path / "m")
    assert model.config.liger["window"] == 8
    assert tokenizer("the")["input_ids"] == tiny_tokenizer()("the")["input_ids"]
