"""Converted models with memories that erase, and with many of them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from liger_layers import load_balancing_loss
from liger_models import LigerConfig, evaluate, finetune, linearize
from liger_models.evaluation import without_recurrence
from tests.models.test_exactness import ids
from tests.models.tiny import NAMES, TEXT, checkpoint_activations, linearize_tiny, tiny, tiny_tokenizer

ERASING = ("deltanet", "gated_deltanet", "kda")


def stir(model):
    """As training would: routed memories count, and are not alike."""
    with torch.no_grad():
        for layer in model.model.layers:
            # A layer that only slides, or stayed, has none.
            memories = getattr(layer.self_attn, "memories", None)
            if memories is None:
                continue
            memories.mix.weight.uniform_(0.5, 1.0)
            for projection in (memories.k_proj, memories.v_proj):
                projection.weight.add_(0.3 * torch.randn_like(projection.weight))
    return model


@torch.no_grad()
@pytest.mark.parametrize("gate", ["gated_retention", "gla", *ERASING])
@pytest.mark.parametrize("name", NAMES)
def test_before_training_four_memories_are_as_good_as_one(name, gate):
    x = ids(2, 40)
    one = linearize_tiny(tiny(name), window=8, gate=gate)(x).logits
    model = linearize_tiny(tiny(name), window=8, gate=gate, memories=4, top_k=2)
    assert (model(x).logits - one).abs().max() <= 1e-4
    assert (stir(model)(x).logits - one).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_memory_starts_from_the_pretrained_keys_and_values(name):
    original = tiny(name)
    attention = linearize_tiny(tiny(name), window=8, memories=3).model.layers[1].self_attn
    pretrained = original.model.layers[1].self_attn
    for n, channels in (("k_proj", slice(48, 72)), ("v_proj", slice(72, 96))):
        fused, new = getattr(pretrained, "qkv_proj", None), getattr(attention.memories, n)
        old = getattr(pretrained, n).weight if fused is None else fused.weight[channels]
        assert all(torch.equal(part, old) for part in new.weight.chunk(3))
        bias = None if fused is not None else getattr(pretrained, n).bias
        assert bias is None or all(torch.equal(part, bias) for part in new.bias.chunk(3))


@pytest.mark.parametrize(
    "options", [dict(gate=gate) for gate in ERASING] + [dict(memories=4), dict(memories=2, top_k=1)]
)
def test_backward_generate_and_reload(options, tmp_path):
    model = linearize_tiny(tiny(), window=8, **options)
    model = stir(model) if "memories" in options else model
    x = ids(2, 30)
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.zero_grad()
    wanted = model.generate(x, max_new_tokens=6, num_beams=3, do_sample=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert LigerConfig(**again.config.liger) == LigerConfig(**model.config.liger)
    assert torch.equal(again.generate(x, max_new_tokens=6, num_beams=3, do_sample=False), wanted)
    for (n, a), (m, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert n == m and torch.equal(a, b)


def test_routers_tell_what_they_did():
    model = stir(linearize_tiny(tiny(), window=8, memories=3))
    x, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    plain = model(x, attention_mask=mask, labels=x)
    out = model(x, attention_mask=mask, labels=x, output_router_logits=True)
    assert [tuple(y.shape) for y in out.router_logits] == [(40, 3)] * 3
    wanted = load_balancing_loss(out.router_logits, 2, mask.bool())
    assert torch.allclose(out.aux_loss, wanted)
    assert torch.allclose(out.loss, plain.loss + 0.01 * wanted) and torch.equal(out.logits, plain.logits)
    (grad,) = torch.autograd.grad(out.aux_loss, model.model.layers[0].self_attn.memories.router.weight)
    assert grad.abs().max() > 0
    assert "aux_loss" not in linearize_tiny(tiny(), window=8)(x, output_router_logits=True)


def test_no_layer_left_to_route():
    model = linearize_tiny(tiny(), memories=2, keep=[0, 1, 2])
    assert "aux_loss" not in model(ids(1, 9), output_router_logits=True)
    finetune(model, tiny_tokenizer(), TEXT, steps=1, length=32)


def test_routers_of_several_threads_do_not_mix():
    model = stir(linearize_tiny(tiny(), window=8, memories=3))

    def call(n):
        with torch.no_grad():
            return [len(x) for x in model(ids(1, 10 + n), output_router_logits=True).router_logits]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(12))) == [[10 + n] * 3 for n in range(12)]


def test_no_rows_route_nothing():
    out = linearize_tiny(tiny(), window=8, memories=3)(ids(2, 9)[:0], output_router_logits=True)
    assert out.aux_loss == 0 and out.logits.shape[0] == 0


def test_a_router_that_nobody_could_train_says_so():
    model = linearize_tiny(tiny(), window=8, memories=3).train()
    checkpoint_activations(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="aux_loss: expected non-reentrant gradient checkpointing"):
        model(ids(1, 9), output_router_logits=True)


def test_fine_tuning_drives_memories_apart():
    torch.manual_seed(0)
    model = linearize_tiny(tiny(scale=1.0), window=8, memories=3)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    assert all("output_router_logits" not in part for part in (vars(model.config), model.config.to_dict()))
    finetune(model, tiny_tokenizer(), TEXT, steps=3, length=32, batch=2, learning_rate=1e-2, warmup=0)
    for i, layer in enumerate(model.model.layers):
        memories = layer.self_attn.memories
        prefix = f"model.layers.{i}.self_attn.memories."
        for name in ("router.weight", "mix.weight", "k_proj.weight", "v_proj.weight"):
            assert not torch.equal(memories.get_parameter(name), before[prefix + name]), name
        assert not torch.equal(*memories.v_proj.weight.chunk(3)[:2])
    assert "output_router_logits" not in model.config.to_dict()
    model.config.output_router_logits = False
    finetune(model, tiny_tokenizer(), TEXT, steps=1, length=32)
    assert model.config.output_router_logits is False


def test_the_window_alone_is_without_memories_too():
    model = stir(linearize_tiny(tiny(), window=8, memories=2))
    x = ids(1, 30)
    with torch.no_grad(), without_recurrence(model):
        alone = model(x).logits
    silent = linearize_tiny(tiny(), window=8, mix=0.0)
    assert (silent(x).logits - alone).abs().max() <= 1e-5
    assert (model(x).logits - alone).abs().max() > 1e-3
    figures = evaluate(model, tiny_tokenizer(), TEXT, length=32, max_blocks=2)
    assert figures["perplexity"] != figures["perplexity_window_only"]


@torch.no_grad()
def test_padding_reaches_no_memory():
    model = stir(linearize_tiny(tiny(), window=8, memories=3))
    x = ids(1, 25)
    padded = torch.cat([torch.randint(3, 97, (1, 9)), x], 1)
    mask = (torch.arange(34) >= 9).long().unsqueeze(0)
    assert (model(padded, attention_mask=mask).logits[:, 9:] - model(x).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(memories=2, top_k=3), "top_k: expected an integer from 1 to 2 memories, got 3"),
        (dict(memories=-1), "memories: expected an integer >= 0, got -1"),
        (dict(memories=2, top_k=0), "top_k: expected an integer >= 1, got 0"),
        (dict(gate="kda", mixing="joint"), "mixing: expected 'sum' with gate 'kda'"),
        (dict(router_aux_loss_coef=-1.0), "router_aux_loss_coef: expected a weight >= 0"),
    ],
)
def test_bad_options_leave_the_model_alone(options, message):
    model = tiny()
    kind = type(model)
    with pytest.raises(ValueError, match=message):
        linearize(model, **options)
    assert type(model) is kind


def test_routers_in_a_tuple():
    model, x = linearize_tiny(tiny(), window=8, memories=2), ids(1, 12)
    out = model(x, labels=x, output_router_logits=True)
    same = model(x, labels=x, output_router_logits=True, return_dict=False)
    assert isinstance(same, tuple) and torch.equal(same[0], out.loss) and len(same) == len(out.to_tuple())
