"""A cache that is not a model's own, or of a call that was cut short: right numbers, or one refusal."""

import threading

import pytest
import torch

from liger_models import _weights
from liger_models._inputs import CACHE
from liger_models._weights import name_of_weights
from tests.layers.misuse import states
from tests.models.cut_short import cut_short
from tests.models.misuse import GROUPS, HELD, IDS, fill, go_on, judge, make

GROUPS = (*GROUPS, cut_short, states)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_misuse_is_right_or_refused(group):
    cases = list(group())
    assert len({name for name, _ in cases}) == len(cases)
    found = {name: judge(case) for name, case in cases}
    bad = [f"{name}: {said}" for name, said in found.items() if said != "right" and not said.startswith("refused: ")]
    bad += [f"{name}: {said}" for name, said in found.items() if name.startswith("right: ") and said != "right"]
    assert not bad, "\n".join(bad)


def test_there_are_enough_cases():
    assert sum(len(list(group())) for group in GROUPS) >= 200


@torch.no_grad()
def test_a_cache_is_filled_by_one_call_at_a_time():
    model = make()
    cache, inside, over, said = fill(model), threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        assert over.wait(30)

    with torch.no_grad():
        hook = model.model.layers[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=torch.no_grad()(lambda: said.append(go_on(model, cache))))
        thread.start()
        assert inside.wait(30)
        hook.remove()
        with pytest.raises(ValueError, match=f"{CACHE}: expected one that no other call is filling"):
            model(IDS[:1, HELD : HELD + 3], **{CACHE: cache})
        over.set()
        thread.join()
        assert torch.allclose(*said[0], atol=1e-4)
        assert torch.allclose(*go_on(model, cache, start=HELD + 3), atol=1e-4)


@torch.no_grad()
def test_weights_are_read_once(monkeypatch):
    model, reads, sums = make(), [], _weights._sum
    monkeypatch.setattr(_weights, "_sum", lambda x: reads.append(x) or sums(x))
    go_on(model, fill(model))
    once = len(reads)
    model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert len(reads) == once > 0
    model.model.norm.weight.mul_(2)
    model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert len(reads) == 2 * once


@torch.no_grad()
def test_a_name_tells_weights_apart_wherever_they_lie():
    def name(change=lambda model: None):
        model = make().model
        change(model)
        return name_of_weights(model, True)

    last = "layers.2.mlp.down_proj.weight"
    assert name() == name()
    assert name() != name(lambda model: model.get_parameter(last)[-1, -1:].add_(1e-6))
    assert name() != name(lambda model: model.get_parameter(last).copy_(model.get_parameter(last).flip(0)))
    # Where there is no data, nothing is read.
    assert name(lambda model: model.to("meta")) != name()
    with torch.inference_mode():
        model = make()
        assert torch.allclose(*go_on(model, fill(model)), atol=1e-4)


@torch.no_grad()
def test_a_tensor_without_a_version_hides_no_other():
    decoder = make().model
    with torch.inference_mode():
        decoder.norm.weight = torch.nn.Parameter(decoder.norm.weight.clone(), requires_grad=False)
    before = name_of_weights(decoder, True)
    decoder.get_parameter("layers.2.mlp.down_proj.weight").mul_(2)
    assert name_of_weights(decoder, False) != before
