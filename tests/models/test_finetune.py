"""LoRA fine-tuning learns, checkpoints gradients, resumes after Ctrl-C, and refuses nonsense."""

import os
import signal

import pytest
import torch

from liger_models import LigerForCausalLM, LigerModelConfig, evaluate, finetune
from liger_models.finetune import RECIPES, _Interrupt
from tests.models.test_exactness import ids
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

QUICK = dict(length=32, batch=4, warmup=1, learning_rate=3e-3)


@pytest.mark.parametrize("options", [dict(window=8, sinks=2), dict(preset="paper-gla", window=8)], ids=str)
def test_learns_and_keeps_the_class(options):
    model, tokenizer = linearize_tiny(tiny(scale=1.0), **options), tiny_tokenizer()
    before = evaluate(model, tokenizer, TEXT, length=32)
    tuned = finetune(model, tokenizer, TEXT, steps=60, **{**QUICK, "learning_rate": 2e-2})
    after = evaluate(tuned, tokenizer, TEXT, length=32)
    assert type(tuned).__name__ == "LigerLlamaForCausalLM"
    assert not any("lora" in n or "modules_to_save" in n for n in tuned.state_dict())
    assert after["perplexity"] < 0.8 * before["perplexity"]
    assert after["perplexity_window_only"] > 1


@pytest.mark.parametrize("learn", [True, False])
def test_features_always_train_and_the_mix_if_it_may(learn):
    model = linearize_tiny(tiny(scale=1.0), window=8, sinks=2, learn_mix=learn)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = finetune(model, tiny_tokenizer(), TEXT, steps=3, **QUICK)
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert any("feature_map" in n for n in changed)
    assert any("mix" in n for n in changed) == learn
    assert set(before) == {n for n, _ in tuned.named_parameters()}


def test_memories_from_random_weights_learn_to_route():
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    options = {"mom": {"router_shift": True}}
    model = LigerForCausalLM(LigerModelConfig(mixers=["mom", "gla"], mixer_options=options, **sizes))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = finetune(model, tiny_tokenizer(), TEXT, steps=3, **QUICK)
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert {f"model.layers.0.mixer.{x}.weight" for x in ("router", "router_gate", "q_proj")} <= changed
    assert set(before) == {n for n, _ in tuned.named_parameters()} and not tuned.config.output_router_logits


def test_the_original_can_be_tuned_the_same_way():
    tuned = finetune(tiny(scale=1.0), tiny_tokenizer(), TEXT, steps=2, **QUICK)
    assert type(tuned).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = linearize_tiny(tiny(name), window=8, sinks=2).train()
    x = ids(2, 40)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            new = getattr(model, "activation_checkpointing_enable", None)
            (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
        calls = []
        hook = model.model.layers[1].self_attn.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        model.zero_grad()
        model(x, labels=x, use_cache=False).loss.backward()
        hook.remove()
        assert len(calls) == 1 + checkpointing
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("feature_map" in n for n in found[0])
    for n, grad in found[0].items():
        assert torch.allclose(grad, found[1][n], rtol=1e-4, atol=1e-6), n


def test_gradient_checkpointing_through_the_trainer():
    finetune(linearize_tiny(tiny(), window=8), tiny_tokenizer(), TEXT, steps=2, gradient_checkpointing=True, **QUICK)


def test_control_c_leaves_a_checkpoint_that_resumes(tmp_path, monkeypatch):
    store = tmp_path / "checkpoints"
    whole = finetune(linearize_tiny(tiny(), window=8), tiny_tokenizer(), TEXT, steps=8, **QUICK)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(_Interrupt, "on_step_begin", strike)
        with pytest.raises(KeyboardInterrupt, match="can be resumed"):
            finetune(linearize_tiny(tiny(), window=8), tiny_tokenizer(), TEXT, steps=8, checkpoints=store, **QUICK)
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(p.name for p in store.iterdir()) == ["checkpoint-3", "run.json"]
    for changes, message in (
        (dict(steps=8), "holds an interrupted run"),
        (dict(steps=9, resume=True), "steps: expected 8, as in the run to resume, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(linearize_tiny(tiny(), window=8), tiny_tokenizer(), TEXT, checkpoints=store, **changes, **QUICK)
    resumed = finetune(
        linearize_tiny(tiny(), window=8), tiny_tokenizer(), TEXT, steps=8, checkpoints=store, resume=True, **QUICK
    )
    for (n, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), n


def test_a_failure_leaves_the_model_without_adapters(tmp_path, monkeypatch):
    model = linearize_tiny(tiny(), window=8)
    before = {n: p.requires_grad for n, p in model.named_parameters()}

    def fail(self, *args, **kwargs):
        raise RuntimeError("struck by lightning")

    with monkeypatch.context() as patch:
        patch.setattr(_Interrupt, "on_step_end", fail)
        with pytest.raises(RuntimeError, match="lightning"):
            finetune(model, tiny_tokenizer(), TEXT, steps=2, checkpoints=tmp_path / "c", **QUICK)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not (tmp_path / "c").exists()
    tuned = finetune(model, tiny_tokenizer(), TEXT, steps=2, **QUICK)
    assert {n: p.requires_grad for n, p in tuned.named_parameters()} == before


def test_the_published_recipe():
    paper = RECIPES["paper"]
    assert (paper.rank, paper.alpha, paper.learning_rate, paper.length, paper.batch, paper.epochs) == (
        8,
        8,
        1e-3,
        1024,
        8,
        2.0,
    )


def test_bad_input_is_named(tmp_path):
    model, tokenizer = linearize_tiny(tiny(), window=8), tiny_tokenizer()
    for arguments, message in (
        (dict(text="short"), "text: expected at least one block of 512 tokens, got 5"),
        (dict(text=TEXT, recipe="fast"), "recipe: expected one of default, paper, got 'fast'"),
        (dict(text=TEXT, speed=3), "speed: unknown; expected one of"),
        (dict(text=TEXT, resume=True), "resume: expected a folder"),
        (dict(text=TEXT, resume=True, checkpoints=tmp_path), "resume: expected a checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(model, tokenizer, **arguments)
