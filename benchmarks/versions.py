"""This checkout beside another one, in turns within one run: what a change costs, as a ratio; writes JSON.

git archive COMMIT | tar -x -C /tmp/old
python -m benchmarks.versions --against /tmp/old --out benchmarks/results/versions.json

Each checkout has a process, which holds its arguments and waits while the other one is timed; a round times both, the
order turned every time, and the median over all rounds of new / old counts. `--device cuda` for a GPU.

Shapes: B batch, T time.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Report, describe
from benchmarks.workers import Worker, say

ROOT = Path(__file__).parents[1]
# Milliseconds that a process waits for the other's threads to fall asleep, and that it is timed for.
_PAUSE, _SPAN = 5.0, 40.0


def _ops(device: torch.device, names: tuple[str, ...]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what makes a call: launch-bound and large, forward and both."""
    import liger_ops
    from benchmarks import cases, joint, timing

    cuda = device.type == "cuda"
    heads, dtype = (cases.Heads(), torch.bfloat16) if cuda else (cases.Heads(9, 3, 64), torch.float32)
    options = dict(device=device, dtype=dtype)

    def args_of(name: str, B: int, T: int) -> tuple[Callable, list, dict]:
        if name in cases.OPS:
            return getattr(liger_ops, name), *cases.inputs(B, T, name, False, heads, **options)
        x = joint.inputs(heads.HQ, heads.H, T, joint.WINDOW, joint.SINKS, True, 0, 0, heads.D, B, **options)
        if name == "liger_attention":
            return liger_ops.liger_attention, [], x
        rows = x["q"], *(x[n][:, joint.WINDOW :] for n in "kv")
        return lambda *y: (liger_ops.sliding_window_attention(*y, joint.WINDOW, joint.SINKS),), list(rows), {}

    sizes = ((1, 512), (8, 4096)) if cuda else ((1, 512), (1, 2048))
    found = {}
    for name in names or (*cases.OPS, "liger_attention", "sliding_window_attention"):
        for B, T in sizes:
            for kind in ("forward_ms", "both_ms"):
                found[f"{name} {B}x{T} {kind.partition('_')[0]}"] = lambda name=name, B=B, T=T, kind=kind: timing.calls(
                    *args_of(name, B, T)
                )[kind]
    return found


def _models(device: torch.device) -> dict[str, Callable[[], Callable[[], Any]]]:
    """A small random Llama, linearized: a prompt read, and a token decoded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import liger_models

    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=512, head_dim=64)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = liger_models.linearize(LlamaForCausalLM(config).to(device).eval(), recall=0)
    ids = torch.randint(1, 512, (1, 512), device=device)

    def prefill() -> Callable[[], Any]:
        return lambda: model(ids, use_cache=True, logits_to_keep=1)

    def decode() -> Callable[[], Any]:
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        return lambda: model(ids[:, :1], past_key_values=cache, use_cache=True)

    def frozen(make: Callable[[], Callable[[], Any]]) -> Callable[[], Callable[[], Any]]:
        def made() -> Callable[[], Any]:
            call = make()
            return lambda: torch.no_grad()(call)()

        return made

    return {"model, prefill of 512": frozen(prefill), "model, decode of one token": frozen(decode)}


def _milliseconds(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Of `count` calls, the host's time included, which is what a refactoring may cost."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / count


def work(path: str, device: torch.device, names: tuple[str, ...]) -> None:
    """A process on one checkout: reads a row's name or a number of calls, says names, or milliseconds of a call."""
    # Ahead of the directory that holds these benchmarks, which are already imported.
    sys.path.insert(0, path)
    found = _models(device) | _ops(device, names)
    used = {Path(sys.modules[n].__file__).resolve() for n in ("liger_ops", "liger_models")}
    if any(not file.is_relative_to(Path(path).resolve()) for file in used):
        raise RuntimeError(f"expected {path}, imported {used}")
    say(dict(names=list(found)))
    call = None
    for line in sys.stdin:
        asked = line.strip()
        if asked.isdigit():
            say(dict(ms=_milliseconds(call, int(asked), device)))
            continue
        call = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
        call = found[asked]()
        for _ in range(3):
            call()
        say(dict(ms=_milliseconds(call, 3, device)))


def measure(workers: dict[str, Worker], name: str, rounds: int, span: float = _SPAN) -> dict[str, float]:
    """Medians of milliseconds and of the ratios of rounds; best is the ratio of the fastest, the least disturbed."""

    def ask(which: str, count: int) -> float:
        time.sleep(_PAUSE / 1e3)
        workers[which].tell(str(count))
        return workers[which].heard(60)["ms"]

    # Kernels are compiled side by side.
    for worker in workers.values():
        worker.tell(name)
    for worker in workers.values():
        worker.heard(120)
    count = max(1, min(200, int(span / max(ask(which, 3) for which in workers))))
    times: dict[str, list[float]] = {which: [] for which in workers}
    for i in range(rounds):
        for which in list(workers)[:: 1 if i % 2 else -1]:
            times[which].append(ask(which, count))
    ratios = sorted(new / old for new, old in zip(times["new"], times["old"], strict=True))
    quarter = len(ratios) // 4
    row = {f"{which}_ms": statistics.median(found) for which, found in times.items()}
    middle = dict(ratio=statistics.median(ratios), low=ratios[quarter], high=ratios[-1 - quarter])
    return row | middle | dict(best=min(times["new"]) / min(times["old"]), calls=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="where another checkout lies")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--names", nargs="+", default=[], help="ops; all of them unless told")
    parser.add_argument("--only", nargs="+", default=[], help="rows that hold one of these")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=480, help="begin no row after that")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, torch.device(args.device), tuple(args.names))
        return
    end, paths = time.monotonic() + args.seconds, dict(old=args.against, new=ROOT)
    command = ["-m", "benchmarks.versions", "--against", str(args.against), "--device", args.device]
    command += ["--names", *args.names] if args.names else []

    # Threads that wait for work must not take the processor from the other checkout.
    environment = os.environ | dict(OMP_WAIT_POLICY="passive")

    def start() -> tuple[dict[str, Worker], list[str]]:
        begun = {
            n: Worker([*command, "--worker", str(path.resolve())], cwd=ROOT, env=environment)
            for n, path in paths.items()
        }
        known = [worker.heard(300)["names"] for worker in begun.values()]
        return begun, [n for n in known[0] if n in known[1] and any(x in n for x in args.only or [""])]

    workers, names = start()
    report = Report(describe(torch.device(args.device)) | dict(threads=torch.get_num_threads()), args.out)
    for name in names:
        if time.monotonic() > end:
            report.fail("ratios", name, "no time left")
            continue
        try:
            report.add("ratios", name, measure(workers, name, args.rounds))
        except (EOFError, TimeoutError, OSError) as fault:
            report.fail("ratios", name, str(fault))
            for worker in workers.values():
                worker.stop()
            workers, _ = start()
    for worker in workers.values():
        worker.stop()


if __name__ == "__main__":
    main()
