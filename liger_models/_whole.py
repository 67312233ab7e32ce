"""Folders that are written whole or not at all: claimed by one process, filled beside their place, then put there."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from liger_ops.errors import fail

try:
    import fcntl
except ImportError:
    # There are no such locks on Windows.
    fcntl = None

_log = logging.getLogger(__name__)
# The config of a model or of adapters, and an entry that each of them has one of.
_CONFIGS = {"config.json": ("model_type", "architectures"), "adapter_config.json": ("peft_type",)}
# What save_pretrained of models, adapters and tokenizers writes, and what remote code of this library is.
_KNOWN = re.compile(
    r"((adapter_|generation_)?config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    r"|vocab\.txt|merges\.txt|(tokenizer|spiece|spm|sentencepiece\.bpe)\.model|\w+\.tiktoken"
    r"|chat_template\.(jinja|json)|additional_chat_templates|modeling_liger\.py"
)
# Of renameat2: paths from the working folder, and both names change places.
_HERE, _EXCHANGE = -100, 2


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """The folder as a Path; ValueError if it exists and may not be replaced."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"out: {folder} exists; pass --overwrite to replace it")
    if folder.exists() and not folder.is_dir():
        fail("out", "a folder", f"the file {folder}")
    if folder.exists() and any(folder.iterdir()) and not _is_model(folder):
        fail("out", "a model's folder to replace", f"{folder}, which holds something else")
    if folder.exists() and os.path.ismount(folder):
        fail("out", "a folder in a file system", f"{folder}, the whole of one")
    return folder


def _is_model(folder: Path) -> bool:
    """Whether a folder holds the config of a model, and not one of something else."""
    for name, entries in _CONFIGS.items():
        try:
            config = read_json(folder / name)
        except OSError:
            continue
        if any(entry in config for entry in entries):
            return True
    return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none; OSError where what is there cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def written_whole(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a sibling folder to write into; it takes the name of `folder` only after everything in it is on the disk.

    Of a model that it replaces only what `save_pretrained` writes goes; whatever else lies there stays, as NAME.old
    where something new has its name. ValueError for a folder that another process is writing, or that appeared
    meanwhile; OSError where the disk does not hold it.
    """
    folder = resolved(check_output(folder, overwrite), "out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with claimed(folder, "out") as alone:
        if alone:
            _clean(folder)
        check_output(folder, overwrite)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            yield part
            to_disk(part)
            _put(part, folder, overwrite)
        except SafetensorError as error:
            raise OSError(f"{folder}: {error}") from error
        finally:
            # Or what was there before, which it changed places with.
            shutil.rmtree(part, ignore_errors=True)


def resolved(folder: Path, name: str) -> Path:
    """Through links, and with a name even for "."; ValueError for links in a loop."""
    try:
        return folder.resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{name}: could not follow {folder}: {error}") from error


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Hold a lock beside a folder, which ends with the process; whether there are such locks here.

    ValueError where another process holds it, for the argument of this name.
    """
    if fcntl is None:
        yield False
        return
    path, lock, alone = folder.with_name(f".{folder.name}.liger-lock"), None, True
    try:
        # Whoever held it before may have removed it.
        while lock is None or not (path.exists() and os.path.samestat(os.fstat(lock), path.stat())):
            if lock is not None:
                os.close(lock)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                lock = None
                fail(name, "a folder that no other process is writing", folder)
            except OSError:
                alone = False
        yield alone
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)


def _clean(folder: Path) -> None:
    """What killed processes left beside a folder that nobody else is writing: an old model goes back to its place."""
    left = re.compile(rf"\.{re.escape(folder.name)}\.[a-z0-9_]{{8}}\.(part|old)")
    for path in sorted(folder.parent.iterdir()):
        if left.fullmatch(path.name) and path.is_dir():
            if path.suffix == ".old" and not (folder.exists() and any(folder.iterdir())):
                if folder.exists():
                    folder.rmdir()
                _log.warning("out: %s was put back, which an interrupted run had moved aside", folder)
                path.rename(folder)
            else:
                _log.warning("out: removed %s, which an interrupted run left", path)
                shutil.rmtree(path, ignore_errors=True)


def to_disk(part: Path) -> None:
    """A file, or a folder and all in it, on the disk, and with the permissions of ordinary files and folders."""
    mask = os.umask(0)
    os.umask(mask)
    inside = [Path(place, name) for place, folders, files in os.walk(part) for name in (*files, *folders)]
    for path in (*reversed(inside), part):
        if not path.is_symlink():
            # Folders keep the group that their parent gave them.
            group = path.stat().st_mode & stat.S_ISGID if path.is_dir() else 0
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask | group)
            _sync(path)


def write_json(path: Path, value: Any) -> None:
    """JSON that is there whole or not at all; what is no number is null."""
    content = json.dumps(_numbers(value), indent=2, allow_nan=False) + "\n"
    if (path.exists() and not path.is_file()) or path.is_relative_to("/dev") or path.is_relative_to("/proc"):
        # A pipe or a device, or what a shell has open.
        path.write_text(content, encoding="utf-8")
        return
    path = path.resolve()
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(number)
    part = Path(name)
    try:
        part.write_text(content, encoding="utf-8")
        to_disk(part)
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: Path) -> None:
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        # Windows opens no folders.
        return
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems do not; a full disk is told.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(opened)


def _put(part: Path, folder: Path, overwrite: bool) -> None:
    """Give a whole folder its name; what had it before has the other's then, if there was anything."""
    if overwrite and folder.exists():
        check_output(folder, overwrite)
        shutil.copymode(folder, part)
        taken = {path.name for path in part.iterdir()}
        _keep(folder, part, taken)
        _exchange(part, folder)
        # What somebody wrote there meanwhile.
        _keep(part, folder, taken, os.replace)
    else:
        try:
            # Of what is there, only an empty folder is replaced.
            part.rename(folder)
        except OSError as error:
            if not folder.exists():
                raise
            raise ValueError(f"out: {folder} appeared while it was written; it stays as it is") from error
    _sync(folder.parent)


def _keep(old: Path, new: Path, taken: Iterable[str], put: Callable[[Path, Path], object] | None = None) -> None:
    """What is not a model's in its old folder into the new one as well, as other names of the same files.

    Under a name of its own where the new one has `taken` it.
    """
    for path in old.iterdir():
        if not _KNOWN.fullmatch(path.name):
            _both(path, new / (f"{path.name}.old" if path.name in taken else path.name), put or _link)


def _both(path: Path, place: Path, put: Callable[[Path, Path], object]) -> None:
    """A file, or a folder and all in it, also at another place, where older ones go."""
    if path.is_dir() and not path.is_symlink():
        if place.is_symlink() or place.is_file():
            place.unlink()
        place.mkdir(exist_ok=True)
        shutil.copymode(path, place)
        for inner in path.iterdir():
            _both(inner, place / inner.name, put)
    elif not (os.path.lexists(place) and os.path.samestat(path.lstat(), place.lstat())):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif put is _link:
            place.unlink(missing_ok=True)
        put(path, place)


def _link(path: Path, place: Path) -> None:
    try:
        os.link(path, place, follow_symlinks=False)
    except OSError:
        # Not every file system has links. What was copied changes places with its original later.
        shutil.copy2(path, place, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Two folders change names, at once where the system can."""
    if sys.platform == "linux":
        swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if swap is not None and swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
            return
    aside = one.with_suffix(".old")
    try:
        other.rename(aside)
        one.rename(other)
        aside.rename(one)
    except BaseException:
        if aside.exists() and not other.exists():
            aside.rename(other)
        raise
