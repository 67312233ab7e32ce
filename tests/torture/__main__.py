"""python -m tests.torture: the whole of the attacks of which `make test` runs samples, counted row by row.

Everything is drawn from a seed. --cases 0.1 runs that share of each row, --only kills,disk those rows.
"""

import argparse
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: children are forked, and threads would stay behind.
os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import transformers

from liger_models._whole import write_json
from tests.torture.rows import ROWS
from tests.torture.stage import Stage

ROOT = Path(__file__).parents[2]


def _shares(text: str) -> dict[str, float]:
    """The share of each row that is named, and of every other under no name."""
    parts = [part.rpartition("=") for part in text.split(",")]
    if unknown := {name for name, _, _ in parts} - {*ROWS, ""}:
        raise argparse.ArgumentTypeError(f"expected rows of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    return {name: float(share) for name, _, share in parts}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows, of {', '.join(ROWS)}; default: all")
    told = "share of each row, and of some rows others, as in 0.1,hostile=1 (default: all)"
    parser.add_argument("--cases", type=_shares, default={}, metavar="SHARES", help=told)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/torture.json", metavar="FILE")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(ROWS):
        parser.error(f"only: expected rows of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    return args


def _commit() -> str:
    said = [subprocess.run(["git", *x], cwd=ROOT, capture_output=True, text=True) for x in (
        ["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]  # fmt: skip
    return said[0].stdout.strip() + (" and changes" if said[1].stdout.strip() else "")


def _row(name: str, stage: Stage, share: float, seed: int) -> dict:
    """The counts of one row, which are printed too."""
    attack, whole = ROWS[name]
    count, failures, cases, start = max(1, round(whole * share)), [], 0, time.perf_counter()
    for case, why in attack(stage, count, seed):
        cases += 1
        if why:
            failures.append({"seed": seed, "case": case, "why": why})
            print(f"  {name} {case}: {why}", flush=True)
    seconds = round(time.perf_counter() - start, 1)
    print(f"{name:16} {cases - len(failures):6,} of {cases:6,} in {seconds:,} s", flush=True)
    return dict(of=whole, cases=cases, passed=cases - len(failures), failures=failures, seconds=seconds)


def main() -> int:
    args = _arguments()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "seed": args.seed,
    }

    def share(name: str) -> float:
        return args.cases.get(name, args.cases.get("", 1.0))

    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        # Or children would collect what is garbage here, in finalizers that swallow an interruption.
        gc.collect()
        gc.freeze()
        rows = {name: _row(name, stage, share(name), args.seed) for name in ROWS if name in args.only}
    gc.unfreeze()
    write_json(args.out, result | {"rows": rows})
    print(json.dumps({name: f"{row['passed']} of {row['cases']}" for name, row in rows.items()}))
    return int(any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
