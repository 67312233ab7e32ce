"""The CPU backend against the token loop, and grouped key heads against repeated ones, at T = 2048; medians.

python -m benchmarks.recurrence --out benchmarks/results/recurrence-cpu.json
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from benchmarks.ratios import interleaved
from benchmarks.test_ops import HQ, D, H, inputs
from liger_ops import chunk_gla, chunk_simple_gla, naive_recurrence

T = 2048
GATES = {"channel": (T, H, D), "head": (T, H), "none": None}


def run(op, leaves, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            op(*leaves)
        return
    leaves = [x.detach().requires_grad_() for x in leaves]
    torch.autograd.grad(op(*leaves)[0].sum(), leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    result = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 2, "T": T}
    for gate, shape in GATES.items():
        op = chunk_gla if gate == "channel" else chunk_simple_gla
        grouped = list(inputs(T)) + ([] if shape is None else [-torch.rand(1, *shape) / 16])
        repeated = [grouped[0], *(x.repeat_interleave(HQ // H, 2) for x in grouped[1:])]
        for backward in (False, True):
            calls = {
                "chunked": lambda op=op, x=grouped, b=backward: run(op, x, b),
                "repeated": lambda op=op, x=repeated, b=backward: run(op, x, b),
                "naive": lambda x=grouped, b=backward: run(naive_recurrence, x, b),
            }
            ms = interleaved(calls, args.rounds, 2 if backward else 6)
            name = f"{gate}, {'forward and backward' if backward else 'forward'}"
            result[name] = {
                "ms": ms,
                "naive_over_chunked": ms["naive"] / ms["chunked"],
                "repeated_over_chunked": ms["repeated"] / ms["chunked"],
            }
            print(name, {n: round(x, 2) if isinstance(x, float) else x for n, x in result[name].items()}, flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
