"""What the attacked commands read, what they write when nothing disturbs them, and what must hold afterwards."""

import hashlib
import os
import shutil
import signal
from pathlib import Path

from liger_models import checkpoint
from liger_models._runs import last_whole
from liger_models._training import Interrupt
from tests.models.tiny import TEXT, tiny, tiny_tokenizer
from tests.torture.children import Child, command, operations, run, warm

_OWN = ("out", "out.checkpoints")
NAMES = ("linearize", "on disk", "overwrite", "finetune", "resume")


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder with a name for its content; links and folders by what they are."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "a folder"
        for path in sorted(folder.rglob("*"))
    }


class Stage:
    """A folder with a model, what was linearized from it, a text, an interrupted run, and one folder a case."""

    def __init__(self, root: Path):
        self.root, self.case = root, root / "case"
        self.text, self.model, self.small = root / "text.txt", root / "model", root / "small"
        self.text.write_text(TEXT)
        checkpoint.save(tiny(), tiny_tokenizer(), self.model)
        (root / "first").mkdir()
        assert run("linearize", self.model, "--preset", "paper-gla", "--window", 8, "--out", self.small).status == 0
        warm(*(self.words(name, root / "first" / name) for name in ("linearize", "on disk", "finetune")))
        self._interrupt()
        self.before = {path: digest(path) for path in (self.model, self.small, self.root / "run")}
        shutil.rmtree(root / "first")
        self._results = {name: self._undisturbed(name) for name in NAMES}

    def _interrupt(self) -> None:
        """A run that is stopped in its first step and leaves a checkpoint."""
        (self.root / "run").mkdir()
        out = self.root / "run" / "out"

        def work() -> int:
            Interrupt.on_step_begin = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
            return command(*self.words("finetune", out))()

        ended = Child(work).end()
        assert ended.status == 130 and last_whole(out.with_name("out.checkpoints")), ended.said

    def words(self, name: str, out: Path | None = None) -> list[object]:
        """The words of a command."""
        if name in ("finetune", "resume"):
            words = ["finetune", self.small, "--text", self.text, "--steps", 3, "--length", 32, "--batch", 2]
        else:
            words = ["linearize", self.model, "--preset", "paper-gla", "--window", 8]
        more = {"on disk": ["--on-disk"], "overwrite": ["--overwrite"], "resume": ["--resume"]}.get(name, [])
        return [*words, "--out", out or self.case / "out", *more]

    def clear(self, name: str) -> None:
        """The case's folder as it is before a command."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        if name == "overwrite":
            shutil.copytree(self.model, self.case / "out")
            (self.case / "out" / "notes" / "mine").mkdir(parents=True)
            (self.case / "out" / "notes" / "mine" / "thesis.txt").write_text("precious")
            (self.case / "out" / "README.md").write_text("mine")
        if name == "resume":
            shutil.copytree(self.root / "run", self.case, dirs_exist_ok=True)

    def _undisturbed(self, name: str) -> tuple[dict[str, str] | None, dict[str, str] | None, list[str]]:
        """The output before and after a command, and the operations on files that it took."""
        self.clear(name)
        before, taken = self._output(), operations(*self.words(name))
        return before, self._output(), taken

    def _output(self) -> dict[str, str] | None:
        return digest(self.case / "out") if (self.case / "out").exists() else None

    def taken(self, name: str) -> list[str]:
        return self._results[name][2]

    def lost(self, name: str) -> str | None:
        """What is wrong right after a command was stopped."""
        if any(digest(path) != held for path, held in self.before.items()):
            return "a source was changed"
        before, after, _ = self._results[name]
        found = self._output()
        if found not in (before, after):
            return f"the output is neither the old nor the new: {sorted((found or {}).items() ^ after.items())[:3]}"
        if name == "resume" and not found and not last_whole(self.case / "out.checkpoints"):
            return "the checkpoint that was whole is gone"
        if visible := [x.name for x in self.case.iterdir() if x.name[0] != "." and x.name not in _OWN]:
            return f"litter with a name: {visible}"
        return None

    def unfinished(self, name: str) -> str | None:
        """What is wrong when somebody goes on from where a command was stopped."""
        store, way, done = self.case / "out.checkpoints", name, self._output() == self._results[name][1]
        if name in ("finetune", "resume"):
            way = "resume" if last_whole(store) else "finetune"
            if way == "finetune" and any(store.glob("checkpoint-*")):
                # Which the command says, and leaves to whoever reads it.
                if why := run(*self.words("resume"), "--overwrite").wrong(2):
                    return f"resumed without a whole checkpoint: {why}"
                shutil.rmtree(store)
        if why := run(*self.words(way), *(["--overwrite"] if done else [])).wrong(0):
            return f"again: {why}"
        if self._output() != self._results[name][1]:
            return "again: another result than undisturbed"
        if left := [x.name for x in self.case.iterdir() if x.name != "out"]:
            return f"again: {left} was left"
        return None
