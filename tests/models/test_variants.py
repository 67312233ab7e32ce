"""Parts of a model switched off for a while, and what is measured of each beside the original."""

import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from liger_layers.calls import now
from liger_linear import __main__ as command
from liger_models import checkpoint, evaluate, measure_variants, perplexity, retrieval
from liger_models.cli import main
from liger_models.figures import FIGURES
from liger_models.harness import run_harness
from liger_models.retrieval import make_prompt
from liger_models.tasks import SIX_TASKS, TASKS
from liger_models.text import to_blocks
from liger_models.variants import VARIANTS, distinct_variants, exact_tokens, window_alone, without_recall
from tests.models.test_exactness import ids
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer


def test_recall_is_off_for_a_while_and_comes_back():
    model, plain = (linearize_tiny(tiny(), window=8, sinks=2, recall=n) for n in (3, 0))
    layer = model.model.layers[0].self_attn
    told = layer.origin
    with torch.no_grad():
        whole, wanted = model(ids(1, 40)).logits, plain(ids(1, 40)).logits
        assert not torch.equal(whole, wanted)
        with pytest.raises(RuntimeError), without_recall(model):
            assert now(layer).recall == 0 and torch.equal(model(ids(1, 40)).logits, wanted)
            raise RuntimeError
        assert now(layer).recall == 3 and now(layer).origin == told and torch.equal(model(ids(1, 40)).logits, whole)


def test_exact_tokens_are_those_of_layers_that_were_linearized():
    model = linearize_tiny(tiny("gemma2", sliding_window=200), window=8, sinks=2, recall=3)
    assert model.config.liger["pattern"][0] == "own" and exact_tokens(model) == 13
    assert "positions" in measure_variants(model, tiny_tokenizer(), TEXT, length=64, max_blocks=1)["variants"]["window"]
    assert exact_tokens(tiny()) == exact_tokens(linearize_tiny(tiny(), keep=range(3))) == 0


def test_variants_that_coincide_are_measured_once():
    model = linearize_tiny(tiny(), window=8, sinks=2)
    assert distinct_variants(tiny()) == ["everything"]
    assert distinct_variants(model) == ["window", "everything"]
    options = dict(length=32, max_blocks=2, figures=["perplexity"])
    found = measure_variants(model, tiny_tokenizer(), TEXT, **options)["variants"]
    figures = evaluate(model, tiny_tokenizer(), TEXT, length=32, max_blocks=2)
    assert list(found) == ["window", "everything"]
    assert found["everything"]["perplexity"] == figures["perplexity"] != found["window"]["perplexity"]
    assert found["window"]["perplexity"] == figures["perplexity_window_only"]
    model = linearize_tiny(tiny(), window=8, sinks=2, recall=3)
    found = measure_variants(model, tiny_tokenizer(), TEXT, **options)["variants"]
    assert list(found) == list(VARIANTS) == distinct_variants(model)
    assert len({row["perplexity"] for row in found.values()}) == 4
    assert found["window"]["perplexity"] == figures["perplexity_window_only"]
    assert found["no_recall"]["perplexity"] == figures["perplexity"]
    assert "perplexity_no_recurrence" not in figures
    figures = evaluate(model, tiny_tokenizer(), TEXT, length=32, max_blocks=2)
    assert found["window"]["perplexity"] == figures["perplexity_window_only"]
    assert found["no_recurrence"]["perplexity"] == figures["perplexity_no_recurrence"]
    assert list(measure_variants(model, tiny_tokenizer(), TEXT, variants=["window"], **options)["variants"]) == [
        "window"
    ]


@torch.no_grad()
def test_figures_are_those_of_the_formulas():
    original, model = tiny(), linearize_tiny(tiny(), window=8, sinks=2)
    for one in (original, model):
        # So that words differ in more than the last digits.
        one.lm_head.weight.mul_(50.0)
    found = measure_variants(model, tiny_tokenizer(), TEXT, original=original, length=48, max_blocks=2)
    assert found["exact"] == exact_tokens(model) == 10 and found["tokens"] == 2 * 47
    blocks = to_blocks(tiny_tokenizer(), TEXT, 48)[:2]
    p = original(blocks).logits[:, :-1].double().log_softmax(-1)
    assert set(found["variants"]) == {"original", "window", "everything"}
    assert {"kl", "agreement"}.isdisjoint(found["variants"]["original"])
    for name, row in found["variants"].items():
        with window_alone(model) if name == "window" else torch.no_grad():
            logits = (original if name == "original" else model)(blocks).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
        assert row["loss_beyond"] == pytest.approx(losses[:, 10:].mean().item(), rel=1e-5)
        assert row["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
        assert row["positions"][0]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-9)
        if name != "original":
            q = logits.double().log_softmax(-1)
            assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
            # The original's own words, token by token.
            agreed = 0
            for block in blocks:
                said = block[None, :24]
                for _ in range(32):
                    said = torch.cat([said, original(said).logits[:, -1:].argmax(-1)], 1)
                with window_alone(model) if name == "window" else torch.no_grad():
                    agreed += (model(said).logits[0, 23:-1].argmax(-1) == said[0, 24:]).sum().item()
            assert row["agreement"] == agreed / 64 and row["kl"] > 1e-3


def test_words_that_an_original_never_says_add_nothing_to_its_divergence():
    original, model = tiny(), linearize_tiny(tiny(), window=8, sinks=2)
    never = torch.zeros(97).index_fill(0, torch.tensor([96]), -torch.inf)
    original.lm_head.register_forward_hook(lambda module, args, out: out + never)
    found = measure_variants(model, tiny_tokenizer(), TEXT, original=original, length=48, max_blocks=1, figures=["kl"])
    assert 0 < found["variants"]["everything"]["kl"] < math.inf


@pytest.mark.parametrize("measure", [evaluate, measure_variants])
def test_a_model_that_breaks_off_learns_on_as_before(measure):
    model = linearize_tiny(tiny(), window=8, sinks=2).train()

    def fail(module, args, out):
        raise RuntimeError

    model.lm_head.register_forward_hook(fail)
    for options in (dict(), dict(contexts=[64])):
        with pytest.raises(RuntimeError):
            measure(model, tiny_tokenizer(), TEXT, length=32, max_blocks=1, **options)
        assert model.training


def test_a_window_as_long_as_the_text_agrees_with_the_original():
    model = linearize_tiny(tiny(), window=200, sinks=2)
    options = dict(length=48, max_blocks=2, figures=["agreement", "kl"])
    row = measure_variants(model, tiny_tokenizer(), TEXT, original=tiny(), **options)["variants"]["everything"]
    assert row["agreement"] == 1.0 and abs(row["kl"]) < 1e-6


def test_rows_of_unlike_lengths_count_by_position():
    rows = [{"prompt": TEXT[i : i + 3 * i], "completion": TEXT[:i]} for i in (3, 5, 9)]
    model = linearize_tiny(tiny(), window=8, sinks=2)
    found = measure_variants(model, tiny_tokenizer(), rows, length=40, figures=["positions", "perplexity"])
    row = found["variants"]["everything"]
    assert sum(part["tokens"] for part in row["positions"]) == found["tokens"] == 3 + 5 + 9 + 3
    mean = sum(part["tokens"] * math.log(part["perplexity"]) for part in row["positions"]) / found["tokens"]
    assert mean == pytest.approx(math.log(row["perplexity"]))


def test_every_value_under_a_name_is_to_be_found():
    filler = torch.full((600,), 20)
    prompt = make_prompt(tiny_tokenizer(), filler, 500, 1, 0.5, values=3)
    assert len(set(prompt.answers)) == 3
    text = "".join(tiny_tokenizer().convert_ids_to_tokens(prompt.ids)).replace("<unk>", "")
    places = [text.index(f"is{value}.") for value in prompt.answers if text.count(value) == 2]
    assert len(places) == 3 and places == sorted(places) and text.count("Onepasskeyofthe") == 3
    with pytest.raises(ValueError, match="values: expected 1 where there are several keys"):
        make_prompt(tiny_tokenizer(), filler, 100, 0, 0.5, keys=2, values=2)


@pytest.mark.parametrize("said", [2, 3])
def test_all_values_or_none(monkeypatch, said):
    model, tokenizer = tiny(), tiny_tokenizer()

    def generate(x, **options):
        text = "".join(tokenizer.convert_ids_to_tokens(x[0]))
        values = [part[:5] for part in text.split("Remember<unk>it:<unk>")[1:]]
        new = tokenizer(" and ".join(values[:said]))["input_ids"]
        assert len(new) <= options["generation_config"].max_new_tokens
        return torch.cat([x, torch.tensor([new])], 1)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, x: "".join(self.convert_ids_to_tokens(x)))
    assert retrieval(model, tokenizer, TEXT, 300, depths=2, values=3) == float(said == 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(figures=["speed"]), "figures: expected one of perplexity, positions, "),
        (dict(variants=["half"]), "variants: expected one of original, window, "),
        (dict(variants=["original"]), "variants: expected an original to measure"),
        (dict(figures=["passkey"]), "contexts: expected what passkey is measured with, got none"),
        (dict(figures=["kl"]), "original: expected what kl is measured with"),
        (dict(figures=["perplexity"], contexts=[16]), "figures: expected one that is measured with contexts"),
        (dict(contexts=[10**6]), "text: expected at least 1000000 tokens"),
        (dict(length=10), "length: expected more than 11 tokens"),
        (dict(max_blocks=0), "max_blocks: expected an integer >= 1"),
        (dict(contexts=[40], values=99), "values: expected 1 to 8"),
        (dict(original=tiny(vocab_size=99)), "original: expected a vocabulary of 97, got 99"),
        (dict(examples=3), "tasks: expected tasks whose first 3 examples are asked for, got none"),
        (dict(tasks_from="x"), "tasks: expected tasks to read from the folder, got none"),
        (dict(tasks=["piqa"]), "tasks: expected a folder of JSONL files .* pip install 'liger-linear.eval.'"),
        (dict(tokenizer=None), "tokenizer: expected the model's tokenizer, got None"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line(monkeypatch, options, match):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = dict(tokenizer=tiny_tokenizer(), length=32) | options
    with pytest.raises(ValueError, match=match):
        measure_variants(linearize_tiny(tiny(), window=8, sinks=2), text=TEXT, **options)


def test_what_has_no_tokens_is_one_line():
    for call in (evaluate, retrieval):
        with pytest.raises(ValueError, match="tokenizer: expected the model's tokenizer, got None"):
            call(tiny(), None, TEXT, length=32)
    for wrong, given in ((ids(1, 8)[0], r"torch.int64 \(8,\)"), (torch.ones(2, 8), "torch.float32"), ([1, 2], "list")):
        with pytest.raises(ValueError, match=rf"blocks: expected token ids \[n, length\] or rows .*, got {given}"):
            perplexity(tiny(), wrong)


def test_tokens_are_predictions():
    assert evaluate(tiny(), tiny_tokenizer(), TEXT, length=32, max_blocks=3)["tokens"] == 3 * 31


def stub(monkeypatch, results):
    """A harness that notes what it is asked."""
    asked = {}

    def simple_evaluate(**options):
        asked.update(options)
        if "unknown" in options["tasks"]:
            raise KeyError("unknown")
        return {"results": results}

    hugging = types.ModuleType("lm_eval.models.huggingface")
    hugging.HFLM = lambda **options: options
    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate
    for name, module in (("lm_eval", harness), ("lm_eval.models", types.ModuleType("m")), (hugging.__name__, hugging)):
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_the_harness_measures_the_model_at_hand(monkeypatch):
    row = {"alias": "piqa", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75}
    row["exact_match,strict"] = 0.25
    asked = stub(monkeypatch, {"piqa": row, "long": {"perplexity,none": 3.0}})
    model, tokenizer = linearize_tiny(tiny(), window=8), tiny_tokenizer()
    found = run_harness(model, tokenizer, ["piqa", "long"], examples=7, shots=2)
    assert found["piqa"] == dict(examples=7, acc=0.5, acc_norm=0.75, exact_match_strict=0.25, score=0.75)
    assert found["long"] == dict(perplexity=3.0)
    assert asked["model"]["pretrained"] is model and asked["model"]["tokenizer"] is tokenizer
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["piqa", "long"], 7, 2)
    with pytest.raises(ValueError, match="tasks: lm-evaluation-harness refuses unknown"):
        run_harness(model, tokenizer, ["unknown"])
    options = dict(length=32, max_blocks=1, tasks=["piqa", "long"], original=tiny())
    found = measure_variants(model, tokenizer, TEXT, figures=["tasks"], **options)["variants"]
    assert all(row["average"] == 0.75 and row["share"] == 1.0 for row in found.values())


def test_the_command_lists_what_there_is():
    assert (tuple(FIGURES), tuple(VARIANTS)) == (command.FIGURES, command.VARIANTS)
    assert set(SIX_TASKS) < set(TASKS)


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "original")
    checkpoint.save(linearize_tiny(tiny(), window=8, sinks=2), tiny_tokenizer(), tmp_path / "small")
    (tmp_path / "text.txt").write_text(TEXT)
    # Of the first two, whoever chooses is right once.
    rows = [dict(goal="sort", sol1="by hand", sol2="not at all", label=label) for label in (0, 1, 0)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_one_command_writes_json_markdown_and_a_picture(folder, capsys):
    given = ["evaluate", str(folder / "small"), "--text", str(folder / "text.txt"), "--length", "32"]
    given += ["--max-blocks", "2", "--original", str(folder / "original"), "--contexts", "64,128", "--depths", "1"]
    given += ["--tasks", "piqa", "--tasks-from", str(folder), "--examples", "2", "--values", "2"]
    report = folder / "report"
    for _ in range(2):
        assert main([*given, "--report", str(report), "--json", str(folder / "x.json")]) == 0
    said = capsys.readouterr().out
    assert "| | original | window | everything |" in said and "| task piqa (2 examples) | " in said
    assert sorted(p.name for p in report.iterdir()) == ["report.json", "report.md", "report.png"]
    found = json.loads((report / "report.json").read_text())
    assert found["variants"].keys() == json.loads((folder / "x.json").read_text())["variants"].keys()
    row = found["variants"]["everything"]
    assert {"passkey_64", "multikey_128", "multivalue_64", "kl", "agreement", "loss_beyond", "share"} < set(row)
    assert row["tasks"]["piqa"]["examples"] == 2 and row["average"] == 0.5 and row["share"] == 1.0
    text = (report / "report.md").read_text()
    assert "| passkey 64 | " in text and "| window | " in text and "report.png" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "3", "--figures", "kl"], "examples: expected --tasks beside it, got none"),
        (["--passage", "3", "--tasks", "piqa"], "passage: expected --tasks-from beside it, got none"),
        (["--values", "3", "--variants", "window"], "values: expected --contexts beside it, got none"),
        (["--values", "3", "--contexts", "40"], "values: expected one of --original, --figures"),
        (["--json", "{0}"], "json: expected a file in a folder"),
        (["--markdown", "{0}/none/x.md"], "markdown: expected a file in a folder"),
        (["--report", "{0}/original"], "report: expected a new folder or an earlier report's"),
        (["--tasks", "chess", "--tasks-from", "{0}"], "tasks: expected one of piqa, arc_easy, "),
        (["--tasks", "copa", "--tasks-from", "{0}"], "tasks_from: expected a file copa.jsonl for copa"),
        (["--original", "{0}/nothing"], "model: expected a folder"),
        (["--figures", "passkey", "--contexts", "0"], "length: expected at least one token of filler"),
    ],
)  # fmt: skip
def test_bad_words_are_one_line_and_leave_nothing(folder, capsys, arguments, message):
    before = sorted(folder.rglob("*"))
    given = ["evaluate", str(folder / "small"), "--text", str(folder / "text.txt"), "--length", "32"]
    assert main([*given, *(a.format(folder) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("liger: ") and message in error
    assert sorted(folder.rglob("*")) == before
