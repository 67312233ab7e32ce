"""The associative-recall benchmark: its data say what they claim, and a short run of every row finishes."""

import json

import pytest
import torch

from benchmarks import recall
from liger_models._inputs import CACHE


@pytest.mark.parametrize(("pairs", "length"), [(4, 32), (32, 256)])
def test_labels_are_the_values_of_the_keys_asked_for(pairs, length):
    ids, labels = recall.draw(20, pairs, length, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (20, length)
    asked = set()
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and all(0 <= key < recall.KEYS for key in keys)
        assert all(recall.KEYS <= value < recall.KEYS + recall.VALUES for value in values)
        told = dict(zip(keys, values, strict=True))
        assert wanted[: 2 * pairs] == [-100] * (2 * pairs)
        assert wanted[2 * pairs :] == [told[key] for key in row[2 * pairs :]]
        asked |= {keys.index(key) for key in row[2 * pairs :]}
    assert asked == set(range(pairs))


def test_every_seed_draws_its_own_rows():
    a, b, c = (recall.draw(4, 8, 64, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_rows_compare_states_of_equal_size():
    sizes = {name: recall.summary(name, [{"accuracy": 0.5, "training_s": 1.0}]) for name in recall.ROWS}
    assert sizes["gla"]["active_state"] == sizes["deltanet"]["active_state"] == sizes["gated_deltanet"]["active_state"]
    for width in (16, 32):
        rows = [row for row in sizes.values() if row["width"] == width]
        touched = [row["active_state"] for row in rows if row["mixer"] == "mom"]
        assert touched == [3 * width**2] * 2
        assert sum(row["state"] == touched[0] for row in rows) == 2
    for name, row in sizes.items():
        cache = recall.build(name).eval()(torch.zeros(1, 3, dtype=torch.long), use_cache=True)[CACHE]
        assert sum(x.numel() for x in cache.layers[0].state.memories) == row["state"]


def test_muon_takes_matrices_between_hidden_states_that_are_no_gates():
    model = recall.build("MoM, 4 memories, top 2, shared")
    named = {id(p): name for name, p in model.named_parameters()}
    (muon, adamw), _ = recall.optimizers(model, 10)
    taken = [{named[id(p)] for group in x.param_groups for p in group["params"]} for x in (muon, adamw)]
    assert not taken[0] & taken[1] and taken[0] | taken[1] == set(named.values())
    matrices = [*(f"mixer.{x}_proj" for x in "qkvgo"), "mlp.up_proj", "mlp.down_proj"]
    assert taken[0] == {f"model.layers.{i}.{name}.weight" for i in range(2) for name in matrices}


def test_a_quick_run_reports_every_row(tmp_path, capsys):
    recall.main(["--quick", "--out", str(tmp_path / "recall.json")])
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "recall.json").read_text())
    assert set(result["rows"]) == set(recall.ROWS)
    assert all(name in table and 0 <= row["accuracy"] <= 1 for name, row in result["rows"].items())
