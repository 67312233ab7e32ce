"""Two processes at one output, or at one folder of checkpoints: one of them wins, and the other says so in a line."""

import os
import random
import signal

from tests.torture.children import Child, Ended, command, run
from tests.torture.stage import NAMES, Stage

_REFUSALS = ("expected a folder that no other process is writing", "exists; pass --overwrite", "appeared while it was")
# Of a run that is over, before its output has a name or after.
_REFUSALS += ("resume: expected a checkpoint in", "holds an interrupted run; resume it, or remove the folder")


def _one_wins(*both: Ended) -> str | None:
    """What is wrong with the one that won, or the one that lost."""
    first, second = sorted(both, key=lambda ended: ended.status)
    if why := first.wrong(0) or second.wrong(2):
        return why
    return None if any(x in second.lines[0] for x in _REFUSALS) else f"the loser says {second.lines[0]}"


def _together(stage: Stage, name: str) -> str | None:
    """Two that begin at the same time."""
    children = [Child(command(*stage.words(name))) for _ in range(2)]
    return _one_wins(*(child.end() for child in children))


def _claimed(stage: Stage, name: str) -> tuple[int, int]:
    """The first and the last operation at which a command holds the lock on what it writes."""
    locks = [number for number, event in enumerate(stage.taken(name)) if ".liger-lock" in event]
    return locks[0] + 1, locks[-1]


def _within(stage: Stage, name: str, place: int) -> str | None:
    """One that begins and ends while the other is at an operation."""

    def act(number: int, event: str) -> None:
        if number == place:
            os.kill(os.getpid(), signal.SIGSTOP)

    one = Child(command(*stage.words(name), act=act))
    os.waitid(os.P_PID, one.pid, os.WSTOPPED)
    other = run(*stage.words(name))
    os.kill(one.pid, signal.SIGCONT)
    return _one_wins(one.end(), other)


def races(stage: Stage, count: int, seed: int):
    """(case, what went wrong or None)."""
    draw = random.Random(f"races {seed}")
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        stage.clear(name)
        # Whoever replaces may come after another.
        together = name != "overwrite" and draw.random() < 0.5
        place = draw.randint(*_claimed(stage, name))
        why = _together(stage, name) if together else _within(stage, name, place)
        way = "together" if together else f"the other at {place} ({stage.taken(name)[place]})"
        yield f"{number}: {name}, {way}", why or stage.lost(name) or stage.unfinished(name)
