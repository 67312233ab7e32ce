"""A model's folder before anything reads it: plain files of its own, of sizes that can be held, that name no others."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from liger_models._whole import resolved
from liger_ops.errors import fail

# What loaders of models and tokenizers look for, by the ends of names.
_READ = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".safetensors", ".bin", ".gguf"}
_INDEX = ".index.json"
_SETTINGS = {f"{name}.json" for name in ("config", "generation_config", "adapter_config", "tokenizer_config")}
_SETTINGS |= {"special_tokens_map.json", "added_tokens.json", "chat_template.json"}
# Tokenizers, which their own library reads, and texts.
_LISTS = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
# Bytes. The largest known are 0.2 MB for settings, 10 MB for an index and 35 MB for a tokenizer.
_SHORT, _LONG = 1 << 24, 1 << 28
# Objects and lists in one another: copies of settings recurse, and five are usual.
_DEEPEST = 32


def check_folder(folder: Path, every: bool = False) -> None:
    """ValueError for a folder that is not to be read: it names the file, and says why.

    Looked at is what loaders read, or every file at its top. Folders in it are not, but for chat templates and what an
    index of weights names. A folder that somebody changes meanwhile is not what was looked at.
    """
    files = [path for path in _files(folder) if every or path.suffix in _READ]
    _check_all(folder, files + _files(folder / CHAT_TEMPLATE_DIR))


def check_beside(file: Path) -> None:
    """The same for what is read in the folder of a GGUF file, where all else may lie."""
    beside = [path for path in _files(file.parent) if path.name in _SETTINGS | _LISTS or path.suffix == ".jinja"]
    _check_all(file.parent, beside + _files(file.parent / CHAT_TEMPLATE_DIR))


def _check_all(folder: Path, files: list[Path]) -> None:
    root = _root(folder)
    for path in files:
        _check_file(path, root)
        for name in _named(path):
            _check_name(folder, path.name, name, root)


def _check_file(path: Path, root: Path) -> None:
    """ValueError unless a path is a plain file within a folder, or a link to one, and no larger than it may be."""
    target = resolved(path, path.name)
    if not target.is_relative_to(root):
        fail(path.name, f"a file of {root}", f"a link to {target}")
    mode = path.stat().st_mode if path.exists() else 0
    if not stat.S_ISREG(mode):
        fail(path.name, "a plain file", _kind(mode))
    listed = path.name in _LISTS or path.name.endswith(_INDEX)
    most = _LONG if listed else _SHORT
    if (listed or path.name in _SETTINGS or path.suffix == ".jinja") and path.stat().st_size > most:
        fail(path.name, f"at most {most:,} bytes", f"{path.stat().st_size:,}")


def _root(folder: Path) -> Path:
    """Where the files of a folder may lie: those of a snapshot in the hub's cache lie beside it, once for all."""
    place = resolved(folder, "folder")
    above = place.parent.parent
    return above if place.parent.name == "snapshots" and above.name.startswith("models--") else place


def _files(folder: Path) -> list[Path]:
    """Whatever in a folder is none itself: links and pipes too."""
    return [path for path in sorted(folder.iterdir()) if not path.is_dir()] if folder.is_dir() else []


def _named(path: Path) -> Iterable[str]:
    """The other files that settings or an index of weights name; ValueError for objects in one another too deep.

    What is no JSON, or says something else, is told by whoever reads it.
    """
    if not path.name.endswith(_INDEX) and path.name not in _SETTINGS:
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not _shallow(value, _DEEPEST):
            raise RecursionError
    except RecursionError as error:
        raise ValueError(f"{path.name}: expected JSON that is at most {_DEEPEST} deep, got more") from error
    except ValueError:
        return ()
    value = value if isinstance(value, dict) else {}
    names = value.get("weight_map", value.get("fast_tokenizer_files"))
    names = list(names.values()) if isinstance(names, dict) else names
    return dict.fromkeys(map(str, names)) if isinstance(names, list) else ()


def _shallow(value: Any, left: int) -> bool:
    """Whether objects and lists in one another are no more than so many."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is None or (left > 0 and all(_shallow(x, left - 1) for x in inner))


def _check_name(folder: Path, source: str, name: str, root: Path) -> None:
    """ValueError unless a file below a folder is named; one that is missing is told when it is read."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        fail(source, "names of files below its folder", repr(name))
    if os.path.lexists(folder / path):
        _check_file(folder / path, root)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", 0: "a link to nothing"}
    return kinds.get(stat.S_IFMT(mode), "a device")
