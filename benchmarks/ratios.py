"""Medians of interleaved runs of two functions, so that a drifting machine favours neither; writes JSON.

python -m benchmarks.ratios --out benchmarks/results/ops-cpu.json
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from benchmarks.test_ops import OPS, settle_allocator


def interleaved(functions: dict, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, called in turn."""
    times = {name: [] for name in functions}
    for _ in range(2):
        for f in functions.values():
            f()
    for _ in range(rounds):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(result: dict, name: str, T: int, rounds: int) -> None:
    times = interleaved({op: make(T) for op, make in OPS.items()}, rounds)
    result[name] = {"ms": times, "sdpa_over": {op: times["sdpa"] / t for op, t in times.items()}}
    print(name, {op: f"{t:.1f} ms, {times['sdpa'] / t:.2f}x" for op, t in times.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 2}
    with torch.no_grad():
        measure(result, "fresh process, T=2048", 2048, args.rounds)
        settle_allocator()
        for T in (512, 2048, 8192):
            measure(result, f"T={T}", T, args.rounds)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
