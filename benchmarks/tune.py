"""Other blocks, warps, stages and forms for each kernel of the joint softmax: right, and then how fast at full size.

Every candidate has a process of its own: some versions of Triton compile some of them into what ends a process.
"""

import functools
from typing import Any, NamedTuple

import torch

from benchmarks import joint as cases
from benchmarks import timing
from liger_ops import liger_attention, sliding_window_attention


class Candidate(NamedTuple):
    """Of a kernel: its configuration, at most so many registers, what `_triton.joint` holds, the window it is for."""

    kernel: str
    config: tuple[int, int, int, int]
    heads: int = 0
    registers: int = 0
    window: int = cases.WINDOW
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        more = [f"{n.strip('_')} {x}" for n, x in self.changes]
        more += [f"{n} {x}" for n, x in (("heads", self.heads), ("registers", self.registers)) if x]
        return " ".join([self.kernel, f"window {self.window}", "x".join(map(str, self.config)), *more])


def _known() -> list[Candidate]:
    """The first of each kernel and window is what stands."""
    apart, one, wide = (("_APART", True),), dict(heads=1), dict(window=cases.WIDE)
    found = []
    for window in (dict(window=cases.WINDOW), wide):
        for keys, config in (
            (64, (32, 128, 4, 2)),
            (64, (64, 128, 4, 2)),
            (64, (32, 128, 4, 3)),
            (128, (32, 128, 8, 2)),
            (128, (64, 128, 8, 2)),
        ):
            found.append(("near_kernel", config, window | dict(changes=(("_KEYS", keys),))))
    found += [
        ("joint_kernel", (32, 128, 8, 3), dict(heads=2)),
        ("joint_kernel", (32, 128, 8, 3), dict(heads=2, changes=apart)),
        ("joint_kernel", (32, 128, 8, 2), dict(heads=2, changes=apart)),
        ("joint_kernel", (32, 128, 4, 2), one),
        ("joint_kernel", (32, 128, 4, 2), one | dict(changes=apart)),
        ("joint_kernel", (16, 128, 4, 1), one | dict(changes=apart)),
        ("joint_kernel", (32, 128, 4, 1), one | dict(changes=apart)),
        ("joint_kernel", (16, 128, 4, 1), one | dict(changes=apart, registers=168)),
        ("joint_kernel", (32, 128, 4, 1), one | dict(changes=apart, registers=168)),
        ("queries_kernel", (32, 128, 4, 2), one),
        ("queries_kernel", (32, 128, 4, 1), one),
        ("queries_kernel", (16, 128, 4, 1), one),
        ("queries_kernel", (64, 128, 4, 1), one),
        ("queries_kernel", (32, 128, 4, 1), one | dict(registers=168)),
        ("queries_kernel", (32, 128, 8, 1), dict(heads=2)),
        ("queries_kernel", (32, 128, 8, 3), dict(heads=2)),
        ("far_keys_kernel", (64, 128, 4, 1), {}),
        ("far_keys_kernel", (128, 128, 8, 2), {}),
        ("far_keys_kernel", (128, 128, 8, 3), {}),
        ("far_keys_kernel", (32, 128, 4, 2), dict(registers=168)),
        ("far_keys_kernel", (32, 128, 4, 1), dict(registers=168)),
        ("far_values_kernel", (64, 128, 8, 3), {}),
        ("far_values_kernel", (64, 128, 8, 2), {}),
        ("far_values_kernel", (64, 128, 4, 1), {}),
        ("far_values_kernel", (64, 128, 8, 2), dict(registers=128)),
        ("far_values_kernel", (32, 128, 4, 1), {}),
        ("far_values_kernel", (32, 128, 4, 1), dict(registers=168)),
        ("far_states_kernel", (128, 128, 8, 3), {}),
        ("far_states_kernel", (128, 128, 8, 2), {}),
        ("far_states_kernel", (64, 64, 4, 3), {}),
        ("far_states_kernel", (128, 64, 4, 2), {}),
        ("far_states_kernel", (128, 128, 8, 3), dict(changes=(("piece", 512),))),
        ("sinks_kernel", (16, 128, 8, 2), {}),
        ("sinks_kernel", (16, 128, 4, 2), {}),
        ("sinks_kernel", (16, 128, 4, 2), dict(changes=(("_SUMMED", 4),))),
    ]
    found += [
        ("joint_kernel", (32, 128, 8, 3), wide | dict(heads=2)),
        ("joint_kernel", (32, 128, 8, 2), wide | dict(heads=2)),
        ("joint_kernel", (32, 128, 8, 2), wide | dict(heads=2, changes=(("_STEP", 2),))),
        ("joint_kernel", (32, 128, 8, 3), wide | dict(heads=2, changes=(("_STEP", 2),))),
        ("joint_kernel", (32, 128, 4, 3), wide | one),
        ("queries_kernel", (32, 128, 4, 2), wide | one),
        ("queries_kernel", (32, 128, 8, 2), wide | dict(heads=2)),
        ("queries_kernel", (32, 128, 8, 3), wide | dict(heads=2)),
    ]
    return [Candidate(kernel, config, **more) for kernel, config, more in found]


CANDIDATES = {str(candidate): candidate for candidate in _known()}


def jobs(_: Any) -> list[str]:
    return list(CANDIDATES)


def _apply(candidate: Candidate) -> None:
    """To this process."""
    from triton.runtime.jit import JITFunction

    from liger_ops._triton import joint, launch

    launch.CONFIGS[candidate.kernel] = [launch.Config(*candidate.config)]
    for name, value in candidate.changes:
        if name in launch.Launcher._fields:
            by = launch.LAUNCHER._replace(**{name: value})
            joint.prepare = functools.partial(joint.prepare, launcher=by)
        else:
            # A name that is no longer there would change nothing in silence.
            getattr(joint, name)
            setattr(joint, name, value)
    if candidate.heads:
        joint._TOGETHER[candidate.kernel] = candidate.heads
    run = JITFunction.run

    def bounded(self: Any, *args: Any, **given: Any) -> Any:
        more = dict(maxnreg=candidate.registers) if self.__name__ == candidate.kernel else {}
        return run(self, *args, **given, **more)

    if candidate.registers:
        JITFunction.run = bounded


def check(name: str, at: Any) -> dict[str, Any]:
    """The largest relative distance from float64, and the same bits twice: long enough for pieces of a sequence."""
    candidate = CANDIDATES[name]
    _apply(candidate)
    # A multiple of 16, as at full size: the same kernels.
    T = 160 if at.small else cases.WIDE + 112
    options = dict(device=at.device, dtype=torch.bfloat16)
    x = cases.inputs(4, 2, T, min(candidate.window, T), cases.SINKS, True, 0, at.heads.D, **options)
    op = cases.differentiated if candidate.window == cases.WINDOW else cases.windowed
    found, again, true = op(x), op(x), op(x, torch.float64)
    far = {n: ((y.double() - true[n]).norm() / true[n].norm()).item() for n, y in found.items()}
    worst = max(far, key=far.get)
    return {"of": worst, "error": far[worst], "same bits": all(torch.equal(y, again[n]) for n, y in found.items())}


def time(name: str, at: Any) -> dict[str, float]:
    """Milliseconds of the kernel in one forward and backward, however often it runs there."""
    candidate, T, count = CANDIDATES[name], at.lengths[-1], max(at.rounds // 2, 1)
    _apply(candidate)
    options = dict(device=at.device, dtype=torch.bfloat16)
    x = cases.inputs(at.heads.HQ, at.heads.H, T, cases.WINDOW, cases.SINKS, True, 0, at.heads.D, **options)
    if candidate.window == cases.WINDOW:
        calls = timing.calls(liger_attention, [], x)
    else:
        rows, reach = [x["q"], *(x[n][:, cases.WINDOW :] for n in "kv")], min(candidate.window, T)
        calls = timing.calls(lambda *y: (sliding_window_attention(*y, reach),), rows, {})
    calls["both_ms"]()
    with torch.profiler.profile() as profile:
        for _ in range(count):
            calls["both_ms"]()
    spent = [row.self_device_time_total for row in profile.key_averages() if row.key.startswith(candidate.kernel)]
    return {"ms": sum(spent) / 1e3 / count}
