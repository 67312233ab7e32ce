"""Folders of models that mean harm: each is refused in one line, in seconds, and nothing of it runs."""

import functools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.models.hostile import CODE_NEEDED, FILES, HEADERS, SETTINGS, bring_code, change
from tests.models.test_templates import HANGS
from tests.torture.children import Child, command
from tests.torture.fuzz import folders
from tests.torture.stage import Stage


class _Runs:
    """What makes a folder when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def _header(size: int | None, header: str) -> Callable[[Path], None]:
    content = (size or len(header)).to_bytes(8, "little") + header.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(content) and None


def _code(name: str, settings: dict) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        bring_code(folder)
        change(folder, name, **settings)

    return damage


def _set(name: str, settings: dict) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        change(folder, name, **settings)

    return damage


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(folder / "ran")))


def _adapters(folder: Path) -> None:
    (folder / "config.json").unlink()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


def _damages() -> Iterator[tuple[str, Callable[[Path], None], str]]:
    """Name, what is done to a folder, and a pattern of what is said."""
    for number, (damage, message) in enumerate(FILES):
        yield f"files {number}: {message}", damage, f"model: could not load .*{message}"
    for size in (None, 1 << 40):
        for header in HEADERS:
            message = "model: could not (load|read the weights in) .*eader"
            yield f"header {header[:40]}, of {size}", _header(size, header), message
    for name, settings in CODE_NEEDED:
        yield f"code for {name}", _code(name, settings), "(trust_remote_code=True|no code of its own)"
    for name, settings, message in SETTINGS:
        yield f"{name} {settings}", _set(name, settings), f"model: could not load .*{message}"
    yield "a pickle", _pickled, "model: "
    yield "adapters of themselves", _adapters, "model: "
    for name, (text, message) in HANGS.items():
        yield f"template {name}", _template(text), f"messages: .*{message}"


DAMAGES = list(_damages())


def _refused(folder: Path, message: str, *words: object) -> str | None:
    ended = Child(command(*words)).end(limit=15.0)
    if why := ended.wrong(2):
        return why
    if not re.search(message, ended.lines[0]):
        return f"says {ended.lines[0]}"
    return "its code ran" if (folder / "ran").exists() else None


def hostile(stage: Stage, count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """(case, what went wrong or None): for every kind, by `generate` and, where it is looked at, on disk."""
    good = folders(stage)[0]
    for name, damage, message in DAMAGES[:count]:
        stage.clear("linearize")
        folder, out = stage.case / "model", stage.case / "out"
        shutil.copytree(good, folder)
        damage(folder)
        chat = ["--chat"] if name.startswith("template") else []
        refused = functools.partial(_refused, folder, message)
        why = refused("generate", folder, "the", *chat)
        if not why and name.startswith(("files", "header")):
            why = refused("linearize", folder, "--on-disk", "--out", out)
        yield name, why or ("an output" if out.exists() else None)
