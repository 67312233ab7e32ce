"""LoRA fine-tuning learns, checkpoints gradients, resumes after Ctrl-C, and refuses nonsense."""

import functools
import os
import signal

import peft
import pytest
import torch
from transformers import TrainerCallback

from liger_models import LigerForCausalLM, LigerModelConfig, checkpoint, evaluate, finetune
from liger_models._training import Interrupt
from liger_models.recipe import RECIPES
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


@pytest.mark.parametrize(
    ("options", "recipe", "idle"),
    [
        (dict(recall=30), {}, True),
        (dict(recall=30), dict(window_dropout=1.0, recall_dropout=1.0), False),
        (dict(recall=5), {}, False),
        (dict(window=40, preset="paper-gla"), {}, False),
    ],
    ids=str,
)
def test_rows_that_are_exact_as_a_whole_are_said_to_teach_recurrences_nothing(options, recipe, idle, caplog):
    model = linearize_tiny(tiny(scale=1.0), **{"window": 8, **options})
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "mix" in n or "q_proj" in n}
    tuned = dict(finetune(model, tiny_tokenizer(), TEXT, steps=2, **QUICK, **recipe).named_parameters())
    assert ("recurrences learn nothing" in caplog.text) == idle
    changed = {n for n, p in before.items() if not torch.equal(p, tuned[n])}
    assert any("q_proj" in n for n in changed)
    if "preset" not in options:
        assert any("mix" in n for n in changed) != idle


def test_memories_from_random_weights_learn_to_route():
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    options = {"mom": {"router_shift": True}}
    model = LigerForCausalLM(LigerModelConfig(mixers=["mom", "mixer:gla"], mixer_options=options, **sizes))
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
        patch.setattr(Interrupt, "on_step_begin", strike)
        with pytest.raises(KeyboardInterrupt, match="can be resumed"):
            finetune(linearize_tiny(tiny(), window=8), tiny_tokenizer(), TEXT, steps=8, checkpoints=store, **QUICK)
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(p.name for p in store.iterdir()) == ["checkpoint-3", "run.json"]
    for changes, message in (
        (dict(steps=8), "holds an interrupted run"),
        (dict(steps=9, resume=True), "steps: expected 8, as in the run to resume, got 9"),
        # As many rows of other text.
        (dict(steps=8, resume=True, text=TEXT.upper()), "text: expected '84 rows, sha256 .*', as in the run to resume"),
    ):
        arguments = dict(text=TEXT, checkpoints=store) | changes | QUICK
        with pytest.raises(ValueError, match=message):
            finetune(linearize_tiny(tiny(), window=8), tiny_tokenizer(), **arguments)
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
        patch.setattr(Interrupt, "on_step_end", fail)
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
        (dict(text=TEXT, length=32, eval_steps=0, eval_text=TEXT), "eval_steps: expected an integer >= 1, got 0"),
        (dict(text=TEXT, length=32, eval_steps=2), "eval_steps: expected an eval_text to measure, got none"),
        (dict(text=TEXT, length=32, eval_text="short"), "eval_text: expected at least one block of 32 tokens, got 5"),
        (dict(text=TEXT, length=32, report_to="tensorboard"), "report_to: expected a folder of checkpoints"),
        (dict(text=TEXT, length=32, report_to="nowhere"), "nowhere is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(model, tokenizer, **arguments)
    assert not any("lora" in name for name, _ in model.named_parameters())


class Log(TrainerCallback):
    """What the Trainer has logged."""

    def on_log(self, args, state, control, **kwargs):
        self.history = list(state.log_history)


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_losses_on_held_out_rows_are_those_of_perplexity(name):
    """Rows of unlike lengths, of which a part is learned; measured every two steps and at the end."""
    model, tokenizer, log = linearize_tiny(tiny(name), window=8, memories=2), tiny_tokenizer(), Log()
    rows = [{"prompt": TEXT[i : i + 3 * i], "completion": TEXT[:i]} for i in (3, 5, 2)]
    model.config.output_router_logits = True
    before = evaluate(model, tokenizer, rows, length=32)["perplexity"]
    tuned = finetune(
        model, tokenizer, TEXT, steps=3, eval_text=rows, eval_steps=2, callbacks=[log], **(QUICK | dict(batch=1))
    )
    found = [(x["step"], x["eval_perplexity"], x["eval_loss"]) for x in log.history if "eval_loss" in x]
    assert [step for step, *_ in found] == [2, 3]
    figures = evaluate(tuned, tokenizer, rows, length=32)
    assert figures["tokens"] == 13 and found[-1][1] == pytest.approx(figures["perplexity"], rel=1e-4) != before
    assert found[-1][2] == pytest.approx(torch.tensor(figures["perplexity"]).log().item(), abs=1e-4)


def test_adapters_that_are_not_merged_are_saved_alone_and_come_back(tmp_path):
    model = linearize_tiny(tiny(), window=8, sinks=2)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "base")
    tuned = finetune(model, tiny_tokenizer(), TEXT, steps=4, merge=False, **QUICK)
    assert isinstance(tuned, peft.PeftModel) and not tuned.training
    with checkpoint.quiet_peft():
        tuned.save_pretrained(tmp_path / "adapters")
    size = sum(p.stat().st_size for p in (tmp_path / "adapters").glob("*.safetensors"))
    assert size < 0.7 * (tmp_path / "base" / "model.safetensors").stat().st_size
    x = ids(2, 40)
    with torch.no_grad():
        wanted = tuned(x).logits
        again = linearize_tiny(tiny(), window=8, sinks=2)
        assert all(torch.equal(p, base[n]) for n, p in again.named_parameters())
        plain = again(x).logits
        with checkpoint.quiet_peft():
            again = peft.PeftModel.from_pretrained(again, tmp_path / "adapters").eval()
        assert (again(x).logits - wanted).abs().max() <= 1e-6 < (plain - wanted).abs().max()
        assert (tuned.merge_and_unload()(x).logits - wanted).abs().max() <= 1e-4
    assert evaluate(again, tiny_tokenizer(), TEXT, length=32, max_blocks=2)["perplexity_window_only"] > 1


def test_conversations_of_unlike_lengths_teach_their_answers():
    template = "{% for m in messages %}{{ m.role[0] + m.content + '</s>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}a{% endif %}"
    model, tokenizer = linearize_tiny(tiny(scale=1.0), window=8, sinks=2), tiny_tokenizer("<s>", chat_template=template)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": q[-1] * 6}]}
        for q in ("xa", "yyb", "zc", "wwwwd", "e", "uuuuuuuuf")
    ]
    before = evaluate(model, tokenizer, rows, length=32)
    assert before["tokens"] == 6 * 7
    tuned = finetune(model, tokenizer, rows, steps=60, **(QUICK | dict(learning_rate=1e-2, batch=6)))
    assert evaluate(tuned, tokenizer, rows, length=32)["perplexity"] < 0.5 * before["perplexity"]


def test_adapters_never_name_a_model_that_holds_other_weights(tmp_path):
    tiny().save_pretrained(tmp_path / "plain"), tiny_tokenizer().save_pretrained(tmp_path / "plain")
    model, tokenizer = checkpoint.load(tmp_path / "plain")
    tuned = finetune(linearize_tiny(model, window=8), tokenizer, TEXT, steps=1, merge=False, **QUICK)
    with checkpoint.quiet_peft():
        tuned.save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="model: expected adapters that name their model"):
        checkpoint.load(tmp_path / "adapters")
    with pytest.raises(ValueError, match="model: expected a causal LM of transformers, adapters merged"):
        finetune(tuned, tokenizer, TEXT, steps=1, **QUICK)


@pytest.mark.parametrize(("objective", "teacher"), [("next", False), ("kl=1,next=0.5", False), ("kl", True)])
def test_bf16_multiplies_in_bfloat16_on_weights_that_stay(objective, teacher):
    tuned, products = {}, {}
    for bf16 in (False, True):
        model = linearize_tiny(tiny(scale=1.0), window=8, sinks=2, recall=3)
        other = tiny(scale=1.5) if teacher else None
        products[bf16] = set()
        for name, part in (("student", model), ("teacher", other)):
            if part is not None:
                note = functools.partial(
                    lambda seen, name, m, a, out: seen.add((name, out.dtype)), products[bf16], name
                )
                part.model.layers[0].mlp.up_proj.register_forward_hook(note)
        recipe = dict(objective=objective, teacher=other, bf16=bf16, steps=8)
        tuned[bf16] = finetune(model, tiny_tokenizer(), TEXT, **{**QUICK, **recipe})
        assert {p.dtype for p in tuned[bf16].parameters()} == {torch.float32}
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        assert {d for _, d in products[bf16]} == {dtype}
        assert {n for n, _ in products[bf16]} == ({"student", "teacher"} if teacher else {"student"})
    before = linearize_tiny(tiny(scale=1.0), window=8, sinks=2, recall=3).state_dict()
    moved = [
        torch.cat([(p - before[n]).flatten() for n, p in tuned[bf16].named_parameters() if "v_proj" in n])
        for bf16 in (False, True)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9 and not torch.equal(*moved)
