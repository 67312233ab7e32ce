"""Commands that are killed, ended or interrupted, and commands on a disk that is full, at any operation on files."""

import errno
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator

from tests.torture.children import Child, Ended, command
from tests.torture.stage import NAMES, Stage

# What ends a command, and the statuses that it may have then.
_ENDS = {signal.SIGKILL: (0, -signal.SIGKILL), signal.SIGTERM: (0, 130), signal.SIGINT: (0, 130)}
_Act = Callable[[int, str], None]


def _places(stage: Stage, name: str, draw: random.Random) -> Iterator[int]:
    """Numbers of a command's operations: each once in some order, then again."""
    order = list(range(len(stage.taken(name))))
    while True:
        draw.shuffle(order)
        yield from order


def _at(places: dict[int, int]) -> _Act:
    """Signals to this process at operations by number."""

    def act(number: int, event: str) -> None:
        if number in places:
            os.kill(os.getpid(), places[number])

    return act


def _judged(stage: Stage, name: str, ended: Ended, *statuses: int) -> str | None:
    """What is wrong with a command that was stopped, right then or when somebody goes on."""
    return ended.wrong(*statuses) or stage.lost(name) or stage.unfinished(name)


def kills(stage: Stage, count: int, seed: int):
    """(case, what went wrong or None): at an operation, or after a time; SIGKILL, SIGTERM, or Ctrl-C twice."""
    draw = random.Random(f"kills {seed}")
    places = {name: _places(stage, name, draw) for name in NAMES}
    for number in range(count):
        name, (end, statuses) = NAMES[number % len(NAMES)], draw.choice(list(_ENDS.items()))
        stage.clear(name)
        timed, gap = draw.random() < 0.3, draw.randrange(25)
        if timed:
            first = draw.uniform(0, 0.9 if name in ("finetune", "resume") else 0.3)
            times = [first, first + gap / 100] if end == signal.SIGINT else [first]
            case = f"{number}: {name}, {end.name} after {', '.join(f'{x:.3f} s' for x in times)}"
            # Before it listens it ends at once.
            ended, statuses = Child(command(*stage.words(name))).end([(x, end) for x in times]), (*statuses, -end)
        else:
            first = next(places[name])
            at = [first, first + 1 + gap] if end == signal.SIGINT else [first]
            case = f"{number}: {name}, {end.name} at {at} ({stage.taken(name)[first]})"
            ended = Child(command(*stage.words(name), act=_at(dict.fromkeys(at, end)))).end()
        yield case, _judged(stage, name, ended, *statuses)


def _too_large(place: int) -> _Act:
    """From an operation on no file may grow."""

    def act(number: int, event: str) -> None:
        if number == place:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return act


def _no_space(place: int) -> _Act:
    """From an operation on nothing more can be made or synced."""

    def act(number: int, event: str) -> None:
        if number >= place and not event.startswith(("os.remove", "os.rmdir", "os.chmod", "os.rename")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def _at_most(size: int) -> _Act:
    """No file may grow beyond a size."""

    def act(number: int, event: str) -> None:
        if not number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return act


def full(stage: Stage, count: int, seed: int):
    """(case, what went wrong or None): a disk that is full from an operation on, or holds no large files."""
    draw = random.Random(f"disk {seed}")
    places = {name: _places(stage, name, draw) for name in NAMES}
    for number in range(count):
        name, way = NAMES[number % len(NAMES)], draw.choice((_too_large, _no_space, _at_most))
        stage.clear(name)
        place = int(10 ** draw.uniform(0, 6)) if way is _at_most else next(places[name])
        ended = Child(command(*stage.words(name), act=way(place))).end()
        yield f"{number}: {name}, {way.__name__[1:]} {place}", _judged(stage, name, ended, 0, 2)
