"""The kernels on a GPU: right against float64 first, then timed beside others and the machine's floors; writes JSON.

python -m benchmarks.gpu --out benchmarks/results/gpu.json --only floors errors joint ops

Every row has a process of its own: rows of `errors` run side by side, those with times alone and one after the other,
their kernels compiled beforehand. Each section ends when its time is up; what is missing then says why, under `failed`.
`--device cpu --small` rehearses it. Where fla is installed, it gets its heads repeated.

Shapes: B batch, T time, HQ query heads, H key/value heads, D width.
"""

import argparse
import importlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, NamedTuple

import torch

import liger_ops
from benchmarks import cases, compiled, joint, timing, tune
from benchmarks.cases import OPS, Heads
from benchmarks.report import Report, describe
from benchmarks.workers import Worker, say


class Setting(NamedTuple):
    """Where and how large everything is measured."""

    device: torch.device
    heads: Heads
    batch: int
    length: int
    lengths: list[int]
    rounds: int
    small: bool


# Processes that wait for their turn, and seconds that one may have alone.
_AHEAD, _LONGEST = 5, 90
Rows = Iterator[tuple[str, dict[str, Any]]]


def _floors(_: str, at: Setting) -> Rows:
    yield from timing.floors(at.device, at.rounds, at.small).items()


def _errors(job: str, at: Setting) -> Rows:
    name, kind = job.rsplit(" ", 1)
    dtype = getattr(torch, kind)
    if name in OPS:
        yield job, cases.errors(name, 64 if at.small else 1024, dtype, at.device, at.heads)
    else:
        yield job, joint.errors(name, dtype, at.device, at.heads.D)


def _joint(job: str, at: Setting) -> Rows:
    name, T = job.rsplit(" at ", 1)
    yield job, joint.TIMED[name](int(T), at.heads, at.device, at.rounds)


def _kernels(_: str, at: Setting) -> Rows:
    yield f"at {at.lengths[-1]}", joint.kernels(at.lengths[-1], at.heads, at.device)
    yield f"of the host at {at.lengths[0]}", joint.host(at.lengths[0], at.heads, at.device)


def _ops(name: str, at: Setting) -> Rows:
    args, more = cases.inputs(at.batch, at.length, name, False, at.heads, device=at.device, dtype=torch.bfloat16)
    yield name, timing.timed(getattr(liger_ops, name), args, more, at.device, at.rounds)


def _fla(name: str, at: Setting) -> Rows:
    compiled.tune_quickly()
    op = getattr(importlib.import_module(OPS[name].fla), name)
    args, more = cases.inputs(at.batch, at.length, name, True, at.heads, device=at.device, dtype=torch.bfloat16)
    # It refuses some backward passes on some versions of Triton.
    for kind, call in timing.calls(op, args, more).items():
        yield f"{name} {kind}", {kind: timing.in_a_row(call, at.device, at.rounds)}


def _whole(name: str, at: Setting) -> Rows:
    # It alone needs transformers.
    from benchmarks import whole

    yield name, getattr(whole, name)(at)


class Section(NamedTuple):
    """Seconds it may take, the names of its jobs, how one runs, whether alone, and whether kernels compile before."""

    seconds: float
    jobs: Callable[[Setting], list[str]]
    run: Callable[[str, Setting], Rows]
    alone: bool = True
    compiled: bool = False


def _error_jobs(_: Setting) -> list[str]:
    found = [f"{name} {kind}" for name in joint.CASES for kind in ("bfloat16", "float32", "float16")]
    return found + [f"{name} {kind}" for name in OPS for kind in ("bfloat16", "float32")]


def _has_compiled(job: str) -> bool:
    """Whether others compile what it runs, or nobody does."""
    return any(word in job for word in ("replayed", "copy", "sdpa"))


def _joint_jobs(at: Setting) -> list[str]:
    names = [n for n in joint.TIMED if at.device.type == "cuda" or "replayed" not in n]
    # The long ones first: they are what is asked for.
    return [f"{name} at {T}" for T in reversed(at.lengths) for name in names]


SECTIONS = {
    "floors": Section(20, lambda _: ["machine"], _floors),
    "errors": Section(180, _error_jobs, _errors, alone=False),
    "joint": Section(150, _joint_jobs, _joint, compiled=True),
    "kernels": Section(30, lambda _: ["joint"], _kernels),
    "ops": Section(120, lambda _: list(OPS), _ops, compiled=True),
    "whole": Section(110, lambda _: ["checks", "prefill", "decode", "training"], _whole),
    "joint-check": Section(180, tune.jobs, lambda job, at: iter([(job, tune.check(job, at))]), alone=False),
    "joint-tune": Section(180, tune.jobs, lambda job, at: iter([(job, tune.time(job, at))])),
    "fla": Section(200, lambda _: [n for n in reversed(OPS) if OPS[n].fla], _fla, compiled=True),
}
DEFAULT = ("floors", "errors", "joint", "kernels", "ops", "whole", "fla")


def work(section: str, job: str, at: Setting, only_compile: bool) -> None:
    """In a process of its own: rows on its output, after a line on its input."""
    if section == "fla":
        importlib.import_module(OPS[job].fla)
    torch.zeros(1, device=at.device)
    input()
    if only_compile and "flex" not in job:
        # Fewer sequences than are timed, for many do so at once, but as many kinds of kernels.
        compiled.launch_nothing(threads=4)
        at = at._replace(batch=min(at.batch, 5), rounds=1)
    if only_compile:
        at = at._replace(rounds=1)
    for name, row in SECTIONS[section].run(job, at):
        say(dict(name=name, row=row))


class Run:
    """What one command measures: its processes, its report, its end."""

    def __init__(self, report: Report, arguments: list[str], at: Setting, seconds: float, workers: int):
        self.report, self.arguments, self.at = report, arguments, at
        self.end, self.pool = time.monotonic() + seconds, ThreadPoolExecutor(workers)

    def worker(self, section: str, job: str, *more: str) -> Worker:
        return Worker(["-m", "benchmarks.gpu", *self.arguments, "--job", section, job, *more])

    def listen(self, worker: Worker, section: str, job: str, until: float) -> None:
        worker.tell()
        try:
            for said in worker.rows(until - time.monotonic()):
                self.report.add(section, said["name"], said["row"])
        except (RuntimeError, TimeoutError, OSError) as fault:
            self.report.fail(section, job, str(fault))

    def beside(self, section: str, job: str, until: float) -> None:
        """One of several at once."""
        if time.monotonic() > until:
            self.report.fail(section, job, "no time left")
            return
        self.listen(self.worker(section, job), section, job, until)

    def compile(self, section: str, job: str) -> None:
        worker = self.worker(section, job, "--only-compile")
        worker.tell()
        try:
            list(worker.rows(self.end - time.monotonic()))
        except (RuntimeError, TimeoutError, OSError) as fault:
            self.report.fail("compilation", f"{section} {job}", str(fault)[-200:])

    def alone(self, section: str, jobs: list[str], ready: dict[str, Future], until: float) -> None:
        """One at a time, while the next ones import what they need."""
        waiting: deque[Worker] = deque()
        for i, job in enumerate(jobs):
            ahead = jobs[i + len(waiting) : i + _AHEAD]
            waiting.extend(self.worker(section, following) for following in ahead)
            worker = waiting.popleft()
            try:
                if job in ready:
                    ready[job].result(timeout=max(until - time.monotonic(), 0.01))
            except FutureTimeout:
                self.report.fail(section, job, "its kernels were not compiled in time")
                worker.stop()
                continue
            # What hangs costs no other its time.
            self.listen(worker, section, job, min(until, time.monotonic() + _LONGEST))

    def everything(self, chosen: list[str], names: list[str]) -> None:
        begun, jobs = {}, {}
        for section in chosen:
            found = SECTIONS[section].jobs(self.at)
            jobs[section] = [job for job in found if not names or any(n in job for n in names)]
        for section in chosen:
            if not SECTIONS[section].alone:
                until = min(self.end, time.monotonic() + SECTIONS[section].seconds)
                begun[section] = {job: self.pool.submit(self.beside, section, job, until) for job in jobs[section]}
        ready = {
            section: {j: self.pool.submit(self.compile, section, j) for j in jobs[section] if not _has_compiled(j)}
            for section in chosen
            if SECTIONS[section].compiled and self.at.device.type == "cuda"
        }
        for rows in begun.values():
            for future in rows.values():
                future.result()
        for section in chosen:
            if SECTIONS[section].alone and jobs[section]:
                begin = time.monotonic()
                until = min(self.end, begin + SECTIONS[section].seconds)
                self.alone(section, jobs[section], ready.get(section, {}), until)
                self.report.add("seconds", section, round(time.monotonic() - begin, 1))
        self.pool.shutdown(cancel_futures=True)


def parse() -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(DEFAULT), help="sections")
    parser.add_argument("--names", nargs="+", default=[], help="rows that hold one of these alone")
    parser.add_argument("--seconds", type=float, default=540, help="of all sections")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 3) - 2, 1), help="processes at once")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only-compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (Heads(4, 2, 64), 1, 128, [128]) if args.small else (Heads(), 8, 4096, [4096, 32768])
    return args, Setting(torch.device(args.device), *sizes, args.rounds, args.small)


def main() -> None:
    args, at = parse()
    if args.job:
        work(*args.job, at, args.only_compile)
        return
    shape = dict(at.heads._asdict(), B=at.batch, T=at.length, joint=dict(B=1, T=at.lengths), dtype="bfloat16")
    report = Report(describe(at.device) | dict(shape=shape), args.out)
    arguments = ["--device", args.device, "--rounds", str(args.rounds), *(["--small"] if args.small else [])]
    Run(report, arguments, at, args.seconds, args.workers).everything(args.only, args.names)
    print(json.dumps(dict(failed=report.found["failed"]), indent=1))


if __name__ == "__main__":
    main()
