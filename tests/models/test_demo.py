"""The demonstration measures in turns, by a clock of our own, compares like with like, and says what it will take."""

import json
import math
from itertools import pairwise

import pytest
import torch
from matplotlib import image

from liger_models import checkpoint, costs, demo, finetune, perplexity
from liger_models.costs import compare, measure_costs
from liger_models.evaluation import perplexity_by_position
from tests.models.test_exactness import ids
from tests.models.tiny import linearize_tiny, tiny, tiny_tokenizer


class Clock:
    """Time passes in forward passes alone, as each model's own function says, and twice as fast for the processor."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(costs, "_clock", lambda: (self.now, 2 * self.now))

    def watch(self, name, model, seconds):
        """seconds(length, number of earlier calls of that length by this model) pass in every forward pass."""

        def ran(module, args, kwargs):
            tokens = args[0]
            before = [t for n, t in self.calls if n == name and t.shape == tokens.shape]
            self.calls.append((name, tokens))
            self.now += seconds(tokens.shape[1], len(before))

        model.register_forward_pre_hook(ran, with_kwargs=True)
        return model


def watched(clock, a=lambda length, n: 1.0, b=lambda length, n: 1.0):
    return {"a": clock.watch("a", tiny(), a), "b": clock.watch("b", linearize_tiny(tiny(), window=8), b)}


def test_models_take_turns_on_the_same_tokens(monkeypatch):
    clock = Clock(monkeypatch)
    measure_costs(watched(clock), [30], rounds=3, decode_tokens=4)
    warm, calls = clock.calls[:4], clock.calls[4:]
    assert {name for name, _ in warm} == {"a", "b"} and warm[0][1].shape[1] == 30
    order = "".join(name for name, _ in calls)
    one, other = "ab" + "abbaabba", "ba" + "baabbaab"
    assert order == one + other + one
    for (_, x), (_, y) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(x, y)
    rounds = [calls[i : i + 10] for i in range(0, 30, 10)]
    for one, other in pairwise(rounds):
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(one, other, strict=True))


def test_medians_and_quartiles_are_of_what_the_clock_said(monkeypatch):
    clock = Clock(monkeypatch)
    # The first call of a length warms up; then one in five is met by something else, which no median sees.
    slow = {1: 1000.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}
    models = watched(clock, lambda length, n: slow.get(n, 2.0) if length > 1 else 0.004, lambda length, n: 0.5)
    found = measure_costs(models, [20], rounds=5, decode_tokens=3)
    (a,), (b,) = found["a"], found["b"]
    assert a["context"] == b["context"] == 20 and a["rounds"] == b["rounds"] == 5
    assert a["prefill_s"] == pytest.approx({"median": 3.0, "low": 2.0, "high": 4.0})
    assert a["prefill_process_s"] == pytest.approx({"median": 6.0, "low": 4.0, "high": 8.0})
    assert a["decode_ms"] == pytest.approx({"median": 4.0, "low": 4.0, "high": 4.0})
    assert b["decode_process_ms"]["median"] == pytest.approx(1000.0)
    # Keys and values of 3 layers, 2 heads of width 12, 20 tokens, float32; a constant state for the other.
    assert a["cache_bytes"] == 3 * 2 * 2 * 12 * 20 * 4
    (ratio,) = compare(found, "a", "b")
    assert ratio["prefill_s"] == ratio["prefill_process_s"] == pytest.approx(6.0)
    assert ratio["decode_ms"] == pytest.approx(0.008)
    assert ratio["cache_bytes"] == a["cache_bytes"] / b["cache_bytes"]


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch):
    clock = Clock(monkeypatch)

    def drifting(seconds):
        # Half as fast with every thousand seconds, whichever model runs.
        return lambda length, n: seconds * (1 + clock.now / 1000)

    found = measure_costs(watched(clock, drifting(8.0), drifting(4.0)), [16, 64], rounds=5, decode_tokens=4)
    assert found["a"][1]["prefill_s"]["median"] > 1.2 * found["a"][0]["prefill_s"]["median"]
    for row in compare(found, "a", "b"):
        assert row["prefill_s"] == pytest.approx(2.0, rel=0.05)
        assert row["decode_ms"] == pytest.approx(2.0, rel=0.05)


def test_rounds_go_on_until_the_time_is_spent(monkeypatch):
    clock = Clock(monkeypatch)
    found = measure_costs(watched(clock), [16], rounds=2, seconds=30.0, decode_tokens=4)
    # A round of two prefills and eight tokens takes ten seconds.
    assert found["a"][0]["rounds"] == 3


@pytest.mark.parametrize(("threads", "seen"), [(1, 1), (2, 2), (None, 3)])
def test_one_thread_measures_and_all_come_back(threads, seen):
    before, found, model = torch.get_num_threads(), set(), tiny()
    model.register_forward_pre_hook(lambda module, args: found.add(torch.get_num_threads()))
    torch.set_num_threads(3)
    try:
        measure_costs({"a": model}, [8], rounds=2, decode_tokens=1, threads=threads)
        assert found == {seen} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(contexts=[]), "contexts"),
        (dict(contexts=[0]), "contexts"),
        (dict(rounds=1), "rounds"),
        (dict(decode_tokens=0), "decode_tokens"),
        (dict(threads=0), "threads"),
        (dict(models={}), "models"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, match):
    with pytest.raises(ValueError, match=f"{match}: expected"):
        measure_costs(**(dict(models={"a": tiny()}, contexts=[16]) | options))


@pytest.mark.parametrize("first", [8, 16, 64])
def test_positions_average_to_the_whole(first):
    model, blocks = linearize_tiny(tiny(), window=8), ids(3, 50)
    rows = perplexity_by_position(model, blocks, first)
    assert [row["start"] for row in rows] == [0, *(s for s in (8, 16, 32) if s >= first and s < 50)]
    assert [row["stop"] for row in rows] == [*(row["start"] for row in rows[1:]), 50]
    assert sum(row["tokens"] for row in rows) == 3 * 49
    mean = sum(row["tokens"] * math.log(row["perplexity"]) for row in rows) / (3 * 49)
    assert mean == pytest.approx(math.log(perplexity(model, blocks)), rel=1e-6)
    logits = model(blocks).logits[:, : rows[0]["stop"]][:, : rows[0]["tokens"] // 3].detach()
    targets = blocks[:, 1 : rows[0]["tokens"] // 3 + 1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert rows[0]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """(what it returned, its folder, what it said) of the whole journey, on a tiny model."""
    place = tmp_path_factory.mktemp("demo")
    checkpoint.save(tiny(), tiny_tokenizer(), place / "model", overwrite=False)
    text = place / "text.txt"
    generator = torch.Generator().manual_seed(0)
    text.write_text("".join(chr(97 + int(i)) for i in torch.randint(26, (9000,), generator=generator)))
    said, tunings = [], []

    def listen(model, tokenizer, text, **options):
        tunings.append((text, options))
        return finetune(model, tokenizer, text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_SECONDS", 0.0)
        patch.setattr(demo, "_WORDS", 8)
        patch.setattr(demo, "finetune", listen)
        patch.setattr(demo._Narrator, "__call__", lambda self, line: said.append(line))
        result = demo.run(str(place / "model"), text, place / "out", 2, [16, 64])
    assert len(tunings) == 2 and tunings[0] == tunings[1] and tunings[0][1]["steps"] == 2
    return result, place / "out", said


FIVE = ["original", "window only", "linearized", "linearized, tuned", "original, tuned alike"]


def test_all_five_are_compared_and_like_was_tuned_alike(demonstration):
    result, _, said = demonstration
    assert list(result["quality"]) == FIVE
    figures = {name: row["perplexity"] for name, row in result["quality"].items()}
    assert len(set(figures.values())) == 5
    assert figures["original, tuned alike"] < figures["original"]
    assert figures["linearized, tuned"] < figures["linearized"]
    assert [row["start"] for row in result["quality"]["original"]["by_position"]] == [0, 64, 128, 256]
    plan = next(i for i, line in enumerate(said) if "all this takes about" in line)
    first = next(i for i, line in enumerate(said) if "Held-out" in line)
    assert plan < first and all(stage in said[plan] for stage in ("fine-tuning", "costs", "linearizing"))


def test_the_report_has_every_part(demonstration):
    result, folder, _ = demonstration
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(result))
    text = (folder / "report.md").read_text()
    for name in FIVE:
        assert f"| {name} |" in text and f"{result['quality'][name]['perplexity']:.2f}" in text
    for part in (result["machine"]["processor"], result["date"], "process time", "ratios are of medians", "quartiles"):
        assert part in text
    for rows in result["costs"].values():
        assert [row["context"] for row in rows] == [16, 64] and all(row["rounds"] == 3 for row in rows)
    assert result["reloaded_logits_difference"] < 1e-5
    # One line of the table for each of five figures at each of two contexts.
    assert sum(line.count("|") == 6 for line in text.splitlines()) == 2 + 5 * 2


def test_the_picture_is_drawn(demonstration):
    _, folder, _ = demonstration
    picture = image.imread(folder / "report.png")
    assert picture.shape[0] > 800 and picture.shape[1] > 1200
    # Ink in each quarter: no panel is empty.
    for rows in torch.tensor(picture[..., :3]).chunk(2, 0):
        for quarter in rows.chunk(2, 1):
            assert (quarter.amax(-1) - quarter.amin(-1) > 0.3).float().mean() > 1e-3


def test_the_plan_grows_with_what_is_asked(monkeypatch):
    monkeypatch.setattr(demo, "_SECONDS", 0.0)
    model = tiny()
    stages = demo.plan(model, 10, [512], 4)
    assert set(stages) == {"perplexity", "linearizing", "fine-tuning", "costs", "a sample and saving"}
    assert all(seconds > 0 for seconds in stages.values())
    more = demo.plan(model, 100, [512, 8192, 32768], 4)
    assert more["fine-tuning"] > 2 * stages["fine-tuning"] and more["costs"] > 2 * stages["costs"]
