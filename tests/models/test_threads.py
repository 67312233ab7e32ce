"""What one thread asks of a model, others on the same model do not notice."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from liger_layers import Mix
from liger_layers.calls import now, with_window
from liger_models import as_original, evaluate, measure_variants, retrieval
from liger_models.generation import continued, evaluating, without_settings
from liger_models.variants import VARIANTS, window_alone, without_recurrence
from tests.models.misuse import IDS, adapted, make
from tests.models.tiny import TEXT, checkpoint_activations, tiny_tokenizer

QUICK = dict(length=32, max_blocks=1)


def model_with_settings():
    """Its own way to generate is not that of a measurement."""
    model = make(memories=2)
    for module in model.modules():
        if isinstance(module, Mix):
            module.weight.fill_(0.7)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.pad_token_id = 0
    return model


def quiet_calls(model):
    """Calls by name, that see the model as it is."""
    ways = [model, VARIANTS["no_recall"], VARIANTS["window"], without_recurrence]
    found = {"plain": lambda: model(IDS, use_cache=False).logits}
    found["generate"] = lambda: model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for way in ways[1:]:

        def inside(way=way):
            with way(model):
                return model(IDS, use_cache=False).logits

        found[way.__name__] = inside

    def taught():
        with as_original(model):
            return model(IDS).logits

    return found | {"original": taught}


def noisy_calls(model):
    """What measures a model, and all that it switches."""
    tokenizer = tiny_tokenizer()
    yield lambda: evaluate(model, tokenizer, TEXT, **QUICK)
    yield lambda: retrieval(model, tokenizer, TEXT, 64, depths=1)
    yield lambda: measure_variants(model, tokenizer, TEXT, **QUICK, figures=["perplexity"])


def bits_of(model, threads, calls, progress=lambda: None):
    """How many of so many calls in each of so many threads, measurements among them, gave other bits than alone."""
    quiet, noisy = quiet_calls(model), list(noisy_calls(model))
    with torch.no_grad():
        wanted = {name: call() for name, call in quiet.items()}
        measured = [{k: v for k, v in call().items() if k != "variants"} if i != 1 else call()
                    for i, call in enumerate(noisy)]  # fmt: skip
    start = threading.Barrier(threads)

    @torch.no_grad()
    def work(number):
        start.wait()
        other = 0
        for i in range(calls):
            if number == 0:
                which = i % len(noisy)
                found = noisy[which]()
                found = found if which == 1 else {k: v for k, v in found.items() if k != "variants"}
                other += found != measured[which]
            else:
                name = list(wanted)[(i + number) % len(wanted)]
                other += not torch.equal(quiet[name](), wanted[name])
            progress()
        return other

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def test_others_get_the_same_bits_beside_an_evaluation():
    model = model_with_settings()
    assert bits_of(model, 4, 30) == 0
    assert not any(module.training for module in model.modules()) and model.generation_config.repetition_penalty == 5.0


def test_what_is_told_is_told_to_one_thread_and_nothing_stays_on_modules():
    model = make()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    layer = model.model.layers[0].self_attn
    with window_alone(model), with_window([layer], 3), ThreadPoolExecutor(1) as pool:
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
        assert (now(layer).recall, now(layer).window.size) == (0, 3)
        there = pool.submit(now, layer).result()
        assert (there.recall, there.window.size) == (3, 8)
        # torch.nn.DataParallel copies modules and runs them in other threads.
        replica = layer._replicate_for_data_parallel()
        assert (replica.recall, replica.window.size, replica.full) == (0, 3, False)
        assert layer.mix._replicate_for_data_parallel().told == 0.0
    assert (now(layer).recall, now(layer).window.size) == (3, 8)


def test_a_model_learns_again_when_the_last_evaluation_is_over():
    model = make().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model.model):
        second = evaluating(model)
        second.__enter__()
    assert not any(module.training for module in model.model.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == before


def test_settings_are_left_out_of_a_call_and_stay_on_the_model():
    model = model_with_settings()
    tuned = adapted(model)
    asked = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    model.generation_config.repetition_penalty = None
    wanted = continued(tuned, IDS, **asked)
    model.generation_config.repetition_penalty = 5.0
    settings = model.generation_config
    for one in (tuned, model, torch.compile(model, backend="eager")):
        plain = without_settings(one)
        assert plain.generation_config.repetition_penalty is None
        assert torch.equal(continued(plain, IDS, **asked), wanted)
        assert model.generation_config is settings and not torch.equal(continued(one, IDS, **asked), wanted)


@pytest.mark.parametrize("window", [None, 3])
def test_checkpointing_computes_again_as_it_was_told(window):
    """On a GPU in a thread of autograd; here in any other, and under another window."""
    model = make().train().requires_grad_(True)
    checkpoint_activations(model, use_reentrant=False)
    layers = [layer.self_attn for layer in model.model.layers]

    def gradient(elsewhere):
        model.zero_grad()
        with with_window(layers, window or 8):
            loss = model(IDS, labels=IDS).loss
        if elsewhere:
            with ThreadPoolExecutor(1) as pool, with_window(layers, 5):
                pool.submit(loss.backward).result()
        else:
            with with_window(layers, window or 8):
                loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    assert torch.equal(gradient(True), gradient(False))
