"""The associative-recall benchmark: its data say what they claim, and a short run of every row finishes."""

import json

import pytest
import torch

from benchmarks import recall


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
    sizes = {name: recall.summary(name, [{"rate": 1e-2, "accuracy": 0.5, "training_s": 1.0}]) for name in recall.ROWS}
    assert sizes["gla"]["active_state"] == sizes["deltanet"]["active_state"] == sizes["gated_deltanet"]["active_state"]
    mom, *singles = (name for name in sizes if "memor" in name)
    assert singles and all(sizes[mom]["active_state"] == sizes[name]["active_state"] for name in singles)
    for name, row in sizes.items():
        cache = recall.build(name).eval()(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
        assert sum(x.numel() for x in cache.layers[0].state.memories) == row["state"]


def test_a_quick_run_reports_every_row(tmp_path, capsys):
    recall.main(["--quick", "--out", str(tmp_path / "recall.json")])
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "recall.json").read_text())
    assert set(result["rows"]) == set(recall.ROWS)
    assert all(name in table and 0 <= row["accuracy"] <= 1 for name, row in result["rows"].items())
