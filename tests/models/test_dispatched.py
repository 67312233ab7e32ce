"""Models whose weights lie elsewhere while nothing needs them: the same logits, losses and routers' logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from liger_layers.recurrences import with_rule
from liger_models import LigerForCausalLM, LigerModelConfig, evaluate
from tests.models.test_exactness import ids
from tests.models.tiny import linearize_tiny, tiny, tiny_tokenizer

PARTS = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.0": "cpu"}


def dispatched(model, folder, **parts):
    """The model saved, and loaded with all layers but the first left on the disk."""
    model.save_pretrained(folder)
    places = PARTS | {f"model.layers.{i}": "disk" for i in range(1, len(model.model.layers))} | parts
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder / "off").eval()


@pytest.mark.parametrize(
    "options",
    [{}, *[dict(gate=gate) for gate in ("gla", "hgrn2", "gsa", "kda")], dict(memories=2), dict(pattern="WF")],
    ids=str,
)
def test_linearized(tmp_path, options):
    model, x = linearize_tiny(tiny(), window=8, **options).eval(), ids(2, 30)
    away = dispatched(model, tmp_path, **{"model.rotary_emb": "cpu"})
    told = dict(labels=x, output_router_logits=True) if "memories" in options else dict(labels=x)
    with torch.no_grad():
        here, there = model(x, **told), away(x, **told)
    assert torch.equal(here.logits, there.logits) and torch.equal(here.loss, there.loss)
    assert len(getattr(there, "router_logits", ())) == (3 if "memories" in options else 0)
    tokens = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(x, **tokens), away.generate(x, **tokens))


@pytest.mark.parametrize("mixer", [*(f"mixer:{rule}" for rule in with_rule()), "mom", "liger", "window", "recurrence"])
def test_from_scratch(tmp_path, mixer):
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = LigerForCausalLM(LigerModelConfig(**sizes, mixers=mixer, router_aux_loss_coef=1.0)).eval()
    x, away = ids(2, 30), dispatched(model, tmp_path)
    with torch.no_grad():
        here, there = (m(x, labels=x, output_router_logits=True) for m in (model, away))
    assert torch.equal(here.logits, there.logits) and torch.equal(here.loss, there.loss)
    assert len(there.router_logits or ()) == (2 if mixer == "mom" else 0)


def test_the_window_alone_is_scored_there_too(tmp_path):
    model = linearize_tiny(tiny(), window=8)
    text = "the quick brown fox jumps over the lazy dog " * 40
    away = dispatched(model, tmp_path, **{"model.rotary_emb": "cpu"})
    here, there = (evaluate(m, tiny_tokenizer(), text, length=64, max_blocks=2) for m in (model, away))
    assert here == pytest.approx(there)
    assert here["perplexity"] != pytest.approx(here["perplexity_window_only"])
