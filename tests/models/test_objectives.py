"""What fine-tuning learns from beside the text: each loss against its definition, and the ways around the loop."""

import copy
import json
import os
import random
import signal

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from liger_layers.calls import now
from liger_models import Recipe, as_original, finetune
from liger_models._hidden import KINDS, with_hidden
from liger_models._objectives import Objective, divergence
from liger_models._training import ExactDropout, Interrupt, LigerTrainer, adapted
from liger_models.data import IGNORED, Rows, to_rows
from liger_models.recipe import read_objective
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

QUICK = dict(length=32, batch=4, warmup=1, learning_rate=3e-3, steps=4)
IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def converted(whole=None, **options):
    return linearize_tiny(copy.deepcopy(whole or tiny()), **{**dict(window=8, sinks=2), **options})


def learner(dtype=torch.double, **options):
    """An original, and what it became with adapters that say something."""
    whole = tiny().to(dtype)
    model, _ = adapted(converted(whole, **options), Recipe())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return whole, model.to(dtype).train()


def test_the_divergence_and_its_gradient():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 400, 11, dtype=torch.double) * 3, torch.randn(2, 400, 11, dtype=torch.double) * 3
    teacher[0, 3, 5], asked = -torch.inf, torch.rand(2, 400) < 0.7
    student.requires_grad_()
    wanted = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)[asked].sum()
    found = divergence(student, teacher, asked)
    grads = [torch.autograd.grad(3 * x, student)[0] for x in (wanted, found)]
    assert abs(wanted - found) <= 1e-9 and (grads[0] - grads[1]).abs().max() <= 1e-12 < grads[0].abs().max()


@pytest.mark.parametrize("options", [dict(), dict(preset="paper-gla"), dict(pattern="LFW")], ids=str)
def test_losses_are_as_they_are_defined(options):
    whole, model = learner(**options)
    mask = torch.ones_like(IDS)
    mask[1, -7:] = 0
    labels = IDS.masked_fill(mask == 0, IGNORED)
    labels[0, 5:9] = IGNORED
    inputs = dict(input_ids=IDS, attention_mask=mask, labels=labels)
    objective = Objective(dict(next=0.5, kl=2.0, match=3.0))
    total, count = objective(model, model, inputs)
    asked = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    assert count == asked.sum()
    layers = model.get_base_model().model.layers
    reads, puts = [], []
    for layer in whole.model.layers:

        def look(module, args, kwargs, out):
            reads.append((kwargs["hidden_states"], kwargs["position_embeddings"])), puts.append(out[0])

        layer.self_attn.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        teacher = whole(IDS, attention_mask=mask).logits
    student = model(input_ids=IDS, attention_mask=mask).logits
    said = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)[asked].mean()
    exact = 0 if options.get("preset") else 10
    shares = []
    for i, ((x, tables), wanted) in enumerate(zip(reads, puts, strict=True)):
        if options.get("pattern", "LLL")[i] == "F":
            continue
        given = layers[i].self_attn(x, tables, None, liger_mask=mask.bool())[0]
        rows = (mask.bool() & (torch.arange(40) >= exact)).nonzero().unbind(1)
        given, wanted = given[rows], wanted[rows]
        shares.append((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    match = torch.stack(shares).mean()
    means = objective.means()
    for name, value in dict(next=said, kl=kl, match=match).items():
        assert means[f"loss_{name}"] == pytest.approx(value.item(), rel=1e-6), name
    learning = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, learning, allow_unused=True)
    wanted = torch.autograd.grad(0.5 * said + 2 * kl + 3 * match, learning, allow_unused=True)
    # The original's positions are in single precision.
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-7))
    assert sum(x is not None and bool(x.abs().max() > 1e-6) for x in found) > 10


@pytest.mark.parametrize("recall", [0, 5])
@pytest.mark.parametrize("length", [10, 11, 12])
def test_a_row_that_hardly_leaves_the_exact_tokens_teaches_little(length, recall):
    _, model = learner(recall=recall)
    ids = IDS[:1, : length + recall]
    loss, _ = Objective(dict(match=1.0))(model, model, dict(input_ids=ids, labels=ids))
    loss.backward()
    assert (loss == 0) == (length < 12) and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_teacher_of_its_own_teaches_the_same():
    whole, found = tiny(), []
    for teacher in (None, whole):
        tuned = finetune(converted(whole), tiny_tokenizer(), TEXT, objective="kl+match", teacher=teacher, **QUICK)
        found.append(dict(tuned.named_parameters()))
    for name, parameter in found[0].items():
        assert torch.allclose(parameter, found[1][name], atol=1e-5), name


class Log(TrainerCallback):
    def __init__(self):
        self.history = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.history.append(dict(logs))


@pytest.mark.parametrize("objective", ["kl", "match"])
def test_learning_from_the_teacher_brings_the_student_closer(objective):
    draw, log = random.Random(0), Log()
    text = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ,.") for _ in range(2000))
    options = {**QUICK, "steps": 30, "learning_rate": 1e-2}
    finetune(converted(window=4), tiny_tokenizer(), text, objective=objective, callbacks=[log], **options)
    losses = [x["loss"] for x in log.history if "loss" in x]
    assert len(losses) == 3 and losses[2] < 0.9 * losses[0]


def test_routers_are_balanced_whatever_is_learned():
    for objective in ("match", "next=0.5,kl=0.5"):
        log = Log()
        model = converted(tiny(num_hidden_layers=1), memories=2)
        options = {**QUICK, "steps": 10, "batch": 2}
        finetune(model, tiny_tokenizer(), TEXT, objective=objective, callbacks=[log], **options)
        found = next(x for x in log.history if "loss_routers" in x)
        # An even router scores top_k, under a weight of 0.01.
        assert 0.0199 < found["loss_routers"] < 0.05
        weights = read_objective(objective)
        assert found["loss"] == pytest.approx(
            found["loss_routers"] + sum(weight * found[f"loss_{name}"] for name, weight in weights.items()), rel=1e-3
        )


def test_accumulated_batches_weigh_tokens_as_one_batch_does():
    """Rows of one length, of which unlike parts are learned."""
    rows = [
        {"prompt": TEXT[i : i + 31 - n], "completion": TEXT[:n]} for i, n in enumerate((2, 20, 5, 29, 11, 3, 25, 8))
    ]
    found = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        quick = {**QUICK, "batch": batch, "steps": 2}
        model = converted()
        tuned = finetune(model, tiny_tokenizer(), rows, objective="kl=1,next=0.3", accumulate=accumulate, **quick)
        found.append(torch.cat([p.flatten() for p in tuned.parameters()]))
    assert (found[0] - found[1]).abs().max() <= 2e-5 and (found[0] - found[2]).abs().max() <= 2e-5


def test_checkpointed_activations_see_the_exact_tokens_of_their_batch():
    found = []
    for checkpointing in (False, True):
        options = dict(objective="kl+match", window_dropout=1.0, recall_dropout=1.0)
        tuned = finetune(
            converted(recall=5), tiny_tokenizer(), TEXT, gradient_checkpointing=checkpointing, **options, **QUICK
        )
        found.append(torch.cat([p.flatten() for p in tuned.parameters()]))
    assert (found[0] - found[1]).abs().max() <= 1e-5


def test_exact_tokens_are_dropped_as_often_as_asked_and_by_the_place_alone(monkeypatch):
    model, seen = converted(recall=6), []
    recipe = Recipe(window_dropout=0.5, recall_dropout=0.5)
    places = [(step, batch) for step in range(200) for batch in range(2)]
    drop = ExactDropout(model, recipe, 7)
    sizes = [drop.sizes(*place) for place in places]
    assert sizes == [ExactDropout(model, recipe, 7).sizes(*place) for place in places]
    assert sizes != [ExactDropout(model, recipe, 8).sizes(*place) for place in places]
    windows, recalls = zip(*sizes, strict=True)
    for drawn, possible in ((windows, range(1, 8)), (recalls, range(6))):
        assert 160 < sum(x is not None for x in drawn) < 240
        assert {x for x in drawn if x is not None} == set(possible)
    assert 70 < sum(a is not None and b is not None for a, b in sizes) < 130
    # One share says nothing of what the other draws.
    alone = ExactDropout(model, Recipe(window_dropout=0.5), 7)
    assert [alone.sizes(*place) for place in places] == [(window, None) for window in windows]
    plain = LigerTrainer.compute_loss

    def look(self, *args, **kwargs):
        told = now(self.dropout.layers[0])
        seen.append((told.window.size, told.recall))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LigerTrainer, "compute_loss", look)
    options = dict(window_dropout=0.5, recall_dropout=0.5, accumulate=2, seed=7)
    tuned = finetune(model, tiny_tokenizer(), TEXT, **options, **QUICK)
    assert seen == [(window or 8, 6 if recall is None else recall) for window, recall in sizes[:8]]
    layer = tuned.model.layers[0].self_attn
    assert (layer.window.size, layer.recall) == (8, 6)


def test_a_run_with_everything_resumes_to_the_bit(tmp_path, monkeypatch):
    options = dict(objective="kl=1,next=0.2,match=0.1", window_dropout=0.5, recall_dropout=0.5, retrieval=0.4)
    options |= dict(accumulate=2, seed=3)
    options |= QUICK | dict(steps=6, batch=2, length=160)
    whole = finetune(converted(recall=5), tiny_tokenizer(), TEXT, **options)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    model, store = converted(recall=5), tmp_path / "checkpoints"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "on_step_begin", strike)
        with pytest.raises(KeyboardInterrupt, match="can be resumed"):
            finetune(model, tiny_tokenizer(), TEXT, checkpoints=store, **options)
    # What was interrupted is as it was, also what learned as a whole.
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert json.loads((store / "run.json").read_text())["objective"] == {"next": 0.2, "kl": 1.0, "match": 0.1}
    with pytest.raises(ValueError, match=r"objective: expected .* as in the run to resume"):
        finetune(model, tiny_tokenizer(), TEXT, checkpoints=store, resume=True, **options | dict(objective="kl"))
    resumed = finetune(model, tiny_tokenizer(), TEXT, checkpoints=store, resume=True, **options)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(
        whole.model.layers[0].self_attn.q_proj.weight, before["model.layers.0.self_attn.q_proj.weight"]
    )


def test_what_is_new_learns_in_float32_beside_a_model_in_less():
    model, seen = converted(tiny(num_hidden_layers=1), memories=2).bfloat16(), {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.update({name: p.dtype for name, p in model.named_parameters() if p.requires_grad})

    # Routers learn once the weight of their memories has left zero.
    tuned = finetune(model, tiny_tokenizer(), TEXT, objective="kl+match", callbacks=[Look()], **QUICK | dict(steps=6))
    assert set(seen.values()) == {torch.float32}
    assert {"feature_map", "mix", "router"} <= {part for name in seen for part in name.split(".")}
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert any("feature_map" in name for name in changed) and any("router" in name for name in changed)
    assert not any(m._forward_pre_hooks for name, m in tuned.named_modules() if name.endswith("router"))
    tuned(IDS)


def test_queries_and_keys_of_kept_layers_stay_when_asked():
    model = converted(keep=[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = finetune(model, tiny_tokenizer(), TEXT, freeze_kept=True, **QUICK)
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    for i in range(3):
        for name in "qkvo":
            weight = f"model.layers.{i}.self_attn.{name}_proj.weight"
            assert (weight in changed) == (i != 1 or name in "vo"), weight


def test_rows_that_ask_for_what_was_hidden():
    tokenizer, length = tiny_tokenizer("<s>"), 400
    rows = to_rows(tokenizer, TEXT * 4, length)
    found = with_hidden(tokenizer, rows, 0.5, length, 1)
    changed = [i for i in range(len(rows)) if not torch.equal(rows.ids[i], found.ids[i])]
    assert len(changed) == -(-len(rows) // 2) and found.even and len(found) == len(rows)
    assert found.digest() == with_hidden(tokenizer, rows, 0.5, length, 1).digest()
    assert found.digest() != with_hidden(tokenizer, rows, 0.5, length, 2).digest()
    for i in changed:
        ids, labels = found.ids[i], found.labels[i]
        assert len(ids) == length and ids[0] == tokenizer.bos_token_id and (labels[ids != labels] == IGNORED).all()
        # The answer ends the row, is asked for, and stood in the text.
        assert labels[-1] != IGNORED
        start = int((labels == IGNORED).nonzero().max()) + 1
        answer = ids[start:].tolist()
        earlier = ids[: start - 1].tolist()
        while answer and answer[0] == tokenizer.convert_tokens_to_ids(" "):
            answer = answer[1:]
        assert any(earlier[j : j + len(answer)] == answer for j in range(len(earlier)))


def test_every_kind_of_hidden_thing_holds_its_answers():
    for name, make in KINDS.items():
        for seed in range(50 if make else 0):
            hidden = make(random.Random(seed))
            assert hidden.asked, name
            for _, answer in hidden.asked:
                assert any(answer.strip() in fact for fact in hidden.facts), name


def test_objectives_are_read_in_several_ways():
    for given in ("kl+next", "next,kl", "kl=1,next=1.0", {"kl": 1, "next": 1}, " kl + next , match=0"):
        assert read_objective(given) == {"next": 1.0, "kl": 1.0}
    assert Recipe().objective == {"next": 1.0}


def test_bad_input_is_named():
    model, tokenizer, whole = converted(), tiny_tokenizer(), tiny()
    choices = "objective: expected a mix of next, kl, match, each alone or with =weight, got "
    for arguments, message in (
        (dict(objective="mse"), choices + "'mse'"),
        (dict(objective=""), choices + "''"),
        (dict(objective=3), choices + "3"),
        (dict(objective="kl=0"), choices + "no weight above 0"),
        (dict(objective="kl=-1"), "objective: expected a weight >= 0 of kl, got '-1'"),
        (dict(objective={"kl": float("inf")}), "objective: expected a weight >= 0 of kl, got inf"),
        (dict(objective="kl=much"), "objective: expected a weight >= 0 of kl, got 'much'"),
        (dict(objective="kl,kl=2"), "objective: expected each name once, got 'kl' twice"),
        (dict(window_dropout=1.5), "window_dropout: expected a share from 0 to 1, got 1.5"),
        (dict(recall_dropout="much"), "recall_dropout: expected a share from 0 to 1, got 'much'"),
        (dict(recall_dropout=0.5), "recall_dropout: expected layers that recall, got none in LigerLlamaForCausalLM"),
        (dict(retrieval=-0.1), "retrieval: expected a share from 0 to 1, got -0.1"),
        (dict(retrieval=0.5), "retrieval: expected longer rows, into which a question fits, got rows of 32 tokens"),
        (dict(accumulate=0), "accumulate: expected an integer >= 1, got 0"),
        (dict(freeze_kept=1), "freeze_kept: expected True or False"),
        (dict(bf16="yes"), "bf16: expected True or False"),
        (dict(freeze_kept=True), "freeze_kept: expected a linearized model in which layers stayed full attention"),
        (dict(teacher=whole), "teacher: expected an objective with kl or match in it, got next alone"),
        (
            dict(objective="kl", teacher=model),
            "teacher: expected another causal LM of transformers, got the model",
        ),
        (dict(objective="kl", teacher="big"), "teacher: expected another causal LM of transformers, got str"),
        (dict(objective="kl", teacher=tiny(vocab_size=98)), "teacher: expected a vocabulary of 97, got 98"),
        (dict(objective="match", teacher=tiny(num_hidden_layers=2)), "teacher: expected num_hidden_layers 3, to match"),
        (dict(objective="match", length=10), "length: expected rows of more than 10 tokens, beyond the exact ones"),
        (
            dict(text=["short one", "another"], retrieval=1, length=199),
            "text: expected at least .* tokens to hide something in",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace("+", r"\+")):
            finetune(model, tokenizer, **{**QUICK, "text": TEXT, **arguments})
    for arguments, message in (
        (dict(objective="match"), "objective: expected linearized layers to match, got none in a LlamaForCausalLM"),
        (dict(objective="kl"), "teacher: expected another model, where no layer was linearized, got the model itself"),
        (dict(window_dropout=0.5), "window_dropout: expected layers with a recurrence and a window of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(whole, tokenizer, TEXT, **QUICK, **arguments)
    assert not any("lora" in name for name, _ in (*model.named_parameters(), *whole.named_parameters()))
    with as_original(model):
        pass
    assert isinstance(with_hidden(tokenizer, to_rows(tokenizer, TEXT, 32), 0.0, 32, 0), Rows)
