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


def interleaved(functions: dict, rounds: int, row: int = 1) -> dict[str, float]:
    """Median milliseconds of each function, called in turn, `row` times in a row."""
    times = {name: [] for name in functions}
    for _ in range(2):
        for f in functions.values():
            f()
    for _ in range(rounds):
        for name, f in functions.items():
            for _ in range(row):
                start = time.perf_counter()
                f()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(result: dict, T: int, rounds: int) -> None:
    """Every op in turn with SDPA, and with nothing else that would empty its caches."""
    row = result[f"T={T}"] = {}
    for name, make in OPS.items():
        if name != "sdpa":
            times = interleaved({"sdpa": OPS["sdpa"](T), name: make(T)}, rounds)
            row[name] = {"ms": times[name], "sdpa_ms": times["sdpa"], "sdpa_over": times["sdpa"] / times[name]}
    print(T, {name: f"{x['ms']:.1f} ms, {x['sdpa_over']:.2f}x" for name, x in row.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 2}
    with torch.no_grad():
        for T in (512, 2048, 8192):
            measure(result, T, args.rounds)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
