"""Generation through transformers: beams, sampling, multi-turn caches, constant memory, refusals."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from liger_models import cache_bytes, linearize, make_cache
from liger_models._inputs import CACHE
from tests.models.test_exactness import ids
from tests.models.tiny import NAMES, SIZES, linearize_tiny, tiny


@pytest.fixture(params=NAMES)
def model(request):
    return linearize_tiny(tiny(request.param), window=8, sinks=2)


def generate(model, x, **options):
    return model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=20, eos_token_id=None, **options)


def test_greedy_equals_recomputing_everything(model):
    x = ids(2, 15)
    wanted = x
    with torch.no_grad():
        for _ in range(20):
            wanted = torch.cat([wanted, model(wanted, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, x, do_sample=False), wanted)


def test_beam_search_equals_beam_search_without_a_cache(model):
    x = ids(2, 12)
    kept = generate(model, x, num_beams=3, do_sample=False)
    assert torch.equal(kept, generate(model, x, num_beams=3, do_sample=False, use_cache=False))


def test_sampling_is_reproducible_and_batched(model):
    torch.manual_seed(3)
    a = generate(model, ids(2, 12), do_sample=True, num_return_sequences=2)
    torch.manual_seed(3)
    b = generate(model, ids(2, 12), do_sample=True, num_return_sequences=2)
    assert a.shape == (4, 32)
    assert torch.equal(a, b)


@pytest.mark.parametrize("make", [make_cache, lambda c: DynamicCache(config=c), lambda c: DynamicCache()])
def test_multi_turn_cache_reuse(model, make):
    cache = make(model.config)
    first = generate(model, ids(1, 10), **{CACHE: cache}, do_sample=False)
    turn = torch.cat([first, ids(1, 7)], 1)
    second = generate(model, turn, **{CACHE: cache}, do_sample=False)
    assert torch.equal(second, generate(model, turn, do_sample=False))


def test_a_foreign_cache_is_refused(model):
    original = tiny()
    cache = DynamicCache()
    original(ids(1, 5), **{CACHE: cache})
    with pytest.raises(ValueError, match=f"{CACHE}: expected an empty cache"):
        model(ids(1, 5), **{CACHE: cache})


def test_guessing_ahead_says_the_same(model):
    x = ids(1, 9).repeat(1, 3)
    wanted = generate(model, x, do_sample=False)
    for guess in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=tiny())):
        assert torch.equal(generate(model, x, do_sample=False, **guess), wanted)


def test_crop_refuses(model):
    cache = make_cache(model.config)
    model(ids(1, 5), **{CACHE: cache})
    with pytest.raises(RuntimeError, match="cannot forget"):
        cache.crop(-1)


@torch.no_grad()
def test_cache_bytes_do_not_grow(model):
    sizes = []
    for tokens in (1, 100, 4000):
        cache = make_cache(model.config)
        model(ids(1, tokens), **{CACHE: cache}, logits_to_keep=1)
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1] == sizes[2] > 0


@torch.no_grad()
def test_no_square_mask_is_built(model):
    x = ids(1, 20_000)
    mask = torch.ones_like(x)
    mask[:, :100] = 0
    assert torch.isfinite(model.model(x, attention_mask=mask, use_cache=False).last_hidden_state[:, 100:]).all()


def test_linearizing_without_any_data_is_deterministic():
    first, second = linearize(tiny(), window=8), linearize(tiny(), window=8)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@torch.no_grad()
@pytest.mark.parametrize("keep", [[], [1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_kept_layers_may_slide(family, keep):
    """Kept layers with a window of their own hold fewer tokens than a Liger layer has seen."""
    torch.manual_seed(0)
    if family == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()
    else:
        kinds = ["full_attention", "sliding_attention", "sliding_attention"]
        config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, layer_types=kinds)
        model = Qwen2ForCausalLM(config).eval()
    model = linearize_tiny(model, window=8, keep=keep)
    x = ids(2, 40)
    out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=6, eos_token_id=None, do_sample=False)
    whole = model(out, use_cache=False).logits.argmax(-1)
    assert torch.equal(whole[:, 39:-1], out[:, 40:])


def test_caches_that_hold_no_states_are_refused(model):
    x = ids(1, 5)
    with pytest.raises(ValueError, match="generate_batch: expected generate with a padded batch"):
        model.generate_batch([x[0].tolist()], max_new_tokens=2)
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation: expected None or 'dynamic', .*, got '{kind}'"):
            generate(model, x, cache_implementation=kind)
    assert torch.equal(generate(model, x, cache_implementation="dynamic"), generate(model, x))


def test_embeddings_in_place_of_ids(model):
    x = ids(2, 9)
    options = dict(attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False, eos_token_id=None)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(x).detach(), **options)
    assert torch.equal(got, model.generate(x, **options)[:, 9:])
