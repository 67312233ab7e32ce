"""A model's folder is looked at before it is read, runs no code, and what cannot be used is one line at once."""

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

from liger_models import LigerConfig, _folders, checkpoint, generate, linearize_on_disk, perplexity, select_layers
from liger_models.cli import main
from tests.models.mutations import contents, damaged, nested
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    return checkpoint.save(tiny(), tiny_tokenizer(chat_template=CHAT), tmp_path / "model")


def change(folder, name, **settings):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


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


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def listen(path):
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.open(".", os.O_RDONLY)
        # A path of a socket is short.
        os.chdir(path.parent)
        opened.bind(path.name)
        os.fchdir(here)
        os.close(here)


def elsewhere(path):
    outside = path.parent.parent / "outside.json"
    outside.write_text("{}")
    path.symlink_to(outside)


def shards(name):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        held = {"lm_head.weight": name, "model.norm.weight": "a.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
        (folder / "sub").mkdir()
        os.mkfifo(folder / "sub" / "pipe")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced("config.json", os.mkfifo), "config.json: expected a plain file, got a pipe"),
        (replaced("tokenizer.json", os.mkfifo), "tokenizer.json: expected a plain file, got a pipe"),
        (replaced("model.safetensors", os.mkfifo), "model.safetensors: expected a plain file, got a pipe"),
        (replaced("merges.txt", listen), "merges.txt: expected a plain file, got a socket"),
        (replaced("vocab.json", lambda path: path.symlink_to("/dev/zero")), "got a link to /dev/zero"),
        (replaced("added_tokens.json", elsewhere), r"added_tokens.json: expected a file of .*/model, got a link to"),
        (replaced("config.json", lambda path: path.symlink_to("nothing")), "expected a plain file, got a link to noth"),
        (replaced("config.json", lambda path: path.symlink_to("config.json")), "config.json: "),
        (replaced("config.json", lambda path: path.write_text(nested(20_000))), "config.json: expected JSON that is"),
        (replaced("config.json", lambda path: path.write_text(nested(40))), "config.json: expected JSON that is at mo"),
        (replaced("generation_config.json", lambda path: path.write_text(nested(99))), "generation_config.json: expec"),
        (lambda folder: os.truncate(folder / "config.json", 1 << 25), "config.json: expected at most 16,777,216 bytes"),
        (lambda folder: os.truncate(folder / "tokenizer_config.json", 1 << 40), "tokenizer_config.json: expected at"),
        (shards("/etc/passwd"), "expected names of files below its folder, got '/etc/passwd'"),
        (shards("../outside"), "expected names of files below its folder, got '../outside'"),
        (shards("sub/pipe"), "pipe: expected a plain file, got a pipe"),
        (
            lambda folder: change(folder, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"]),
            "tokenizer_config.json: expected names of files below its folder",
        ),
    ],
)  # fmt: skip
def test_files_that_are_not_to_be_read(folder, capsys, damage, message):
    damage(folder)
    for line in in_both_ways(folder, capsys):
        assert line.startswith("liger: model: could not load ")
        assert re.search(message, line), line


@pytest.mark.parametrize("header", [nested(50_000), "[1]", "{", '{"x": {"dtype": "F32", "shape": [-1]}}', " " * 99])
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


CODE = """
from pathlib import Path
Path({!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class TheirConfig(LlamaConfig):
    model_type = "theirs"
class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
class TheirTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(folder, monkeypatch):
    """A folder whose config, model and tokenizer come with code that leaves a mark."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "theirs.py").write_text(CODE.format(str(folder / "ran")))
    auto = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    change(folder, "config.json", auto_map=auto)
    auto = {"AutoTokenizer": ["theirs.TheirTokenizer", "theirs.TheirTokenizer"]}
    change(folder, "tokenizer_config.json", auto_map=auto)
    return folder


def test_code_is_not_run_where_it_is_not_needed(with_code):
    model, tokenizer = checkpoint.load(with_code)
    assert type(model).__name__ == "LlamaForCausalLM" and generate(model, tokenizer, "the", max_new_tokens=2)
    assert not (with_code / "ran").exists()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("config.json", {"model_type": "theirs"}), ("tokenizer_config.json", {"tokenizer_class": "TheirTokenizer"})],
)
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
    ("name", "settings", "message"),
    [
        ("config.json", dict(num_hidden_layers=10**9), "num_hidden_layers: expected an integer from 1 to 2048, got 1"),
        ("config.json", dict(pad_token_id=10**30), "Padding_idx must be within num_embeddings"),
        ("config.json", dict(use_cache="x"), "use_cache"),
        ("config.json", dict(rms_norm_eps={}), "rms_norm_eps"),
        ("generation_config.json", dict(eos_token_id=[1, "x"]), r"eos_token_id: expected token ids, got \[1, 'x'\]"),
        ("generation_config.json", dict(bos_token_id={}), "bos_token_id: expected token ids, got {}"),
        ("generation_config.json", dict(output_hidden_states=1e300), "output_hidden_states: expected true or false"),
        ("generation_config.json", dict(num_beams=1.5), "num_beams: expected an integer >= 0, got 1.5"),
        ("generation_config.json", dict(repetition_penalty="x"), "repetition_penalty"),
        ("tokenizer_config.json", dict(model_max_length=""), "model_max_length: expected a number, got ''"),
        ("tokenizer_config.json", dict(chat_template=5), "chat_template: expected a text, got int"),
        ("tokenizer.json", dict(model={"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "?"}), "UNK"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
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
