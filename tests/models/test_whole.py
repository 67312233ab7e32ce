"""Folders that are written whole or not at all: what was there is lost to nobody, whoever else writes or is killed."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from liger_models import _whole, checkpoint
from liger_models._whole import check_output, write_json, written_whole
from tests.models.tiny import tiny, tiny_tokenizer

CONFIG = json.dumps({"model_type": "llama"})


def model(folder: Path, **files: str) -> Path:
    """A folder with the config of a model, and files by stem."""
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_text(content)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, content: str = "new", overwrite: bool = True) -> None:
    with written_whole(folder, overwrite) as part:
        (part / "config.json").write_text(CONFIG)
        (part / "model.safetensors").write_text(content)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "model"
    with pytest.raises(OSError, match="No space left"), written_whole(out) as part:
        (part / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []
    write(out, overwrite=False)
    with pytest.raises(ValueError, match="exists; pass --overwrite"):
        check_output(out, overwrite=False)
    with pytest.raises(OSError), written_whole(out, overwrite=True) as part:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(out) == ["config.json", "model.safetensors"]
    with written_whole(out, overwrite=True) as part:
        (part / "tokenizer.json").write_text("x")
    assert names(out) == ["tokenizer.json"]
    assert names(tmp_path) == ["model"]


def test_overwrite_replaces_models_only(tmp_path):
    for name, content in (
        ("thesis", "x"),
        ("config.json", "{}"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"compilerOptions": {}}'),
    ):
        (tmp_path / "thesis").mkdir(exist_ok=True)
        (tmp_path / "thesis" / name).write_text(content)
        with pytest.raises(ValueError, match="out: expected a model's folder to replace"):
            check_output(tmp_path / "thesis", overwrite=True)
    checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "model")
    checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "model", overwrite=True)
    assert all(map(_whole._KNOWN.fullmatch, names(tmp_path / "model")))


def test_what_is_not_a_models_stays_where_it_is(tmp_path):
    out = model(tmp_path / "out", model="old", data="kept", pytorch_model="old")
    (out / ".git" / "objects").mkdir(parents=True)
    (out / ".git" / "objects" / "pack").write_text("history")
    (out / "README.md").write_text("mine")
    (out / "link").symlink_to("README.md")
    (out / "original").mkdir()
    checkpoint.save(tiny(), tiny_tokenizer(), out / "original" / "source")
    before = (out / "data.safetensors").stat()
    with written_whole(out, overwrite=True) as part:
        (part / "model.safetensors").write_text("new")
        (part / "README.md").write_text("another's")
    kept = [".git", "README.md", "README.md.old", "data.safetensors", "link", "model.safetensors", "original"]
    assert names(out) == kept and (out / "model.safetensors").read_text() == "new"
    # Two of one model go together.
    assert (out / "README.md").read_text() == "another's" and (out / "README.md.old").read_text() == "mine"
    assert (out / ".git" / "objects" / "pack").read_text() == "history" and (out / "link").is_symlink()
    assert os.path.samestat(before, (out / "data.safetensors").stat())
    assert (out / "original" / "source" / "config.json").is_file() and names(tmp_path) == ["out"]


@pytest.mark.parametrize("linked", [True, False])
def test_what_is_written_meanwhile_stays_too(tmp_path, monkeypatch, linked):
    out, exchange = model(tmp_path / "out", model="old"), _whole._exchange
    (out / "runs").mkdir()
    for name in ("runs/log", "notes"):
        (out / name).write_text("early")

    def late(part, folder):
        (out / "runs" / "log").unlink()
        for name in ("runs/log", "runs/more", "other"):
            (out / name).write_text("late")
        exchange(part, folder)

    def unable(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(_whole, "_exchange", late)
    if not linked:
        monkeypatch.setattr(os, "link", unable)
    write(out)
    found = {name: (out / name).read_text() for name in ("runs/log", "runs/more", "other", "notes")}
    assert found == {"runs/log": "late", "runs/more": "late", "other": "late", "notes": "early"}
    assert (out / "model.safetensors").read_text() == "new" and names(tmp_path) == ["out"]


def test_a_private_folder_stays_private(tmp_path):
    out = model(tmp_path / "out")
    out.chmod(0o700)
    write(out)
    assert out.stat().st_mode & 0o777 == 0o700


def test_links_in_a_loop_are_one_line(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(ValueError, match="out: could not follow"):
        write(tmp_path / "out")


def test_a_disk_that_is_full_is_an_os_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, usual)
    assert names(tmp_path) == []


@pytest.mark.parametrize("exchanged", [True, False])
def test_an_interruption_between_the_names_loses_nothing(tmp_path, monkeypatch, exchanged):
    out = model(tmp_path / "out", model="old")
    if not exchanged:
        monkeypatch.setattr(_whole.sys, "platform", "elsewhere")
        write(out, "newer")
        assert (out / "model.safetensors").read_text() == "newer"
        rename = Path.rename

        def broken(path, other):
            if path.suffix == ".part":
                raise KeyboardInterrupt
            return rename(path, other)

        monkeypatch.setattr(Path, "rename", broken)
    else:
        monkeypatch.setattr(_whole, "_exchange", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(out, "newest")
    assert (out / "model.safetensors").read_text() == ("old" if exchanged else "newer") and names(tmp_path) == ["out"]


def test_nobody_is_replaced_who_appears_meanwhile(tmp_path):
    with (
        pytest.raises(ValueError, match="appeared while it was written; it stays as it is"),
        written_whole(tmp_path / "out") as part,
    ):
        (part / "config.json").write_text(CONFIG)
        model(tmp_path / "out", model="another's")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "another's" and names(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="out: expected a model's folder"), written_whole(tmp_path / "b", True) as part:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "thesis").write_text("x")
    assert names(tmp_path / "b") == ["thesis"]


CHILD = """
import sys, time
from liger_models._whole import written_whole
with written_whole(sys.argv[1], True) as part:
    (part / "model.safetensors").write_text("half")
    print(flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing tmp_path / "out"."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "out")], stdout=subprocess.PIPE)
    child.stdout.readline()
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_two_do_not_write_one_folder(tmp_path, writer):
    out = model(tmp_path / "out", model="old")
    with pytest.raises(ValueError, match="out: expected a folder that no other process is writing"):
        write(out)
    # A name of which the other is the beginning is another's.
    write(tmp_path / "out.b")
    assert (out / "model.safetensors").read_text() == "old"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(names(tmp_path)) == 4
    write(out)
    assert (out / "model.safetensors").read_text() == "new" and names(tmp_path) == ["out", "out.b"]


def test_what_killed_processes_left_is_put_right(tmp_path, caplog):
    model(tmp_path / ".out.abcdefgh.old", model="old")
    (tmp_path / ".out.abcdefgh.part").mkdir()
    # Those of other folders.
    (tmp_path / ".out.b.abcdefgh.part").mkdir()
    with pytest.raises(ValueError, match=r"out: .* exists; pass --overwrite"):
        write(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == [".out.b.abcdefgh.part", "out"]
    assert "was put back" in caplog.text and "removed" in caplog.text


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_ordinary_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        checkpoint.save(tiny(), tiny_tokenizer(), tmp_path / "model")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o666 & ~mask}


def test_everything_is_on_the_disk_before_it_has_a_name(tmp_path, monkeypatch):
    synced, put, fsync, place = set(), [], os.fsync, _whole._put

    def watched(number):
        synced.add(os.fstat(number).st_ino)
        fsync(number)

    def put_then(part, *args):
        put.append({path.stat().st_ino for path in (part, *part.rglob("*"))} <= synced)
        place(part, *args)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(_whole, "_put", put_then)
    with written_whole(tmp_path / "out") as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text("x")
    assert put == [True] and tmp_path.stat().st_ino in synced


def test_a_disk_that_fails_to_hold_it_is_told(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = model(tmp_path / "out", model="old")
    with pytest.raises(OSError, match="No space left"):
        write(out)
    assert (out / "model.safetensors").read_text() == "old" and names(tmp_path) == ["out"]


def test_json_is_json(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_json(path, {"a": [1.5, float("nan")], "b": (float("inf"), True, None), "c": {"d": "x"}})
    held = {"a": [1.5, None], "b": [None, True, None], "c": {"d": "x"}}
    assert json.loads(path.read_text(), parse_constant=lambda x: pytest.fail(x)) == held

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "link").symlink_to("figures.json")
    write_json(tmp_path / "link", [2])
    assert (tmp_path / "link").is_symlink() and json.loads(path.read_text()) == [2]
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, [3])
    assert json.loads(path.read_text()) == [2]
    monkeypatch.undo()
    path.chmod(0o600)
    write_json(path, [4])
    assert path.stat().st_mode & 0o777 == 0o600 and names(tmp_path) == ["figures.json", "link"]
    write_json(Path("/dev/null"), [5])
