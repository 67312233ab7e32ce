"""The command line on a tiny local folder, from linearize to evaluate, and its one-line refusals."""

import json
import signal
import sys

import pytest

from liger_layers import RECURRENCES
from liger_models import checkpoint
from liger_models.cli import main
from tests.models.tiny import TEXT, tiny, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "original")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_the_whole_journey(folder, capsys):
    text = ["--text", str(folder / "text.txt")]
    small, tuned = str(folder / "small"), str(folder / "tuned")
    assert main(["linearize", str(folder / "original"), "--out", small, "--window", "8", "--keep", "1"]) == 0
    quick = ["--steps", "2", "--length", "32", "--batch", "2"]
    assert main(["finetune", small, "--out", tuned, *text, *quick]) == 0
    assert main(["generate", tuned, "the quick", "--max-new-tokens", "5"]) == 0
    report = folder / "figures.json"
    keys = ["--contexts", "64", "--depths", "2", "--keys", "3"]
    assert main(["evaluate", tuned, *text, *keys, "--length", "32", "--max-blocks", "3", "--json", str(report)]) == 0
    assert "perplexity_window_only" in capsys.readouterr().out
    figures = {"perplexity", "perplexity_window_only", "perplexity_no_recurrence", "tokens"}
    figures |= {"passkey_64", "multikey_64"}
    assert set(json.loads(report.read_text())) == figures
    assert sorted(p.name for p in folder.iterdir()) == ["figures.json", "original", "small", "text.txt", "tuned"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linearize", "{0}/original", "--out", "{0}/original"], "exists; pass --overwrite"),
        (["linearize", "{0}/nothing", "--out", "{0}/x"], "model: expected a folder, a .gguf file or a hub name"),
        (["linearize", "{0}/original", "--out", "{0}/x", "--keep", "9"], "keep: expected layer indices from -3 to 2"),
        (["evaluate", "{0}/original", "--text", "{0}/text.txt", "--length", "9999"], "text: expected at least"),
        (["evaluate", "{0}/original", "--text", "{0}/none.txt"], "text: could not read"),
        (["finetune", "{0}/original", "--out", "{0}/x", "--text", "{0}/text.txt", "--resume"], "resume: expected"),
        (["finetune", "{0}/original", "--out", "{0}/x", "--text", "{0}/text.txt", "--steps", "0"], "steps: expected"),
        (["finetune", "{0}/original", "--out", "{0}/x", "--text", "{0}/text.txt", "--batch", "0"], "batch: expected"),
        (["linearize", "{0}/original", "--out", "{0}/x", "--mix", "nan"], "mix: expected a weight"),
        (["linearize", "{0}/original", "--out", "{0}/mine", "--overwrite"], "out: expected a model's folder"),
        (["generate", "{0}/original", ""], "prompt: expected at least one token"),
        (["evaluate", "{0}/original", "--text", "{0}/text.txt", "--length", "0"], "length: expected blocks"),
        (["evaluate", "{0}/original", "--text", "{0}/text.txt", "--length", "9", "--max-blocks", "0"], "max_blocks: "),
        (["evaluate", "{0}/original", "--text", "{0}/text.txt", "--contexts", "9", "--depths", "0"], "depths: "),
        (["evaluate", "{0}/original", "--json", "{0}/none/x.json"], "json: expected a file in a folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, arguments, message):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis").write_text("precious")
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main([a.format(folder) for a in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("liger: ") and message in error
    assert sorted(folder.rglob("*")) == before


def test_an_interruption_that_a_library_makes_an_error_of_is_one(folder, monkeypatch, capsys):
    def lost(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise TypeError("could not determine the shape") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(checkpoint, "load", lost)
    assert main(["generate", str(folder / "original"), "the"]) == 130
    assert capsys.readouterr().err == "liger: interrupted\n" and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_damaged_weights_are_told(folder, capsys, value):
    """Of which the likeliest token would be a token, and a perplexity no JSON."""
    model = tiny()
    model.model.norm.weight.data.fill_(value)
    checkpoint.save(model, tiny_tokenizer(), folder / "damaged")
    before, (damaged, text) = sorted(folder.rglob("*")), (str(folder / "damaged"), str(folder / "text.txt"))
    evaluation = ["evaluate", damaged, "--text", text, "--length", "32", "--json", str(folder / "figures.json")]
    writing = (
        ["generate", damaged, "the quick"],
        ["generate", damaged, "the quick", "--sample"],
        ["draw", damaged, "--out", str(folder / "rows.jsonl"), "--tokens", "8"],
    )
    # Scores that are no likelihoods are scores all the same.
    for arguments in (evaluation, *(writing if value > 1e38 or value != value else ())):
        capsys.readouterr()
        assert main(arguments) == 2
        assert "its weights may be damaged" in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(folder.rglob("*")) == before


def test_a_folder_beside_the_output_is_not_ours_to_delete(folder, capsys):
    (folder / "x.checkpoints").mkdir()
    (folder / "x.checkpoints" / "mine").write_text("precious")
    arguments = ["--out", str(folder / "x"), "--text", str(folder / "text.txt"), "--steps", "1", "--length", "32"]
    assert main(["finetune", str(folder / "original"), *arguments]) == 2
    assert "checkpoints: expected a folder of checkpoints" in capsys.readouterr().err
    assert (folder / "x.checkpoints" / "mine").read_text() == "precious" and not (folder / "x").exists()


@pytest.mark.parametrize("command", [[], ["linearize"], ["finetune"], ["generate"], ["evaluate"]])
def test_help_reads_like_a_manual(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


def test_a_pattern_of_names_and_a_gate_from_a_module(folder, capsys, monkeypatch):
    source = "from liger_layers import RECURRENCES, register_gate\nregister_gate('mine', RECURRENCES['gla'].gate)\n"
    (folder / "my_gates.py").write_text(source)
    monkeypatch.chdir(folder)
    try:
        given = ["linearize", "original", "--out", "new", "--window", "8", "--pattern", "liger:mine,liger:gla,full"]
        assert main(given) == 2
        assert "pattern: expected liger, alone or with one of gla, " in capsys.readouterr().err
        assert main(["--import", "my_gates", *given]) == 0
        assert main(["--import", "my_gates", "generate", "new", "the quick", "--max-new-tokens", "2"]) == 0
        assert json.loads((folder / "new" / "config.json").read_text())["liger"]["pattern"] == [
            "liger:mine",
            "liger:gla",
            "full",
        ]
        assert main(["linearize", "original", "--out", "other", "--window", "8", "--pattern", "liger:mine"]) == 0
    finally:
        RECURRENCES.pop("mine", None)
        sys.modules.pop("my_gates", None)
    assert main(["--import", "no_gates", *given]) == 2
    assert "import: could not import 'no_gates'" in capsys.readouterr().err
    assert main(["linearize", "nowhere", "--out", "x", "--gate", "none"]) == 2
    assert "gate: expected one of gla, " in capsys.readouterr().err


def test_json_lines_are_rows_and_adapters_stand_for_their_model(folder, capsys):
    rows = [{"prompt": "the quick ", "completion": "brown fox"}, {"prompt": "over the ", "completion": "lazy dog"}] * 3
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small, adapters = str(folder / "small"), str(folder / "adapters")
    assert main(["linearize", str(folder / "original"), "--out", small, "--window", "8"]) == 0
    data = ["--text", str(folder / "rows.jsonl"), "--length", "32"]
    quick = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--no-merge",
        "--eval-text",
        str(folder / "rows.jsonl"),
        "--eval-steps",
        "1",
    ]
    capsys.readouterr()
    assert main(["finetune", small, "--out", adapters, *data, *quick]) == 0
    assert capsys.readouterr().out.count("eval_loss") == 2
    assert not (folder / "adapters" / "config.json").exists()
    figures = []
    for model in (small, adapters):
        assert main(["evaluate", model, *data, "--json", str(folder / "figures.json")]) == 0
        figures.append(json.loads((folder / "figures.json").read_text()))
    # Completions and the end of each, no prompt and no braces.
    assert [x["tokens"] for x in figures] == [3 * (10 + 9)] * 2
    assert figures[0]["perplexity"] != figures[1]["perplexity"]
    assert main(["evaluate", small, *data, "--contexts", "16"]) == 2
    assert "text: expected plain text to hide keys in" in capsys.readouterr().err
    (folder / "rows.jsonl").write_text("{")
    assert main(["evaluate", small, *data]) == 2
    assert "rows.jsonl, line 1: expected JSON" in capsys.readouterr().err
