"""A conversion is planned once: what a layer is told is settled once, and the new layer is built outside the model."""

import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from liger_layers.choices import settle
from liger_models import LigerConfig, _conversion, linearize_on_disk, select_layers
from liger_models._conversion import build, converted, plan_layers
from liger_models._decoder import Decoder
from liger_models.families import own_windows
from tests.models.tiny import FEW, TEXT, linearize_tiny, tiny, tiny_tokenizer

CALIBRATION = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def settled(monkeypatch):
    """How many times the choices of each gate were settled, wherever it was."""
    calls = Counter()

    def counted(gate, *args, **kwargs):
        calls[gate] += 1
        return settle(gate, *args, **kwargs)

    owners = [m for name, m in sys.modules.items() if name.startswith("liger_") and hasattr(m, "settle")]
    assert len(owners) > 1
    for module in owners:
        monkeypatch.setattr(module, "settle", counted)
    return calls


@pytest.mark.parametrize(
    "options", [dict(), dict(memories=2), dict(gate="gla", pool="heads"), dict(pattern="LFM")], ids=str
)
def test_choices_are_settled_once_for_all_layers(settled, options):
    linearize_tiny(tiny(), window=8, **options)
    assert settled == {options.get("gate", "gated_retention"): 1}


@pytest.mark.parametrize("pattern", ["GSX", ["liger:gla", "liger:hgrn2", "liger:kda"]], ids=str)
def test_those_of_a_gate_in_the_pattern_are_settled_once_for_its_layers(settled, pattern):
    model = linearize_tiny(tiny(), window=8, pattern=pattern)
    # That of the options, and what would suit it by itself.
    assert settled.pop("gated_retention") == 2
    assert settled == {name.partition(":")[2]: 1 for name in model.config.liger["pattern"]}


def test_so_they_are_on_the_disk_in_choosing_and_in_loading(settled, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    linearize_on_disk(tmp_path / "model", tmp_path / "out", calibration=CALIBRATION, window=8)
    assert settled == {"gated_retention": 1}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert settled == {"gated_retention": 2}
    options = dict(tokenizer=tiny_tokenizer(), length=48, calibration=CALIBRATION, window=8)
    select_layers(tiny(), TEXT, 1, **options)
    assert settled == {"gated_retention": 3}


@pytest.mark.parametrize("name", FEW)
def test_a_layer_is_built_and_fitted_outside_the_model(name):
    model = tiny(name)
    liger = LigerConfig(window=8, recall=0, pattern="LWF").resolve(own_windows(model.config))
    plans = plan_layers(model.config, liger)
    assert [plan.name for plan in plans] == [kind for kind in liger.pattern if kind != "full"]
    assert [plan.fitted for plan in plans] == [plan.name == "liger" for plan in plans]
    before, decoder = [*model.modules()], Decoder(model)
    new = dict(converted(model, plans, CALIBRATION))
    assert [*model.modules()] == before
    other = linearize_tiny(tiny(name), window=8, pattern="LWF")
    for plan in plans:
        wanted = Decoder(other).attention(plan.index).state_dict()
        assert all(torch.equal(x, wanted[key]) for key, x in new[plan.index].state_dict().items())
        bare = build(plan, decoder.attention(plan.index), model.config)
        assert type(bare) is plan.kind and bare.o_proj is decoder.attention(plan.index).o_proj


def test_a_layer_that_stays_has_no_plan_and_nothing_is_measured_for_windows(monkeypatch):
    model = tiny()
    assert plan_layers(model.config, LigerConfig(pattern="F").resolve([None] * 3)) == ()
    monkeypatch.setattr(_conversion, "measure", None)
    plans = plan_layers(model.config, LigerConfig(pattern="W").resolve([None] * 3))
    assert len(dict(converted(model, plans, None))) == 3
