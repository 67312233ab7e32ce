"""Commands in forked children of one process that has imported everything: struck, watched, and judged by their end."""

import importlib
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from liger_linear.__main__ import main

# Audit events of what changes files.
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Seconds after which a command hangs.
HANGS = 60.0


@dataclass
class Ended:
    """How a child ended: its exit status, or minus the signal that ended it, and what it said on stderr."""

    status: int
    said: str
    hung: bool = False

    @property
    def lines(self) -> list[str]:
        """The lines that are the command's own."""
        return [line for line in self.said.replace("\r", "\n").split("\n") if line.startswith("liger: ")]

    def wrong(self, *statuses: int) -> str | None:
        """What is wrong with an end that is to be one of these, told in one line where it is not 0."""
        lines = self.said.strip().splitlines() or [""]
        # Of a traceback its end, with nothing behind it.
        last = next((x for x in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", x)), lines[-1])[
            :300
        ]
        if self.hung:
            return f"hung: {last}"
        if self.status not in statuses:
            return f"exit status {self.status}: {last}"
        if "Traceback (most recent call last)" in self.said:
            return f"a traceback: {last}"
        if self.status > 0 and len(self.lines) != 1:
            return f"{len(self.lines)} lines: {last}"
        return None


class Child:
    """A function in a forked process, whose result is its exit status."""

    def __init__(self, work: Callable[[], int]):
        sys.stderr.flush()
        sys.stdout.flush()
        self.reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            return
        status = 1
        try:
            os.dup2(writing, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def end(self, signals: Sequence[tuple[float, int]] = (), limit: float = HANGS) -> Ended:
        """Wait for it, and send it signals after so many seconds each."""
        start, said, ahead, hung = time.monotonic(), b"", sorted(signals), False
        while True:
            passed = time.monotonic() - start
            if ahead and passed >= ahead[0][0]:
                os.kill(self.pid, ahead.pop(0)[1])
                continue
            if passed > limit and not hung:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            if select.select([self.reading], [], [], min(1.0, ahead[0][0] - passed) if ahead else 1.0)[0]:
                if not (more := os.read(self.reading, 1 << 16)):
                    break
                said += more
        os.close(self.reading)
        return Ended(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said.decode(errors="replace"), hung)


def watch(act: Callable[[int, str], None]) -> None:
    """From here on, in this process for ever, `act` is called before each operation that changes files: its number."""
    count, inside = 0, False

    def seen(event: str, args: tuple) -> None:
        nonlocal count, inside
        changes = event in _CHANGES or (event == "open" and args[2] & _WRITING and args[0] != os.devnull)
        if inside or not changes:
            return
        inside = True
        try:
            act(count, f"{event} {args[0]}")
        finally:
            inside, count = False, count + 1

    def synced(number: int) -> None:
        seen("os.truncate", (f"fsync {number}",))
        fsync(number)

    fsync, os.fsync = os.fsync, synced
    sys.addaudithook(seen)


def command(*words: object, act: Callable[[int, str], None] | None = None) -> Callable[[], int]:
    """What `liger` does with these words, in a child; with what happens at its operations on files."""

    def work() -> int:
        if act:
            watch(act)
        found = main([str(x) for x in words])
        # What comes now has missed it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return found

    return work


def run(*words: object, **options) -> Ended:
    return Child(command(*words, **options)).end()


def operations(*words: object) -> list[str]:
    """Every operation on files of a command that succeeds, in order."""
    ended = Child(command(*words, act=lambda number, event: print(f"at {event}", file=sys.stderr))).end()
    assert ended.status == 0, ended.said
    return [line.removeprefix("at ") for line in ended.said.splitlines() if line.startswith("at ")]


def warm(*commands: Sequence[object]) -> None:
    """Import here what these commands import when they run, so that no child has to."""
    before = set(sys.modules)

    def work(words: Sequence[object]) -> int:
        found = main([str(x) for x in words])
        print(*(f"new {name}" for name in sorted(set(sys.modules) - before)), sep="\n", file=sys.stderr)
        return found

    for words in commands:
        ended = Child(lambda words=words: work(words)).end()
        assert ended.status == 0, ended.said
        for line in ended.said.splitlines():
            if line.startswith("new "):
                try:
                    importlib.import_module(line.removeprefix("new "))
                # What a package makes of itself while it is imported has no file.
                except ImportError:
                    continue


def each(cases: Iterable[tuple[str, Callable[[], str | None]]], limit: float = 15.0, batch: int = 40):
    """(case, what went wrong or None) of functions that judge, many to a child; a hang or a death is wrong."""
    ahead = list(cases)
    while ahead:
        group = ahead[:batch]
        found = _batch([judge for _, judge in group], limit)
        yield from ((name, why) for (name, _), why in zip(group, found, strict=False))
        ahead = ahead[len(found) :]


def _batch(judges: list[Callable[[], str | None]], limit: float) -> list[str | None]:
    """What went wrong in each of them, up to one that hangs or ends the child."""

    def work() -> int:
        os.dup2(2, answers)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for judge in judges:
            try:
                said = judge()
            except BaseException as error:
                said = f"{type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
            os.write(answers, (" ".join((said or "").split())[:400] + "\n").encode())
        return 0

    answers = os.open(os.devnull, os.O_WRONLY)
    child, held, hung = Child(work), b"", False
    os.close(answers)
    while select.select([child.reading], [], [], limit)[0]:
        if not (more := os.read(child.reading, 1 << 16)):
            break
        held += more
    else:
        hung = True
        os.kill(child.pid, signal.SIGKILL)
    os.close(child.reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    found: list[str | None] = [line or None for line in held.decode().split("\n")[:-1]]
    if len(found) < len(judges):
        found.append(f"longer than {limit:g} s" if hung else f"the process ended with {status}")
    return found
