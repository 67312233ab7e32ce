"""A model's folder is looked at before it is read, runs no code, and what cannot be used is one line at once."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from liger_models import LigerConfig, _folders, checkpoint, generate, linearize_on_disk, perplexity, select_layers
from liger_models.cli import main
from tests.models import hostile
from tests.models.hostile import change, elsewhere
from tests.models.mutations import contents, damaged
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    return checkpoint.save(tiny(), tiny_tokenizer(chat_template=CHAT), tmp_path / "model")


def refused(capsys, *arguments):
    """The one line of a command that fails at its first look."""
    capsys.readouterr()
    start = time.perf_counter()
    assert main([str(x) for x in arguments]) == 2
    assert time.perf_counter() - start < 15
    told = [line for line in capsys.readouterr().err.split("\n") if "liger: " in line]
    assert len(told) == 1
    return told[0]


def in_both_ways(folder, capsys):
    """What loading and linearizing on disk say, which is alike."""
    lines = [
        refused(capsys, "generate", folder, "the"),
        refused(capsys, "linearize", folder, "--on-disk", "--out", folder.parent / "out"),
    ]
    assert not (folder.parent / "out").exists()
    return lines


@pytest.mark.parametrize(("damage", "message"), hostile.FILES)
def test_files_that_are_not_to_be_read(folder, capsys, damage, message):
    damage(folder)
    for line in in_both_ways(folder, capsys):
        assert line.startswith("liger: model: could not load ")
        assert re.search(message, line), line


@pytest.mark.parametrize("header", hostile.HEADERS)
@pytest.mark.parametrize("size", [None, 1 << 40])
def test_headers_of_weights(folder, capsys, header, size):
    content = (size or len(header)).to_bytes(8, "little") + header.encode()
    (folder / "model.safetensors").write_bytes(content)
    for line in in_both_ways(folder, capsys):
        assert re.search("model: could not (load|read the weights in) .*eader", line), line


def test_links_within_a_folder_and_the_cache_of_the_hub_are_read(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "config.json").rename(folder / "other")
    (folder / "config.json").symlink_to("other")
    checkpoint.load(tmp_path / "link")
    repository = tmp_path / "models--x--y"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0a1b"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    model, _ = checkpoint.load(snapshot)
    linearize_on_disk(snapshot, tmp_path / "out", pattern="W")
    assert model.config.vocab_size == 97 and not (tmp_path / "out" / "config.json").is_symlink()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "other")
    with pytest.raises(ValueError, match=r"config.json: expected a file of .*models--x--y, got a link to"):
        checkpoint.load(snapshot)


def test_what_is_copied_is_of_the_folder(folder, tmp_path):
    """A file that no loader reads stays out of its way, but does not go along."""
    elsewhere(folder / "LICENSE")
    checkpoint.load(folder)
    with pytest.raises(ValueError, match="LICENSE: expected a file of"):
        linearize_on_disk(folder, tmp_path / "out", pattern="W")


def test_beside_a_gguf_file_only_settings_are_looked_at(tmp_path):
    os.mkfifo(tmp_path / "notes.txt")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    _folders.check_beside(tmp_path / "x.gguf")
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: expected a plain file, got a pipe"):
        checkpoint.load(tmp_path / "x.gguf")


def test_adapters_of_themselves_are_one_line(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)})
    )
    assert "could not load" in refused(capsys, "generate", tmp_path, "the")


@pytest.fixture
def with_code(folder, monkeypatch):
    """A folder whose config, model and tokenizer come with code that leaves a mark."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    hostile.bring_code(folder)
    return folder


def test_code_is_not_run_where_it_is_not_needed(with_code):
    model, tokenizer = checkpoint.load(with_code)
    assert type(model).__name__ == "LlamaForCausalLM" and generate(model, tokenizer, "the", max_new_tokens=2)
    assert not (with_code / "ran").exists()


@pytest.mark.parametrize(("name", "settings"), hostile.CODE_NEEDED)
def test_code_that_is_needed_is_refused_unless_it_is_trusted(with_code, capsys, name, settings):
    change(with_code, name, **settings)
    line = refused(capsys, "generate", with_code, "the")
    assert "which runs with --trust-remote-code (trust_remote_code=True) alone" in line
    assert not (with_code / "ran").exists()
    model, tokenizer = checkpoint.load(with_code, trust_remote_code=True)
    assert (with_code / "ran").exists()
    assert type(model if name == "config.json" else tokenizer).__name__.startswith("Their")


def test_code_does_not_go_along(with_code, capsys):
    out = linearize_on_disk(with_code, with_code.parent / "out", pattern="W")
    assert {path.name for path in out.glob("*.py")} == {"modeling_liger.py"}
    names = json.loads((out / "config.json").read_text())["auto_map"].values()
    assert {name.partition(".")[0] for name in names} == {"modeling_liger"}
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    checkpoint.load(out)
    words = "linearize", with_code, "--on-disk", "--out", out, "--overwrite", "--pattern", "W"
    assert "on-disk: expected no --trust-remote-code" in refused(capsys, *words, "--trust-remote-code")
    change(with_code, "tokenizer_config.json", tokenizer_class="TheirTokenizer")
    assert "model: expected a tokenizer that needs no code of its own" in refused(capsys, *words)
    assert not (with_code / "ran").exists()


def test_damage_is_one_line_or_harmless(folder, tmp_path, capsys):
    """Whatever loads is used, in no more than a few seconds; LIGER_FUZZ=1000 tries more."""
    files, refusals, count = contents(folder), 0, int(os.environ.get("LIGER_FUZZ", 100))
    (tmp_path / "text.txt").write_text(TEXT)
    use = ["generate", str(folder), "the quick", "--max-new-tokens", "2"]
    measure = ["evaluate", str(folder), "--text", str(tmp_path / "text.txt"), "--length", "32", "--max-blocks", "1"]
    for name, what, content in damaged(files, count):
        (folder / name).write_bytes(content)
        start = time.perf_counter()
        for words in (use, measure):
            found = main(words)
            lines = [line for line in capsys.readouterr().err.split("\n") if "liger: " in line]
            assert (found, len(lines)) in ((0, 0), (2, 1)), (name, what)
            if found:
                break
        assert time.perf_counter() - start < 15, (name, what)
        refusals += found == 2
        (folder / name).write_bytes(files[name])
    assert 0.5 * count < refusals < 0.9 * count


@pytest.mark.parametrize(
    ("name", "settings", "message"), hostile.SETTINGS, ids=lambda x: ",".join(x) if isinstance(x, dict) else ""
)
def test_settings_that_use_would_trip_over(folder, capsys, name, settings, message):
    # Which would stand for any in the settings.
    (folder / "chat_template.jinja").unlink()
    change(folder, name, **settings)
    line = refused(capsys, "evaluate", folder)
    assert line.startswith("liger: model: could not load ") and re.search(message, line), line


@pytest.mark.parametrize("window", [{}, 0, -1, 10**30])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_windows_that_are_none(tmp_path, capsys, name, window):
    folder = checkpoint.save(tiny(name), tiny_tokenizer(), tmp_path / "model")
    change(folder, "config.json", sliding_window=window)
    assert "sliding_window" in refused(capsys, "generate", folder, "the")
    # Of a family that reads none.
    folder = checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "llama")
    change(folder, "config.json", sliding_window=0)
    checkpoint.load(folder)


@pytest.mark.parametrize("name", ["window", "sinks", "recall"])
def test_more_exact_tokens_than_memory_holds(tmp_path, capsys, name):
    folder = checkpoint.save(linearize_tiny(tiny(), window=8), tiny_tokenizer(), tmp_path / "model")
    liger = json.loads((folder / "config.json").read_text())["liger"]
    change(folder, "config.json", liger=liger | {name: 2**31})
    assert f"{name}: expected at most 1,048,576 tokens, got 2147483648" in refused(capsys, "generate", folder, "the")


@pytest.mark.parametrize("chosen", [-1, 0, 5, "x", True])
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_more_experts_than_there_are(tmp_path, capsys, name, chosen):
    folder = checkpoint.save(tiny(name), tiny_tokenizer(), tmp_path / "model")
    change(folder, "config.json", num_experts_per_tok=chosen)
    assert "num_experts_per_tok" in refused(capsys, "generate", folder, "the")


def test_a_tokenizer_that_knows_more_than_its_model(tmp_path, capsys):
    folder = checkpoint.save(tiny(vocab_size=30), tiny_tokenizer(), tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", tmp_path / "text.txt", "--length", "32"]
    for words in (
        ["generate", folder, "the quick"],
        ["evaluate", folder, *text],
        ["evaluate", folder, *text, "--figures", "kl", "--original", folder],
        ["evaluate", folder, *text, "--contexts", "64"],
        ["finetune", folder, *text, "--out", tmp_path / "out", "--steps", "1"],
    ):
        assert "tokenizer: expected ids below the model's 30, got " in refused(capsys, *words), words
    with pytest.raises(ValueError, match="tokenizer: expected ids below the model's 30"):
        select_layers(tiny(vocab_size=30), TEXT, 1, tokenizer=tiny_tokenizer(), length=128)


def test_weights_of_which_products_are_no_numbers(folder, capsys):
    words = "linearize", folder, "--out", folder.parent / "out", "--mix"
    for mix in ("1e300", "1e38"):
        assert "mix: expected a weight >= 0 of at most 1e+09" in refused(capsys, *words, mix)
    model = linearize_tiny(tiny(), config=LigerConfig(window=8, recall=0, mix=1e9))
    assert perplexity(model, torch.randint(3, 97, (2, 64))) < 1e9


@pytest.mark.parametrize(
    "raises", ["1 / 0", "raise SystemExit(3)", "raise BaseExceptionGroup", "def", "raise OSError('a\\nb')"]
)
def test_a_module_that_fails_is_one_line(tmp_path, monkeypatch, capsys, raises):
    (tmp_path / "broken_gates.py").write_text(raises)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "--import", "broken_gates", "generate", "nowhere", "the")
    assert line.startswith("liger: import: could not import 'broken_gates': ")


def test_a_traceback_is_there_for_whoever_asks(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGER_DEBUG", "1")
    with pytest.raises(ValueError, match=r"expected a folder with a config.json"):
        main(["generate", str(tmp_path), "the"])
