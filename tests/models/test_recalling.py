"""Recall in linearized models: what scores are fitted to, families, pieces, files, bad input."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from liger_layers import LigerAttention, RecallScore, calls
from liger_layers.rotary import rotate
from liger_models import linearize, linearize_on_disk, make_cache
from liger_models._hidden import with_hidden
from liger_models._inputs import CACHE
from liger_models._need import asking_rows, far_attention, fit_scores, measure_need
from liger_models.data import Rows
from liger_models.variants import window_alone, with_recall, without_recall, without_recurrence
from tests.models.test_exactness import ids
from tests.models.tiny import NAMES, tiny, tiny_tokenizer

SIZES = dict(window=6, sinks=2, recall=5)


def recalling(name="llama", seed=0, **options):
    """A linearized model whose scores are random, so that its choice is no accident of ties."""
    model = linearize(tiny(name), calibration=ids(4, 160), **{**SIZES, **options})
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, RecallScore):
            module.weight.normal_()
    return model


def test_far_attention_is_what_a_definition_says():
    torch.manual_seed(0)
    T, H, G, window = 300, 2, 3, 40
    q, k = torch.randn(T, H * G, 8).double(), torch.randn(T, H, 8).double()
    for softcap in (None, 2.0):
        wanted = torch.zeros(T, H).double()
        for h in range(H * G):
            s = q[:, h] @ k[:, h // G].T * 0.7
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            p = s.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
            wanted[:, h // G] += p.tril(-window).square().sum(0)
        got = far_attention(q, k, window, 0.7, softcap)
        assert (got - wanted.sqrt()).abs().max() <= 1e-12


def test_a_score_is_the_ridge_regression_of_the_need():
    torch.manual_seed(0)
    score, (k, v) = RecallScore(2, 4).double(), torch.randn(2, 1, 500, 2, 4).double()
    k = 3 * k + 5
    x, need = score.features(k, v)[0], torch.rand(500, 2).double()
    mean, centred = x.mean(0), x - x.mean(0)
    covariance, target = centred.T @ centred / 500, need - need.mean(0)
    score.calibrate(mean, covariance, centred.T @ target / 500, penalty=0.05)
    z = centred / covariance.diagonal().sqrt()
    rows = torch.cat([z, (0.05 * 500) ** 0.5 * torch.eye(x.shape[1]).double()])
    wanted = z @ torch.linalg.lstsq(rows, torch.cat([target, torch.zeros(x.shape[1], 2).double()])).solution
    wanted = wanted / wanted.square().mean(0).sqrt()
    found = score(k, v)[0]
    assert (found - wanted).abs().max() <= 6e-4
    assert torch.equal(found, (found * 1000).round() / 1000)
    # A need that features tell exactly is found, whatever their means.
    need = torch.stack([2 * k[0, :, 0, 1] - v[0, :, 1, 0], v[0, :, 0, 3] - k[0, :, 0, 0]], -1)
    score.calibrate(mean, covariance, centred.T @ (need - need.mean(0)) / 500, penalty=1e-9)
    wanted = (need - need.mean(0)) / (need - need.mean(0)).square().mean(0).sqrt()
    assert (score(k, v)[0] - wanted).abs().max() <= 6e-4


def test_needs_are_measured_on_the_layers_own_keys_and_values():
    model = tiny()
    rows = [ids(1, 160), ids(1, 130)[:, ::2]]
    found = dict(measure_need(model, rows, {1: 6}))
    score, parts = RecallScore(2, 12), []
    for row in rows:
        held = {}
        hook = model.model.layers[1].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, held=held: held.update(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            model(row)
        hook.remove()
        attention, x = model.model.layers[1].self_attn, held["hidden_states"]
        q, k, v = (getattr(attention, f"{n}_proj")(x).unflatten(-1, (-1, 12)) for n in "qkv")
        far = far_attention(*(rotate(y, *held["position_embeddings"])[0] for y in (q, k)), 6, attention.scaling)
        need = far * v[0].norm(dim=-1)
        parts.append((score.features(k, v)[0, 4:-80], need[4:-80]))
    x, need = (torch.cat(part).double() for part in zip(*parts, strict=True))
    mean, x, need = x.mean(0), x - x.mean(0), need - need.mean(0)
    assert torch.allclose(found[1].mean, mean, atol=1e-5)
    assert torch.allclose(found[1].covariance, x.T @ x / len(x), atol=1e-4)
    assert torch.allclose(found[1].cross, x.T @ need / len(x), atol=1e-4)


def test_scores_are_the_same_however_many_layers_and_rows_fit_at_once(monkeypatch):
    model, rows, windows = tiny(), [ids(1, 160), ids(1, 160), ids(1, 130), ids(1, 160)], {0: 6, 1: 7, 2: 8}
    passes = []
    model.model.register_forward_pre_hook(lambda module, args: passes.append(tuple(args[0].shape)))
    whole = fit_scores(model, rows, windows)
    assert passes == [(2, 160), (1, 130), (1, 160)]
    passes.clear()
    for name in ("_LEAST", "_MOST"):
        monkeypatch.setattr(f"liger_models._need.{name}", 1)
    monkeypatch.setattr("liger_models._need.AT_ONCE", 160)
    alone = fit_scores(model, rows, windows)
    assert passes == 3 * [(1, 160), (1, 160), (1, 130), (1, 160)] and list(alone) == list(whole) == [0, 1, 2]
    for index, score in whole.items():
        assert (score.weight - alone[index].weight).abs().max() <= 1e-4 * score.weight.abs().max()


def test_no_row_is_longer_than_the_longest_text():
    for tokenizer in (None, tiny_tokenizer()):
        for longest in (600, 512, 300, 100, 20):
            rows = asking_rows(ids(8, 512), tokenizer, 64, longest)
            assert rows and max(row.shape[1] for row in rows) <= longest
    with pytest.raises(ValueError, match=r"^tokenizer: expected ids below the model's 50, got "):
        linearize(tiny(vocab_size=50), calibration=ids(4, 160) % 50, tokenizer=tiny_tokenizer(), **SIZES)


def test_rows_ask_for_what_is_hidden_in_them():
    text = ids(8, 512)
    alone = asking_rows(text, None, 64)
    assert len(alone) == 16 and all(row.shape[0] == 1 for row in alone)
    # What comes again at the end stands in the row before.
    for row in alone[8:]:
        end = row[0, -12:].tolist()
        assert any(row[0, i : i + 12].tolist() == end for i in range(row.shape[1] - 12))
    asked = asking_rows(text, tiny_tokenizer(), 64)
    again = asking_rows(text, tiny_tokenizer(), 64)
    assert len(asked) == 8 + 24 and all(torch.equal(a, b) for a, b in zip(asked, again, strict=True))
    plain = Rows((text.flatten(),) * 24, (text.flatten(),) * 24)
    assert torch.equal(asked[8][0], with_hidden(tiny_tokenizer(), plain, 1.0, 512, 7000).ids[0])


def test_rows_reach_beyond_wide_windows_and_short_text_says_itself_again():
    for tokenizer in (None, tiny_tokenizer()):
        assert {row.shape[1] for row in asking_rows(ids(4, 400), tokenizer, 600)[:1]} == {1280}
        assert {row.shape[1] for row in asking_rows(ids(1, 400), tokenizer, 600)[:1]} == {400}
        assert [row.shape for row in asking_rows(ids(1, 40), tokenizer, 6)] == [(1, 40), (1, 96)]


def test_scores_are_fitted_behind_wide_windows_and_stay_where_nothing_is_asked():
    usual = RecallScore(2, 12)
    for rows, window, fitted in ((ids(4, 300), 520, True), (ids(1, 10), 6, False), (ids(1, 300), 400, False)):
        model = linearize(tiny(max_position_embeddings=2048), calibration=rows, window=window, recall=5)
        for score in (m for m in model.modules() if isinstance(m, RecallScore)):
            assert score.weight.isfinite().all()
            assert torch.equal(score.weight, usual.weight) != fitted


def test_the_lack_of_a_tokenizer_is_said(caplog):
    linearize(tiny(num_hidden_layers=1), calibration=ids(1, 300), tokenizer=tiny_tokenizer(), **SIZES)
    assert "calibration: no tokenizer" not in caplog.text
    linearize(tiny(num_hidden_layers=1), calibration=ids(1, 300), **SIZES)
    assert "calibration: no tokenizer" in caplog.text


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_family_recalls_alike_in_pieces(name):
    model, x = recalling(name), ids(2, 60)
    whole, cache = model(x, use_cache=False).logits, make_cache(model.config)
    parts = [model(part, **{CACHE: cache}).logits for part in x.split((7, 30, *(1,) * 23), 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4
    with without_recall(model):
        assert (model(x, use_cache=False).logits - whole).abs().max() > 1e-3


@torch.no_grad()
def test_branches_are_switched_off_with_a_cache_too():
    model, x = recalling(), ids(2, 40)
    plain = linearize(tiny(), calibration=ids(4, 160), window=6, sinks=2, recall=0)
    window = linearize(tiny(), pattern="W", window=6, sinks=2)
    for switched_off, other in ((without_recall, plain), (window_alone, window)):
        with switched_off(model):
            cache = make_cache(model.config)
            got = torch.cat([model(part, **{CACHE: cache}).logits for part in x.split((30, *(1,) * 10), 1)], 1)
        assert (got - other(x).logits).abs().max() <= 1e-4
    # What was seen without recall is not known with it.
    with pytest.raises(ValueError, match=f"^{CACHE}: expected one that was filled with the same parts switched off"):
        model(x[:, :1], **{CACHE: cache})
    with without_recurrence(model):
        alone = model(x).logits
    assert (alone - model(x).logits).abs().max() > 1e-4


@torch.no_grad()
def test_more_or_fewer_tokens_are_recalled_by_the_same_scores():
    model, x = recalling(), ids(2, 60)
    for recall in (2, 11):
        other = linearize(tiny(), calibration=ids(4, 160), **SIZES | dict(recall=recall))
        other.load_state_dict(model.state_dict())
        with with_recall(model, recall):
            cache = make_cache(model.config)
            got = torch.cat([model(part, **{CACHE: cache}).logits for part in x.split((40, *(1,) * 20), 1)], 1)
        assert (got - other(x).logits).abs().max() <= 1e-4
        assert (got - model(x).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"^recall: expected an integer >= 0, got -1$"):
        with_recall(model, -1).__enter__()
    with pytest.raises(ValueError, match=r"^model: expected layers that recall, got none$"):
        with_recall(tiny(), 3).__enter__()
    plain = LigerAttention(16, 2, window=6)
    with pytest.raises(ValueError, match=r"^layers: expected layers that score tokens, got one without recall$"):
        calls.with_recall([plain], 3).__enter__()
    assert plain.recall == 0 and plain.parts["recalled"] is None


def test_a_score_is_saved_loaded_and_written_on_disk(tmp_path):
    tiny().save_pretrained(tmp_path / "source")
    rows = ids(4, 200)
    memory = linearize(AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval(), calibration=rows, **SIZES)
    memory.save_pretrained(tmp_path / "memory")
    linearize_on_disk(tmp_path / "source", tmp_path / "disk", calibration=rows, **SIZES)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("memory", "disk")]
    for model in models:
        scores = [m.weight for m in model.modules() if isinstance(m, RecallScore)]
        wanted = [m.weight for m in memory.modules() if isinstance(m, RecallScore)]
        assert len(scores) == 3 and all(torch.equal(a, b) for a, b in zip(scores, wanted, strict=True))
    # Fitted, not as it starts.
    assert any((w - RecallScore(2, 12).weight).abs().max() > 1e-3 for w in wanted)


def test_bad_input_is_one_line():
    for recall, given in ((-1, "-1"), (1.5, "1.5"), (505, "505")):
        with pytest.raises(ValueError, match=f"^recall: expected .*, got {given}$"):
            linearize(tiny(), calibration=ids(2, 60), window=6, sinks=2, recall=recall)
    for pattern in ("W", "WF", ["liger:kda"]):
        with pytest.raises(ValueError, match=r"^recall: expected 0 with a pattern in which no .* softmax, got 5$"):
            linearize(tiny(), pattern=pattern, recall=5)
    assert linearize(tiny(), keep=range(3), recall=5).config.liger["recall"] == 0
    with pytest.raises(ValueError, match=r"^recall: expected 0 with mixing='sum', as gate 'kda' has it, got 5"):
        linearize(tiny(), calibration=ids(2, 60), gate="kda", recall=5)
