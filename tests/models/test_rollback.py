"""Tokens taken back from a cache are as if they had never been; whoever guesses ahead says what greedy decoding says.

Shapes: B batch, T time.
"""

import copy
import random

import pytest
import torch

from liger_models import cache_bytes, make_cache
from liger_models._inputs import CACHE
from tests.models.test_packed import scratch
from tests.models.tiny import linearize_tiny, tiny

# Of each kind of model.
SCHEDULES = 6
KINDS = {
    "recall": lambda: linearize_tiny(tiny(), window=6, sinks=2, recall=3),
    "one kept": lambda: linearize_tiny(tiny(), window=6, sinks=2, recall=3, keep=[1]),
    "sum": lambda: linearize_tiny(tiny(), preset="paper-gla", window=6),
    "slots": lambda: linearize_tiny(tiny(), preset="paper-gsa", window=4),
    "memories": lambda: linearize_tiny(tiny(), window=5, sinks=1, recall=0, memories=3),
    "window": lambda: linearize_tiny(tiny(), pattern="WL", window=7, sinks=1),
    "own window": lambda: linearize_tiny(tiny("gemma3_text"), window=6, sinks=2, recall=3),
    "scratch": scratch,
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return KINDS[request.param]().eval().double()


def ids(rows, tokens, seed=0):
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_a_fresh_one(model):
    """Schedules of every kind: pieces of any length, and any number of tokens taken back in between."""
    taken = 0
    for seed in range(SCHEDULES):
        draw = random.Random(seed)
        limit, rows, furthest = draw.randint(1, 9), draw.randint(1, 2), 0
        cache, kept = make_cache(model.config, rollback=limit), ids(rows, 0)
        steps, cropped = draw.randint(3, 8), False
        for step in range(steps):
            piece = ids(rows, draw.choice([1, 1, 2, 3, draw.randint(1, 30)]), 100 * seed + step)
            out = model(piece, **{CACHE: cache}, use_cache=True).logits
            kept = torch.cat([kept, piece], 1)
            if cropped or step + 1 == steps:
                wanted = model(kept, use_cache=False).logits[:, kept.shape[1] - piece.shape[1] :]
                assert (out - wanted).abs().max() <= 1e-6 * wanted.abs().max()
            cropped = False
            if draw.random() < 0.6:
                furthest = max(furthest, kept.shape[1])
                back = draw.randint(0, kept.shape[1] - max(furthest - limit, 0))
                cache.crop(-back)
                kept, taken, cropped = kept[:, : kept.shape[1] - back], taken + back, back > 0
                assert cache.get_seq_length() == kept.shape[1]
    assert taken > 2 * SCHEDULES


@torch.no_grad()
def test_padding_is_taken_back_too(model):
    cache, x = make_cache(model.config, rollback=6), ids(2, 24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :5], mask[0, 13] = 0, 0
    if model.config.__dict__.get("liger") and len(model.config.liger["keep"]):
        mask[0, 13] = 1
    model(x[:, :16], attention_mask=mask[:, :16], **{CACHE: cache}, use_cache=True)
    cache.crop(-5)
    # Others come in their place.
    other, shown = x.clone(), mask.clone()
    other[:, 11:], shown[:, 11:] = ids(2, 13, 5), 1
    found = model(other[:, 11:], attention_mask=shown, **{CACHE: cache}, use_cache=True).logits
    wanted = model(other, attention_mask=shown, use_cache=False).logits[:, 11:]
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@torch.no_grad()
def test_beams_are_reordered_with_what_was_before_them(model):
    cache, x, order = make_cache(model.config, rollback=4), ids(3, 20), torch.tensor([2, 0, 0])
    model(x, **{CACHE: cache}, use_cache=True)
    cache.reorder_cache(order)
    cache.crop(-3)
    more = ids(3, 4, 9)
    found = model(more, **{CACHE: cache}, use_cache=True).logits
    wanted = model(torch.cat([x[order, :17], more], 1), use_cache=False).logits[:, 17:]
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@torch.no_grad()
def test_a_cache_that_can_go_back_is_of_constant_size():
    model, sizes = KINDS["recall"](), []
    cache, plain = make_cache(model.config, rollback=4), make_cache(model.config)
    for step in range(90):
        for held in (cache, plain):
            model(ids(1, 1 if step else 40, step), **{CACHE: held}, use_cache=True)
        sizes.append(cache_bytes(cache))
    assert max(sizes[20:55]) == max(sizes[55:]) and cache_bytes(plain) < max(sizes)
    # A prompt is not kept.
    layer = cache.layers[0]
    assert layer.past.held < 16 and sum(x.shape[1] for x, _ in layer.columns) < 64


@torch.no_grad()
@pytest.mark.parametrize("assistant", ["other", "linear", "lookup", "few", "many"])
def test_guessing_ahead_says_what_greedy_decoding_says(assistant):
    """Prompts of 2 models each, from a model of short cycles, so that guesses are right at times."""
    whole = tiny(scale=2.0)
    told = {
        "other": lambda: dict(assistant_model=tiny(scale=2.2)),
        "linear": lambda: dict(assistant_model=linearize_tiny(tiny(scale=2.0), window=9, sinks=1)),
        "lookup": lambda: dict(prompt_lookup_num_tokens=5),
        "few": lambda: dict(prompt_lookup_num_tokens=1),
        "many": lambda: dict(prompt_lookup_num_tokens=90),
    }[assistant]()
    for kind in ("recall", "one kept"):
        keep = [1] if kind == "one kept" else []
        model = linearize_tiny(copy.deepcopy(whole), window=6, sinks=2, recall=3, keep=keep)
        lengths, calls = [], []
        model.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        for seed in range(2):
            x = ids(1, 4 + 3 * seed, seed)
            x = torch.cat([x, x], 1)
            options = dict(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
            calls.clear()
            ahead = model.generate(x, attention_mask=torch.ones_like(x), **options, **told)
            lengths.append(len(calls))
            assert torch.equal(ahead, model.generate(x, attention_mask=torch.ones_like(x), **options))
        # Guesses were made, and some were right.
        assert min(lengths) < 30, lengths


@torch.no_grad()
def test_routers_are_told_of_the_tokens_at_hand_alone():
    model = KINDS["memories"]().double()
    cache, x = make_cache(model.config, rollback=4), ids(2, 30)
    model(x[:, :20], **{CACHE: cache}, use_cache=True)
    cache.crop(-3)
    # More than can be taken back, so that the layer runs in two parts.
    found = model(x[:, 17:], **{CACHE: cache}, use_cache=True, output_router_logits=True).router_logits
    wanted = model(x, use_cache=False, output_router_logits=True).router_logits
    for one, whole in zip(found, wanted, strict=True):
        assert (one.view(2, 13, 3) - whole.view(2, 30, 3)[:, 17:]).abs().max() <= 1e-6


def test_what_cannot_be_taken_back():
    model = KINDS["recall"]()
    with pytest.raises(ValueError, match="rollback: expected an integer >= 1, got 0"):
        make_cache(model.config, rollback=0)
    cache = make_cache(model.config)
    model(ids(1, 9), **{CACHE: cache}, use_cache=True)
    with pytest.raises(RuntimeError, match=r"crop: expected a cache of make_cache\(config, rollback=...\)"):
        cache.crop(-1)
    cache = make_cache(model.config, rollback=3)
    for step in range(30):
        model(ids(1, 1, step), **{CACHE: cache}, use_cache=True)
    with pytest.raises(ValueError, match=r"crop: expected at most .* tokens to take back"):
        cache.crop(-25)
    # A tensor is what transformers 5.17 gives, and a number above 0 is what is to be left.
    cache.crop(torch.tensor(-2))
    cache.crop(27)
    cache.crop(0)
    assert cache.get_seq_length() == 27 and type(cache.get_seq_length()) is int
