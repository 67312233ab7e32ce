"""Damaged files of models and runs: each is refused in one line, or loads and is used; nothing outside is read."""

import contextlib
import functools
import io
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from liger_linear.__main__ import main
from liger_models import checkpoint
from tests.models.ggufs import write_gguf
from tests.models.mutations import FILES, WEIGHTS, contents, damaged
from tests.models.tiny import linearize_tiny, tiny, tiny_tokenizer
from tests.torture.children import each, run
from tests.torture.stage import Stage

# Beside the folder, a process reads what is installed, what the system tells of itself, and what it was given.
_INSTALLED = tuple(str(Path(x).resolve()) for x in (sys.prefix, sys.base_prefix, Path(__file__).parents[2]))
_INSTALLED += (sys.prefix, "/usr/lib", "/usr/local/lib", "/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/mime")
# Bytes of address space that loading a model of a few kilobytes may add.
_MEMORY = 8 << 30
_SETTINGS = tuple(name for name in FILES if name not in ("config.json", WEIGHTS))


@functools.cache
def _guarded(process: int, *allowed: str) -> list[str]:
    """In this process, the files that are opened and lie elsewhere, from now on."""
    outside: list[str] = []

    def seen(event: str, args: tuple) -> None:
        if event != "open" or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith((*_INSTALLED, *allowed)):
            outside.append(path)

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.addaudithook(seen)
    return outside


def _said(*words: object) -> tuple[int, str | None]:
    """The status of a command, and what is wrong with what it says."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        found = main([str(x) for x in words])
    lines = [line for line in told.getvalue().split("\n") if line.startswith("liger: ")]
    right = (found, len(lines)) in ((0, 0), (2, 1)) and "Traceback" not in told.getvalue()
    return found, None if right else f"status {found} and {told.getvalue()[-200:]}"


def _used(stage: Stage, model: Path, *allowed: Path) -> str | None:
    """What is wrong with a model that is loaded and used, or refused."""
    outside = _guarded(os.getpid(), str(stage.text), *map(str, allowed))
    outside.clear()
    measure = ["evaluate", model, "--text", stage.text, "--length", "32", "--max-blocks", "1"]
    for words in (["generate", model, "the quick", "--max-new-tokens", "2"], measure):
        status, why = _said(*words)
        if why or status:
            break
    return why or (f"read {outside[0]}" if outside else None)


def _with(stage: Stage, folder: Path, name: str, content: bytes) -> str | None:
    """The same for a folder of which one file has other bytes."""
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        return _used(stage, folder, folder)
    finally:
        (folder / name).write_bytes(before)


def folders(stage: Stage) -> list[Path]:
    """Of a pretrained model, linearized ones and one with experts."""
    root = stage.root / "fuzz"
    if not root.exists():
        root.mkdir()
        chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
        models = tiny(), linearize_tiny(tiny(), window=8, recall=3, memories=2), tiny("gemma2"), tiny("olmoe")
        for number, model in enumerate(models):
            checkpoint.save(model, tiny_tokenizer(chat_template=chat), root / str(number))
    return sorted(root.iterdir())


def _flipped(content: bytes, draw: random.Random, end: int) -> tuple[str, bytes]:
    """Some bytes before `end` are others, or missing."""
    changed, places = bytearray(content), sorted({draw.randrange(end) for _ in range(draw.choice((1, 1, 2, 8)))})
    for place in places:
        changed[place] = draw.choice((0, 0xFF, draw.randrange(256), changed[place] ^ 1 << draw.randrange(8)))
    if draw.random() < 0.1:
        return f"cut at {places[0]}", content[: places[0]]
    return f"bytes {places}", bytes(changed)


def _of_folders(names: tuple[str, ...], flips: bool, stage: Stage, count: int, seed: int) -> Iterator:
    """Damage to files of these names in folders of models."""
    places = folders(stage)

    def cases() -> Iterator[tuple[str, Callable[[], str | None]]]:
        share = [len(range(i, count, len(places))) for i in range(len(places))]
        for folder, some in zip(places, share, strict=True):
            files = contents(folder)
            for number, (name, what, content) in enumerate(damaged(files, some, f"{seed} {folder.name}", names)):
                if flips and number % 2:
                    end = 8 + int.from_bytes(files[name][:8], "little")
                    how, content = _flipped(files[name], random.Random(f"{seed} {folder.name} {number}"), end)
                    what = f"{number}: {how}"
                yield f"{folder.name}/{name} {what}", functools.partial(_with, stage, folder, name, content)

    yield from each(cases())


headers = functools.partial(_of_folders, (WEIGHTS,), True)
configs = functools.partial(_of_folders, ("config.json",), False)
settings = functools.partial(_of_folders, _SETTINGS, False)


def ggufs(stage: Stage, count: int, seed: int) -> Iterator:
    """Damage to what stands before the weights of a GGUF file."""
    folder = stage.root / "gguf"
    folder.mkdir()
    path = folder / "model.gguf"
    end = write_gguf(path)
    content = path.read_bytes()

    def damage(number: int) -> tuple[str, Callable[[], str | None]]:
        what, changed = _flipped(content, random.Random(f"gguf {seed} {number}"), end)

        def judge() -> str | None:
            path.write_bytes(changed)
            return _used(stage, path, folder)

        return f"{number}: {what}", judge

    ended = run("generate", path, "the quick", "--max-new-tokens", "2")
    assert ended.status == 0, ended.said
    yield from each(damage(number) for number in range(count))


def _resumed(stage: Stage, change: Callable[[Path], None]) -> str | None:
    """What is wrong with a run that goes on from changed files."""
    stage.clear("resume")
    change(stage.case / "out.checkpoints")
    outside = _guarded(os.getpid(), str(stage.root))
    outside.clear()
    return _said(*stage.words("resume"))[1] or (f"read {outside[0]}" if outside else None)


def _sealed(store: Path, name: str, content: bytes) -> None:
    """Another file in a checkpoint, which is whole for whoever looks at the sizes of its files."""
    place = next(store.glob("checkpoint-*"))
    (place / name).write_bytes(content)
    if name != "whole.json":
        sizes = json.loads((place / "whole.json").read_text())
        (place / "whole.json").write_text(json.dumps(sizes | {name: len(content)}))


def checkpoints(stage: Stage, count: int, seed: int) -> Iterator:
    """Damage to a checkpoint's files, of any kind."""
    place = next((stage.root / "run" / "out.checkpoints").glob("checkpoint-*"))
    files = {path.name: path.read_bytes() for path in sorted(place.iterdir()) if path.suffix not in (".md", ".json")}
    trees = {path.name: path.read_bytes() for path in sorted(place.glob("*.json"))}

    def cases() -> Iterator[tuple[str, Callable[[], str | None]]]:
        for number, (name, what, content) in enumerate(damaged(trees, count, seed, tuple(trees))):
            if number % 2:
                draw = random.Random(f"checkpoints {seed} {number}")
                name = draw.choice(list(files))
                how, content = _flipped(files[name], draw, min(len(files[name]), 4096))
                what = f"{number}: {how}"
            change = functools.partial(_sealed, name=name, content=content)
            yield f"{name} {what}", functools.partial(_resumed, stage, change)

    yield from each(cases())


def runs(stage: Stage, count: int, seed: int) -> Iterator:
    """Damage to the settings of a run."""
    files = {"run.json": (stage.root / "run" / "out.checkpoints" / "run.json").read_bytes()}
    found = damaged(files, count, seed, ("run.json",))

    def change(content: bytes) -> Callable[[Path], None]:
        return lambda store: (store / "run.json").write_bytes(content) and None

    yield from each((what, functools.partial(_resumed, stage, change(content))) for _, what, content in found)
