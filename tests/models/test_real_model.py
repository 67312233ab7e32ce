"""SmolLM2-135M itself: the bars that a tiny random model cannot show."""

import pytest
import torch

from liger_layers import LigerAttention, calls
from liger_models import cache_bytes, checkpoint, linearize, make_cache, perplexity, retrieval
from liger_models._calibration import draw_text
from liger_models._inputs import CACHE
from liger_models.demo import bundled_model
from liger_models.evaluation import without_recurrence
from liger_models.selection import hidden_keys, key_loss
from liger_models.text import standard_text, to_blocks
from tests.models.test_exactness import check_published


def load():
    return checkpoint.load(bundled_model(), torch.float32)


@pytest.fixture(scope="module")
def original():
    return load()


@pytest.fixture(scope="module")
def held_out(original):
    return to_blocks(original[1], standard_text()[1], 512)[:4]


@pytest.fixture(scope="module")
def drawn(original):
    """The text that each conversion would draw again."""
    return draw_text(original[0], batch=16)


@pytest.fixture(scope="module")
def linearized(original, drawn):
    return linearize(load()[0], calibration=drawn, tokenizer=original[1])


@pytest.fixture(scope="module")
def without_recall(drawn):
    return linearize(load()[0], calibration=drawn, recall=0)


def test_the_default_reads_and_looks_up_as_the_original_before_training(original, linearized, held_out):
    """Within 2 % in perplexity, and with half a nat on a key, which without recall is lost (9 nats)."""
    keys = hidden_keys(original[1], standard_text()[0], 512, torch.device("cpu"), seed=100)
    assert perplexity(original[0], held_out) == pytest.approx(15.28, abs=0.02)
    assert perplexity(linearized, held_out) <= 1.02 * 15.28
    assert sum(key_loss(linearized, *row) for row in keys) / len(keys) <= 0.5


def test_the_recurrence_helps_before_training_where_nothing_is_recalled(without_recall, held_out):
    whole = perplexity(without_recall, held_out)
    with without_recurrence(without_recall):
        assert whole < perplexity(without_recall, held_out) - 0.3
    assert whole <= 17.2


@torch.no_grad()
def test_paper_gla_is_the_published_formula_in_every_layer(held_out):
    check_published(linearize(load()[0], preset="paper-gla"), held_out[:1, :160], 64)


@torch.no_grad()
def test_wide_window_without_recurrence_is_the_original(original, without_recall, held_out):
    x, layers = held_out[:1, :300], [m for m in without_recall.modules() if isinstance(m, LigerAttention)]
    wanted = original[0](x).logits
    assert (without_recall(x).logits - wanted).abs().max() > 1e-2
    with calls.with_window(layers, 300), without_recurrence(without_recall):
        assert (without_recall(x).logits - wanted).abs().max() <= 1e-4


@torch.no_grad()
def test_four_memories_change_nothing_before_training(without_recall, drawn, held_out):
    x = held_out[:1, :300]
    routed = linearize(load()[0], calibration=drawn, recall=0, memories=4, top_k=2)
    assert (routed(x).logits - without_recall(x).logits).abs().max() <= 1e-4


def test_erasing_memories_help_before_training(drawn, held_out):
    model = linearize(load()[0], calibration=drawn, gate="gated_deltanet")
    whole = perplexity(model, held_out)
    with without_recurrence(model):
        assert whole < perplexity(model, held_out) - 0.1
    assert whole <= 17.6


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(90, 1, 1, 73, *[1] * 35), (100, 100), (7,) * 28 + (4,), (150,) + (1,) * 50])
def test_pieces_equal_the_whole(linearized, held_out, sizes):
    x = held_out[:1, :200]
    whole = linearized(x, use_cache=False).logits
    cache = make_cache(linearized.config)
    parts = [linearized(part, **{CACHE: cache}).logits for part in x.split(sizes, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4


@torch.no_grad()
def test_left_padding_changes_nothing(linearized, held_out):
    lengths, total = (200, 120), 230
    ids = torch.randint(0, 1000, (2, total))
    mask = torch.zeros(2, total, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = held_out[row, :length], 1
    # As generate passes them. Counted from the padding instead, the float32 angles of RoPE alone move the logits.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = linearized(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, length in enumerate(lengths):
        alone = linearized(held_out[row : row + 1, :length], use_cache=False).logits[0]
        assert (logits[row, -length:] - alone).abs().max() <= 1e-4


@torch.no_grad()
def test_cache_bytes_after_100_and_4000_tokens(linearized, held_out):
    sizes = []
    for tokens in (100, 4000):
        cache = make_cache(linearized.config)
        linearized(held_out.reshape(1, -1).repeat(1, 2)[:, :tokens], **{CACHE: cache}, logits_to_keep=1)
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("context", "found"), [(256, 6), (512, 8), (1024, 6)])
def test_the_original_finds_keys(original, context, found):
    model, tokenizer = original
    assert retrieval(model, tokenizer, standard_text()[0], context) >= found / 8


@torch.no_grad()
def test_layers_that_selection_found_look_up_keys(original, held_out):
    """What `benchmarks.selection` chose, against even spacing; the choice itself takes minutes."""
    tokenizer, text, figures = original[1], standard_text()[0], []
    rows, calibration = (
        hidden_keys(tokenizer, text, 512, torch.device("cpu"), seed=100),
        to_blocks(tokenizer, text, 256),
    )
    for keep in ([8, 18, 21, 23], [3, 11, 18, 26]):
        model = linearize(load()[0], keep=keep, calibration=calibration[:4], recall=0)
        keys = [key_loss(model, *row) for row in rows[::2]]
        figures.append((sum(keys) / len(keys), perplexity(model, held_out[:2])))
    selected, even = figures
    assert selected[0] <= 1.0 < even[0]
    assert selected[1] <= even[1]
