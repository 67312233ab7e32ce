"""Weights of the recurrence that are fitted: the distance at any of them, what is chosen, where they end up."""

import pytest
import torch

from liger_layers import LigerAttention
from liger_models import LigerConfig, linearize, linearize_on_disk
from liger_models._decoder import Decoder
from liger_models._mixing import PROBE, WEIGHTS, distances, fit_mixes, outputs
from tests.models.test_exactness import ids
from tests.models.tiny import FEW, tiny, tiny_tokenizer

SIZES = dict(window=6, sinks=2, calibration=ids(4, 160))


def inputs(layer, T=50):
    torch.manual_seed(3)
    H, HQ, D = layer.num_kv_heads, layer.num_heads, layer.head_dim
    tables = torch.randn(1, T, D).cos().double(), torch.randn(1, T, D).sin().double()
    return *(3 * torch.randn(1, T, h, D).double() for h in (HQ, H, H)), tables


@torch.no_grad()
@pytest.mark.parametrize("recall", [0, 5])
def test_three_outputs_tell_the_distance_at_every_weight(recall):
    layer = Decoder(linearize(tiny(), recall=recall, **SIZES)).attention(1).double()
    before = layer.mix.weight.clone()
    q, k, v, tables = inputs(layer)
    weights = torch.tensor([0.0, 0.03, 0.5, 1.0, 3.0, 9.0]).double()
    outs = outputs(layer, weights.tolist(), q, k, v, tables)
    wanted = torch.randn_like(outs[0])
    brute = torch.stack([(o - wanted).square().sum((0, 2)) for o in outs], -1)
    found = distances(*outputs(layer, (0.0, 1.0, PROBE), q, k, v, tables), wanted, weights)
    assert found.shape == (layer.num_heads, 6) and (brute[:, 0] - brute[:, -1]).abs().min() > 1e-3
    assert ((found - brute).abs() / brute).max() <= 1e-9
    assert torch.equal(layer.mix.weight, before)


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_every_head_is_nearer_to_its_attention_than_by_any_other_weight(name, monkeypatch):
    seen = {}

    def kept(none, one, probe, wanted, weights):
        found = distances(none, one, probe, wanted, weights)
        seen.setdefault("all", []).append(found)
        return found

    monkeypatch.setattr("liger_models._mixing.distances", kept)
    model = linearize(tiny(name), fit_mix=True, tokenizer=tiny_tokenizer(), **SIZES)
    layers = [m for m in model.modules() if isinstance(m, LigerAttention)]
    rows = len(seen["all"]) // len(layers)
    assert rows > 1 and len({w.item() for layer in layers for w in layer.mix.weight}) > 1
    for i, layer in enumerate(layers):
        total = sum(seen["all"][i :: len(layers)])
        chosen = (WEIGHTS.float()[None] == layer.mix.weight[:, None]).nonzero()[:, 1]
        assert len(chosen) == layer.num_heads
        assert torch.equal(total.gather(1, chosen[:, None])[:, 0], total.amin(1))


@torch.no_grad()
def test_a_head_whose_recurrence_tells_nothing_is_weighed_least():
    T, D = 30, 8
    none = torch.randn(T, 2, D)
    way = torch.randn(T, 2, D)
    share = torch.rand(T, 2, 1)
    one, probe = none + share * way, none + PROBE * share / (1 - share + PROBE * share) * way
    # The first head is right as it is, the second with the recurrence alone.
    wanted = torch.stack([none[:, 0], (none + way)[:, 1]], 1)
    assert distances(none, one, probe, wanted, WEIGHTS).argmin(1).tolist() == [0, len(WEIGHTS) - 1]


@torch.no_grad()
def test_rows_within_the_window_change_no_weight():
    layer = Decoder(linearize(tiny(), recall=0, **SIZES)).attention(1)
    layer.mix.weight.copy_(torch.rand(layer.num_heads))
    found = fit_mixes(tiny(), [ids(1, 8)], {1: layer})[1]
    assert torch.equal(found, layer.mix.weight)
    assert not torch.equal(fit_mixes(tiny(), [ids(1, 9)], {1: layer})[1], layer.mix.weight)


def test_they_are_alike_on_a_disk_and_saved(tmp_path):
    tiny().save_pretrained(tmp_path / "source")
    options = dict(fit_mix=True, recall=3, **SIZES)
    model = linearize(type(tiny()).from_pretrained(tmp_path / "source").eval(), **options)
    linearize_on_disk(tmp_path / "source", tmp_path / "disk", **options)
    model.save_pretrained(tmp_path / "memory")
    for name in ("disk", "memory"):
        other = type(model).from_pretrained(tmp_path / name)
        assert other.config.liger["fit_mix"] is True
        pairs = zip(other.model.layers, model.model.layers, strict=True)
        assert all(torch.equal(a.self_attn.mix.weight, b.self_attn.mix.weight) for a, b in pairs)


BAD = dict(fit_mix=1), dict(mix=0.3), dict(mixing="sum"), dict(preset="paper-gla")


@pytest.mark.parametrize("options", BAD, ids=str)
def test_what_cannot_be_fitted_is_refused(options):
    with pytest.raises(ValueError, match=r"^fit_mix: expected"):
        LigerConfig.from_preset(**({"fit_mix": True} | options))
    gates = LigerConfig(fit_mix=True, pattern=("liger", "liger:deltanet"))
    assert gates.mixing == "joint" and gates.options("liger:deltanet")["mixing"] == "sum"


def test_a_pattern_without_a_shared_softmax_has_nothing_to_fit():
    for pattern in ("W", "WF", ["liger:deltanet"]):
        with pytest.raises(ValueError, match=r"^fit_mix: expected False with a pattern in which no recurrence shares"):
            linearize(tiny(), pattern=pattern, fit_mix=True)
    # Layers that stay may take every place.
    model = linearize(tiny(), keep=range(3), fit_mix=True)
    assert model.config.liger["fit_mix"] is False
    assert LigerConfig.from_saved(model.config.liger).resolve([None] * 3).fit_mix is False
