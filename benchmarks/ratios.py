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

from benchmarks.test_ops import OPS


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 2}
    with torch.no_grad():
        for T in (512, 2048, 8192):
            times = interleaved({name: make(T) for name, make in OPS.items()}, args.rounds)
            result[f"T={T}"] = {"ms": times, "sdpa_over": {n: times["sdpa"] / t for n, t in times.items()}}
            print(T, {n: f"{t:.1f} ms, {times['sdpa'] / t:.2f}x" for n, t in times.items()}, flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
