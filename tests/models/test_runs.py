"""Runs of fine-tuning that are interrupted, in the middle of a checkpoint too, resume from the last that is whole."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch

from liger_models import _runs, _whole, checkpoint, cli, finetune
from liger_models._runs import Sealed, discard, last_whole
from liger_models._training import Interrupt
from liger_models._whole import claimed
from tests.models.test_finetune import QUICK, TEXT
from tests.models.tiny import linearize_tiny, tiny, tiny_tokenizer


def tune(store=None, change=None, **options):
    model = linearize_tiny(tiny(), window=8)
    if change:
        change(model)
    return finetune(model, tiny_tokenizer(), **{"text": TEXT, "steps": 6, "checkpoints": store} | options | QUICK)


def struck(patch, step):
    """From here on Ctrl-C is pressed in this step."""

    def strike(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Interrupt, "on_step_begin", strike)


def interrupt(monkeypatch, store, step, torn=False, **options):
    """A run that is interrupted in a step; torn: again before its checkpoint is whole."""
    with monkeypatch.context() as patch:
        struck(patch, step)
        if torn:
            patch.setattr(Sealed, "on_save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tune(store, **options)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_torn_checkpoint_is_none(tmp_path, monkeypatch, caplog):
    whole, store = tune(), tmp_path / "store"
    interrupt(monkeypatch, store, 2, torn=True)
    assert not store.exists()
    interrupt(monkeypatch, store, 2)
    interrupt(monkeypatch, store, 4, torn=True, resume=True)
    assert {path.name for path in store.iterdir()} == {"checkpoint-2", "checkpoint-4", "run.json"}
    assert last_whole(store) == str(store / "checkpoint-2")
    assert "checkpoint-4 is not whole" in caplog.text
    assert same(tune(store, resume=True), whole)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors"])
def test_a_checkpoint_that_lost_a_file_is_none(tmp_path, monkeypatch, name):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)
    held = (store / "checkpoint-2" / name).read_bytes()
    (store / "checkpoint-2" / name).write_bytes(held[:-1])
    assert last_whole(store) is None
    (store / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint in .* that is whole, found none"):
        tune(store, resume=True)
    # It is not removed either.
    (store / "checkpoint-2" / name).write_bytes(held)
    assert last_whole(store)


def test_another_run_is_not_resumed(tmp_path, monkeypatch):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)

    def other(model):
        torch.nn.init.normal_(model.model.embed_tokens.weight)

    for options, name in (
        (dict(text=TEXT.upper()), "text"),
        (dict(change=other), "weights"),
        (dict(change=torch.nn.Module.double), "dtype"),
        (dict(seed=3), "seed"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected .* as in the run to resume, got "):
            tune(store, resume=True, **options)
    for content in ("", "{", "[]", "null", "[" * 100_000):
        (store / "run.json").write_text(content)
        with pytest.raises(ValueError, match="resume: expected the settings of a run"):
            tune(store, resume=True)


def test_settings_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)
    before = (store / "run.json").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for module in (_runs, _whole):
            patch.setattr(module, "to_disk", full)
        struck(patch, 4)
        with pytest.raises(OSError, match="No space left"):
            tune(store, resume=True)
        with pytest.raises(OSError, match="No space left"):
            tune(tmp_path / "new")
    assert (store / "run.json").read_bytes() == before and last_whole(store) == str(store / "checkpoint-2")
    assert list((tmp_path / "new").iterdir()) == []
    # What a kill leaves instead is no stranger's.
    (tmp_path / "new" / ".run.json.abcd_123.part").write_text("{")
    tune(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)
    with claimed(store, "checkpoints"):
        with pytest.raises(ValueError, match="checkpoints: expected a folder that no other process is writing"):
            tune(store, resume=True)
        discard(store)
    assert last_whole(store)
    discard(store)
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_a_folder_that_goes_can_be_resumed(tmp_path, monkeypatch):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)

    def struck_first(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_runs.shutil, "rmtree", struck_first)
        with pytest.raises(KeyboardInterrupt):
            discard(store)
    assert same(tune(store, resume=True), tune())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, name):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)
    place = store / "checkpoint-2" / name
    place.write_bytes(bytes(place.stat().st_size))
    with pytest.raises(ValueError, match=r"^checkpoints: could not go on from .*checkpoint-2: [^\n]*$"):
        tune(store, resume=True)


@pytest.mark.parametrize(
    "change", [dict(global_step=3), dict(total_flos=None), dict(max_steps="6"), dict(log_history=[1])], ids=str
)
def test_a_state_that_the_trainer_would_trip_over_is_one_line(tmp_path, monkeypatch, change):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)
    place = store / "checkpoint-2" / "trainer_state.json"
    state = json.loads(place.read_text()) | change
    place.write_text(json.dumps(state))
    (store / "checkpoint-2" / "whole.json").write_text(json.dumps({place.name: place.stat().st_size}))
    with pytest.raises(ValueError, match=rf"^checkpoints: could not go on from .*: {next(iter(change))}: expected"):
        tune(store, resume=True)


def test_a_checkpoint_that_the_disk_does_not_hold_is_an_os_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"^checkpoints: could not write one: [^\n]*pos 64 vs 0$"):
        tune(tmp_path / "store", callbacks=[_runs.SavedAtTheEnd()])


def test_what_somebody_else_left_is_not_touched(tmp_path, monkeypatch):
    """A file of the same name, a folder that was empty, and one behind a link."""
    mine = tmp_path / "mine"
    mine.mkdir()
    tune(mine)
    (mine / "run.json").write_text('{"distance": 10}')
    with pytest.raises(ValueError, match=r"checkpoints: expected a folder of checkpoints, got .* holds run.json"):
        tune(mine)
    discard(mine)
    assert [path.name for path in mine.iterdir()] == ["run.json"]
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real").mkdir()
    interrupt(monkeypatch, tmp_path / "link", 2)
    (tmp_path / "real" / "checkpoint-1").symlink_to(mine)
    with claimed(tmp_path / "real", "checkpoints"), pytest.raises(ValueError, match="no other process"):
        tune(tmp_path / "link", resume=True)
    discard(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (mine / "run.json").is_file()


def test_a_disk_that_cannot_be_read_removes_nothing(tmp_path, monkeypatch):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    def strike(self, args, state, control, **kwargs):
        monkeypatch.setattr(_runs, "read_json", broken)
        raise RuntimeError("struck by lightning")

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "on_step_begin", strike)
        with pytest.raises(RuntimeError, match="lightning"):
            tune(store, resume=True)
    monkeypatch.undo()
    assert last_whole(store)


def test_the_others_of_several_processes_leave_the_folder_alone(tmp_path, monkeypatch):
    store = tmp_path / "store"
    interrupt(monkeypatch, store, 2)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="holds an interrupted run"), _runs.claimed_run(store, {}, False):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with claimed(store, "checkpoints"), _runs.claimed_run(store, {}, True) as last:
        assert last == str(store / "checkpoint-2")
    discard(store)
    assert last_whole(store)


def test_to_be_interrupted_when_all_is_done_is_to_be_done(tmp_path, monkeypatch):
    def strike(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Interrupt, "on_evaluate", strike)
    whole = tune()
    assert same(tune(tmp_path / "store", eval_text=TEXT, eval_steps=6), whole)


@pytest.fixture
def command(tmp_path):
    """liger finetune of a small model into tmp_path / "out", with more arguments."""
    checkpoint.save(linearize_tiny(tiny(), window=8), tiny_tokenizer(), tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    fixed = f"finetune {tmp_path}/model --out {tmp_path}/out --text {tmp_path}/text.txt --steps 4 --length 32 --batch 2"
    return lambda *more: cli.main([*fixed.split(), *more])


def test_a_model_that_cannot_be_saved_is_not_lost(tmp_path, monkeypatch, capsys, command):
    assert command() == 0
    shutil.move(tmp_path / "out", tmp_path / "wanted")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert command() == 2
    assert "what was learned lies in" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "on_step_begin", lambda *_, **__: pytest.fail("trained again"), raising=False)
        assert command("--resume") == 0
    assert not (tmp_path / "out.checkpoints").exists()
    found, wanted = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "wanted"))
    assert found == wanted


def test_to_be_told_to_end_is_to_be_interrupted(tmp_path, monkeypatch, capsys, command):
    before = signal.getsignal(signal.SIGTERM)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "on_step_begin", strike)
        assert command() == 130
    assert "--resume continues" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before
    assert last_whole(tmp_path / "out.checkpoints") == str(tmp_path / "out.checkpoints" / "checkpoint-2")
    assert command("--resume") == 0
