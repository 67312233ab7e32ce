"""LigerForCausalLM: every mixer trains, reloads, decodes as it prefills, and refuses what cannot be."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from liger_layers import load_balancing_loss
from liger_layers.recurrences import with_rule
from liger_models import LigerForCausalLM, LigerModelConfig, cache_bytes, make_cache
from liger_models._inputs import CACHE
from tests.models.tiny import checkpoint_activations

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    mixer_options={name: {"window": 8, "sinks": 2} for name in ("liger", "window")},
)
MIXERS = [*(f"mixer:{rule}" for rule in with_rule()), "mom", "liger", "window", "recurrence", ["mom", "window"]]
FEW = ["mixer:gla", "mixer:gated_deltanet", "mom", ["liger", "window"]]
WITH_MLP = [*((mixers, "dense") for mixers in FEW), ("mom", "moe")]


def build(mixers="mom", **changes) -> LigerForCausalLM:
    torch.manual_seed(0)
    return LigerForCausalLM(LigerModelConfig(**{**SIZES, "mixers": mixers, **changes})).eval()


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 61, (rows, tokens))


def gradients(model, x, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x, labels=x, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("mixers", MIXERS, ids=str)
def test_every_mixer_trains_and_every_parameter_learns(mixers):
    model = build(mixers).train()
    found = gradients(model, ids(2, 40))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == learning
    assert all(torch.isfinite(g).all() for g in found.values())
    # A head's decay or a router may rest on few tokens; a mixer whose gradients all vanish is not wired in.
    assert all(found[f"model.layers.{i}.mixer.{p}_proj.weight"].abs().max() > 0 for i in (0, 1) for p in "qvo")


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS, ids=str)
def test_prefill_in_pieces_and_decode_equal_one_forward(mixers):
    model, x = build(mixers), ids(2, 37)
    whole = model(x, use_cache=False).logits
    cache, parts = make_cache(model.config), []
    for part in x.split((20, 13, 1, 1, 1, 1), 1):
        parts.append(model(part, **{CACHE: cache}).logits)
    assert difference(torch.cat(parts, 1), whole) <= 1e-3 * whole.std()
    assert cache.get_seq_length() == 37


@torch.no_grad()
@pytest.mark.parametrize(("mixers", "mlp"), [*((mixers, "dense") for mixers in MIXERS), ("mom", "moe")], ids=str)
def test_save_and_reload_bit_for_bit(mixers, mlp, tmp_path):
    options = {"mom": {"router_shift": True}} if mixers == "mom" else None
    model, x = build(mixers, mlp=mlp, mixer_options=options), ids(2, 20)
    # Starting values would hide a loader that starts anew.
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is LigerForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    mine, its = model.state_dict(), again.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    assert torch.equal(again(x).logits, model(x).logits)


def test_mixers_start_where_their_classes_start(tmp_path):
    shift = {"mom": {"router_shift": True}}
    model = build(["mixer:gated_deltanet", "mixer:rwkv6", "mom", "liger"], num_hidden_layers=4, mixer_options=shift)

    def check(model):
        first, second, third, fourth = (layer.mixer for layer in model.model.layers)
        for mixer in (first, second, third):
            starts = torch.tensor(mixer.update.starts(mixer.sizes))
            assert starts.abs().max() > 0
            assert torch.equal(mixer.gate_proj.bias, starts.repeat(len(mixer.gate_proj.bias) // len(starts)))
            for name, start in mixer.update.parameters.items():
                assert torch.equal(mixer.rule_parameters[name], start(mixer.sizes))
            bound = mixer.convolution.weight.shape[0] ** -0.5
            assert 0.8 * bound < mixer.convolution.weight.abs().max() <= bound
            assert abs(mixer.q_proj.weight.std() - 0.2) < 0.02
        assert third.router_gate.bias == -2 and not third.router_gate.weight.any()
        assert torch.equal(fourth.mix.weight, torch.ones(4))
        assert torch.equal(second.norm.weight, torch.ones(8))

    check(model)
    # A checkpoint without the mixers: they must start, not hold whatever memory held.
    kept = {name: value for name, value in model.state_dict().items() if ".mixer." not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    check(AutoModelForCausalLM.from_pretrained(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("mixers", FEW, ids=str)
def test_left_padding_changes_no_real_token(mixers):
    model, x = build(mixers), ids(2, 30)
    mask = torch.ones_like(x)
    mask[1, :11] = 0
    alone = model(x[1:, 11:], use_cache=False).logits[0]
    scale = 1e-3 * alone.std()
    assert difference(model(x, attention_mask=mask, use_cache=False).logits[1, 11:], alone) <= scale
    cache = make_cache(model.config)
    steps = [model(x[:, :25], attention_mask=mask[:, :25], **{CACHE: cache}).logits]
    steps += [model(x[:, t : t + 1], attention_mask=mask[:, : t + 1], **{CACHE: cache}).logits for t in range(25, 30)]
    assert difference(torch.cat(steps, 1)[1, 11:], alone) <= scale


@pytest.mark.parametrize("mixers", FEW, ids=str)
def test_generation_equals_recomputing_everything(mixers):
    model, x = build(mixers), ids(2, 12)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    options = dict(attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    for beams in (1, 3):
        kept = model.generate(x, num_beams=beams, **options)
        assert kept.shape == (2, 22)
        assert torch.equal(kept, model.generate(x, num_beams=beams, use_cache=False, **options))
    alone = model.generate(x[:1, 5:], max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert torch.equal(alone[0, 7:], model.generate(x, **options)[0, 12:])


@torch.no_grad()
@pytest.mark.parametrize("mixers", FEW, ids=str)
def test_cache_bytes_do_not_grow(mixers):
    model, sizes = build(mixers), []
    for tokens in (3, 300):
        cache = model(ids(1, tokens), use_cache=True)[CACHE]
        for _ in range(3):
            model(ids(1, 1), **{CACHE: cache})
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1] > 0
    assert model(ids(1, 3), use_cache=False).get(CACHE) is None


@pytest.mark.parametrize(("mixers", "mlp"), WITH_MLP, ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(mixers, mlp):
    model, x = build(mixers, mlp=mlp, router_aux_loss_coef=0.5).train(), ids(2, 20)
    plain = gradients(model, x, output_router_logits=True)
    checkpoint_activations(model)
    runs = []
    model.model.layers[0].mixer.register_forward_hook(lambda *a: runs.append(1))
    again = gradients(model, x, output_router_logits=True)
    assert len(runs) == 2
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("options", [dict(), dict(mixers="mixer:gla", mlp="moe")], ids=str)
def test_a_router_that_nobody_could_train_says_so(options):
    model, x = build(**options).train(), ids(2, 9)
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(RuntimeError, match="aux_loss: expected non-reentrant gradient checkpointing"):
        model(x, labels=x, output_router_logits=True)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    assert model(x, labels=x, output_router_logits=True).loss.requires_grad


@pytest.mark.parametrize("mlp", ["dense", "moe"])
def test_router_logits_and_their_loss(mlp):
    model, x = build(["mom", "mixer:gla", "mom"], num_hidden_layers=3, mlp=mlp, memories=5, num_experts=6), ids(2, 15)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    inputs = {}
    for i in (0, 2):
        router = model.model.layers[i].mixer.router
        router.register_forward_hook(lambda m, a, out, i=i: inputs.update({i: out}))
    out = model(x, attention_mask=mask, labels=x, output_router_logits=True)
    assert len(out.router_logits) == 2
    assert all(torch.equal(a, inputs[i]) and a.shape == (30, 5) for a, i in zip(out.router_logits, (0, 2), strict=True))
    balance = load_balancing_loss(out.router_logits, 2, mask)
    if mlp == "dense":
        assert torch.equal(out.aux_loss, balance)
    else:
        assert out.aux_loss > balance + 1
    plain = model(x, attention_mask=mask, labels=x)
    assert plain.aux_loss is None and plain.router_logits is None
    coefficient = model.config.router_aux_loss_coef
    assert abs(out.loss - plain.loss - coefficient * out.aux_loss) <= 1e-5
    model.config.output_router_logits = True
    assert torch.equal(model(x, attention_mask=mask, labels=x).loss, out.loss)
    assert build("mixer:gla")(x, labels=x, output_router_logits=True).aux_loss is None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_on_every_linear_leave_the_routers_logits_whole():
    model, x = build(), ids(2, 15)
    wanted = model(x, labels=x, output_router_logits=True)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2))
    got = tuned(input_ids=x, labels=x, output_router_logits=True)
    assert len(got.router_logits) == 2 and torch.equal(got.aux_loss, wanted.aux_loss)
    with torch.no_grad():
        model.model.layers[0].mixer.router.lora_B["default"].weight.normal_()
    assert (tuned(input_ids=x, output_router_logits=True).router_logits[0] - wanted.router_logits[0]).abs().max() > 0.1


def test_trainer_evaluates(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids(3, 9).tolist()]
    options = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    model = build()
    loss = Trainer(model, options, eval_dataset=rows).evaluate()["eval_loss"]
    x = torch.tensor([row["input_ids"] for row in rows])
    assert abs(loss - model(x, labels=x).loss.item()) <= 1e-5


def test_nothing_new_after_a_cache():
    model, x = build(), ids(2, 8)
    cache = model(x, use_cache=True)[CACHE]
    out = model(x[:, :0], attention_mask=torch.ones_like(x), **{CACHE: cache})
    assert out.logits.shape == (2, 0, 61) and cache.get_seq_length() == 8


def test_the_balancing_loss_reaches_the_router():
    x = ids(2, 15)
    with_, without = (
        gradients(build(memories_per_token=1, router_aux_loss_coef=c), x, output_router_logits=True) for c in (1.0, 0.0)
    )
    name = "model.layers.0.mixer.router.weight"
    assert with_[name].abs().max() > 100 * without[name].abs().max()


@pytest.mark.parametrize(("mixers", "mlp"), WITH_MLP, ids=str)
def test_a_few_steps_reduce_the_loss(mixers, mlp):
    model, x = build(mixers, mlp=mlp, output_router_logits=True).train(), ids(4, 24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(12):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixers="mamba3"), "mixers: expected names of liger, recurrence, mixer, mom, window, got 'mamba3'"),
        (
            dict(mixers=["mixer:gla", "mom", "mixer:gla"]),
            r"mixers: expected a name, or names that repeat to num_hidden_layers 2, got",
        ),
        (dict(mixers=[]), "mixers: expected a name, or names that repeat"),
        (dict(mlp="none"), "mlp: expected one of dense, moe, got 'none'"),
        (dict(hidden_size=30), "hidden_size: expected a multiple of num_attention_heads 4 without head_dim, got 30"),
        (dict(num_key_value_heads=3), "num_attention_heads: expected a multiple of num_key_value_heads 3, got 4"),
        (dict(num_hidden_layers=0), "num_hidden_layers: expected an integer >= 1, got 0"),
        (
            dict(mlp="moe", num_experts=2, experts_per_token=3),
            "experts_per_token: expected at most num_experts 2, got 3",
        ),
        (dict(memories_per_token=5), "memories_per_token: expected at most memories 4, got 5"),
        (dict(memories=0), "memories_per_token: expected 1 without memories, got 2"),
        (dict(memories_per_token=0), "memories_per_token: expected an integer >= 1, got 0"),
        (dict(memories=-5, mixers="mixer:gla"), "memories: expected an integer >= 0, got -5"),
        (dict(mixers=None), "mixers: expected a name, or names that repeat to num_hidden_layers 2, got None"),
        (dict(mixers=[3]), "mixers: expected names of liger, .*got 3"),
        (dict(mlp=["moe"]), "mlp: expected one of dense, moe, got"),
        (dict(hidden_act="nope"), "hidden_act: expected one of .*silu.*got 'nope'"),
        (dict(hidden_size=None), "hidden_size: expected an integer >= 1, got None"),
        (dict(intermediate_size=0), "intermediate_size: expected an integer >= 1, got 0"),
        (dict(num_key_value_heads=0), "num_key_value_heads: expected an integer >= 1, got 0"),
        (dict(head_dim=0), "head_dim: expected an integer >= 1, got 0"),
        (dict(pad_token_id=61), "pad_token_id: expected an id below vocab_size 61, got 61"),
        (dict(initializer_range=-1), "initializer_range: expected a number >= 0, got -1"),
        (dict(router_aux_loss_coef="a"), "router_aux_loss_coef: expected a number >= 0, got 'a'"),
        (dict(mixer_options=["mom"]), "mixer_options: expected a dict of dicts"),
        (dict(mixer_options={"mom": None}), "mixer_options: expected a dict of dicts"),
        (dict(mixer_options={"mom": {"rule": "gsa", "slots": 0}}), "slots: expected an integer >= 1, got 0"),
        (dict(mixer_options={"mom": {"rule": ["gla"]}}), r"rule: expected one of gla, .*got \['gla'\]"),
        (dict(mixer_options={"mom": {"shared": "no"}}), "shared: expected True or False, got 'no'"),
        (dict(mixers="window", mixer_options={"window": {"window": "a"}}), "window: expected an integer >= 1, got 'a'"),
        (dict(mixer_options={"mom": {"router_shift": 1}}), "router_shift: expected True or False, got 1"),
        (
            dict(mixer_options={"mixer:gla": {"top_k": 2}}),
            "expected one of value_dim, slots, got 'top_k'",
        ),
        (dict(mixer_options={"mamba3": {}}), "mixer_options: expected names of liger, .*got 'mamba3'"),
        (
            dict(mixer_options={"mixer:gla": {"rule": "linear"}}),
            r"mixer_options\['mixer:gla'\]: expected one of value_dim, slots, got 'rule'",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_what_forward_refuses():
    model, x = build(), ids(2, 8)
    for kwargs, message in (
        (dict(), "input_ids, inputs_embeds: expected one of the two, got none"),
        (dict(input_ids=x, inputs_embeds=torch.zeros(2, 8, 32)), "expected one of the two, got both"),
        (
            dict(input_ids=x, attention_mask=torch.ones(2, 9)),
            r"attention_mask: expected \[batch, tokens\] = \[2, 8\], .*, got",
        ),
        (
            dict(input_ids=x, position_ids=torch.tensor([[0, 1, 2, 3, 1, 2, 3, 4]])),
            "position_ids: expected 0 where each of several documents",
        ),
        (dict(input_ids=x, cu_seq_lens_q=torch.tensor([0, 3, 8])), "cu_seq_lens_q: expected integer bounds that rise"),
        (dict(input_ids=x, seq_idx=torch.arange(8) // 5), r"seq_idx: expected integers \[2, 8\], got \[8\]"),
        (dict(inputs_embeds=torch.zeros(2, 8, 31)), r"inputs_embeds: expected \[batch, tokens, 32\], got \(2, 8, 31\)"),
        (dict(input_ids=x[0]), r"input_ids: expected \[batch, tokens\], got \(8,\)"),
        ({"input_ids": x, CACHE: ((x, x),)}, f"{CACHE}: expected a Cache, got a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**kwargs)


def test_a_model_saved_when_rules_stood_alone_still_loads(tmp_path):
    build(["mixer:gla", "window"], mixer_options={"mixer:gla": {"value_dim": 8}}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("mixer:gla", "gla"))
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.mixers == ["mixer:gla", "window"] and config.mixer_options == {"mixer:gla": {"value_dim": 8}}
