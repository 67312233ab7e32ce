"""The tables of `make test`, as a whole: misuse of caches, threads beside each other, every argument of every op."""

import inspect
from collections.abc import Iterator

import torch

import liger_ops
from tests.models.misuse import judge
from tests.models.test_caches import GROUPS
from tests.models.test_threads import bits_of, model_with_settings
from tests.ops.test_doors import CASES, OTHERS, TENSORS, judged
from tests.torture.stage import Stage

_THREADS = 8
MISUSES = [(name, case) for group in GROUPS for name, case in group()]
# Arguments with values.
DOORS = sum(len(inspect.signature(getattr(liger_ops, name)).parameters) for name, _ in CASES) * len((*TENSORS, *OTHERS))


def caches(stage: Stage, count: int, seed: int) -> Iterator:
    """Every way to give a cache that is not a model's own, up to a count."""
    for name, case in MISUSES[:count]:
        said = judge(case)
        right = said == "right" or (said.startswith("refused: ") and not name.startswith("right: "))
        yield name, None if right else said


def threads(stage: Stage, count: int, seed: int) -> Iterator:
    """Calls in threads, measurements of the same model among them: each is a case."""
    calls = max(1, count // _THREADS)
    other = bits_of(model_with_settings(), _THREADS, calls)
    for number in range(_THREADS * calls):
        yield f"of {_THREADS} threads", f"{other} calls gave other bits than alone" if number < other else None


def doors(stage: Stage, count: int, seed: int) -> Iterator:
    """Every op's every argument beside everything that it is not, up to a count."""
    torch.manual_seed(seed)
    done = 0
    for name, right in CASES:
        for given, _, why in judged(name, right()):
            if done == count:
                return
            done += 1
            yield f"{name}, {given}", why
