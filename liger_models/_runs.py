"""The checkpoints that a run of fine-tuning leaves in a folder, and which of them are whole."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerState

from liger_models._whole import claimed, read_json, resolved, to_disk, write_json
from liger_ops.errors import fail

_log = logging.getLogger(__name__)
# The settings of the run, beside its checkpoints, and in each of them its files with their bytes, written last.
_RUN, _SEAL = "run.json", "whole.json"
# The Trainer's own, in a checkpoint.
_STATE = "trainer_state.json"
# What the Trainer reports to files, which lies there too and is nobody's to remove.
_REPORTS = "runs"
# What the settings of each run say among others.
_SETTINGS = {"text", "seed", "model"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Settings that a killed process was writing.
_TORN = re.compile(r"\.run\.json\.[a-z0-9_]{8}\.part")


class Sealed(TrainerCallback):
    """Marks a checkpoint as whole when all of it is on the disk."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            place = Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}"
            to_disk(place)
            write_json(place / _SEAL, _sizes(place))


class Reading(TrainerCallback):
    """What a checkpoint leads to before the first step behind it, told in one line."""

    def __init__(self, checkpoint: str | None):
        self.checkpoint = checkpoint

    def on_step_begin(self, args, state, control, **kwargs):
        self.checkpoint = None

    @contextmanager
    def told(self) -> Iterator[None]:
        try:
            if self.checkpoint:
                _check_state(Path(self.checkpoint))
            yield
        # A damaged file leads to anything; a disk that fails is told as such.
        except Exception as error:
            if self.checkpoint is None or isinstance(error, OSError):
                raise
            lines = (str(error) or repr(error)).splitlines()
            raise ValueError(f"checkpoints: could not go on from {self.checkpoint}: {lines[0]}") from error


def _check_state(checkpoint: Path) -> None:
    """ValueError for a state that is not of this step, or whose numbers are none: the Trainer counts on with them."""
    state = read_json(checkpoint / _STATE)
    if state.get("global_step") != (step := _step(checkpoint)):
        fail("global_step", str(step), repr(state.get("global_step")))
    for field in fields(TrainerState):
        given = state.get(field.name, field.default)
        if type(field.default) in (int, float) and type(given) not in (int, float):
            fail(field.name, "a number", repr(given))
    if not isinstance(log := state.get("log_history"), list) or not all(isinstance(x, dict) for x in log):
        fail("log_history", "a list of objects", repr(log))


class SavedAtTheEnd(TrainerCallback):
    """A checkpoint of the last step too, for whoever may fail to save what comes of it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = True


def _sizes(place: Path) -> dict[str, int]:
    return {str(x.relative_to(place)): x.stat().st_size for x in sorted(place.rglob("*")) if x.is_file()}


def _checkpoints(folder: Path) -> list[Path]:
    """All that look like one, whole or not, the latest last."""
    found = [x for x in folder.iterdir() if x.is_dir() and _CHECKPOINT.fullmatch(x.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(folder: Path) -> str | None:
    """The latest checkpoint that was written to its end and that still has all its files."""
    for place in reversed(_checkpoints(folder)):
        sealed = read_json(place / _SEAL)
        there = _sizes(place)
        if sealed and all(there.get(name) == size for name, size in sealed.items()):
            return str(place)
        _log.warning("checkpoints: %s is not whole and is not used", place)
    return None


def is_finished(checkpoint: str) -> bool:
    """Whether nothing is left to do behind a checkpoint, where the Trainer would take one step more."""
    state = read_json(Path(checkpoint) / _STATE)
    return state.get("global_step", 0) >= state.get("max_steps", 1)


def is_first_process() -> bool:
    """Whether this one keeps folders, of several that a launcher may have started."""
    return int(os.environ.get("WORLD_SIZE") or 1) < 2 or not int(os.environ.get("RANK") or 0)


@contextmanager
def claimed_run(folder: Path, run: Mapping[str, Any], resume: bool) -> Iterator[str | None]:
    """Hold a folder for the checkpoints of a run; yields the one to resume from, if so asked.

    Afterwards the folder is as it was unless there is a checkpoint that is whole. ValueError if it holds something
    else, an interrupted run that nobody asked to resume, or a run with other settings, and if another process holds it.
    """
    folder = resolved(folder, "checkpoints")
    if not is_first_process():
        yield last_whole(folder) if resume else None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with claimed(folder, "checkpoints"):
        last, there = _last(folder, run, resume), folder.exists()
        folder.mkdir(exist_ok=True)
        if not resume:
            write_json(folder / _RUN, run)
        try:
            yield last
        finally:
            if last is None and last_whole(folder) is None:
                _remove(folder, keep=there)


def _last(folder: Path, run: Mapping[str, Any], resume: bool) -> str | None:
    if folder.is_dir():
        if others := [x.name for x in folder.iterdir() if not _ours(x) and x.name != _REPORTS]:
            fail("checkpoints", "a folder of checkpoints", f"{folder}, which holds {others[0]}")
        if _checkpoints(folder) and not resume:
            raise ValueError(f"checkpoints: {folder} holds an interrupted run; resume it, or remove the folder")
    if not resume:
        return None
    last, before = last_whole(folder), read_json(folder / _RUN)
    if last is None:
        raise ValueError(f"resume: expected a checkpoint in {folder} that is whole, found none")
    if not before:
        raise ValueError(f"resume: expected the settings of a run in {folder / _RUN}, found none")
    # As they are read again.
    for name, value in json.loads(json.dumps(run)).items():
        if before.get(name) != value:
            fail(name, f"{before.get(name)!r}, as in the run to resume", repr(value))
    return last


def _ours(path: Path) -> bool:
    if path.name == _RUN:
        return bool(_checkpoints(path.parent)) or set(read_json(path)) >= _SETTINGS
    kind = _CHECKPOINT if path.is_dir() else _TORN
    return kind.fullmatch(path.name) is not None


def discard(folder: Path) -> None:
    """Remove what a run left in its folder of checkpoints, and nothing else; nothing where another run is at it."""
    folder = resolved(folder, "checkpoints")
    if folder.is_dir() and is_first_process():
        try:
            with claimed(folder, "checkpoints"):
                _remove(folder)
        except (ValueError, OSError) as error:
            _log.warning("%s", error)


def _remove(folder: Path, keep: bool = False) -> None:
    # The settings last: what remains when somebody stops this can be resumed, or is nothing.
    for path in sorted((x for x in folder.iterdir() if _ours(x)), key=lambda x: x.name == _RUN):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    if not keep and not any(folder.iterdir()):
        folder.rmdir()
