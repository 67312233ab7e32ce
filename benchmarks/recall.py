"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927) from random weights, one table of mixers.

A row of tokens holds pairs of a key and a value, then keys again at random, whose values the model must name. Every
mixer gets the same data, steps, optimiser, learning rates and seeds. Training climbs from few pairs in short rows to
what is tested: 32 pairs in 256 tokens.

python -m benchmarks.recall --out benchmarks/results/recall.json

Shapes: B rows, T tokens, P pairs.
"""

import argparse
import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from liger_models import LigerForCausalLM, LigerModelConfig

KEYS, VALUES = 48, 16
# (share of the steps until its end, pairs, tokens a row): each step has the same number of tokens.
STAGES = ((0.5, 4, 32), (0.62, 8, 64), (0.75, 16, 128), (1.0, 32, 256))
TOKENS = 1024
RATES, SEEDS = (5e-3, 1e-2), (0, 1)
# Name of the row: mixer, heads of width 16, memories that a token writes to.
ROWS = {
    "MoM, 4 memories, top 2, shared": ("mom", 2, 3),
    "one memory as large as those": ("gated_deltanet", 6, 1),
    "gla": ("gla", 2, 1),
    "deltanet": ("deltanet", 2, 1),
    "gated_deltanet": ("gated_deltanet", 2, 1),
}
WIDTH = 16


def draw(rows: int, pairs: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B,T] and labels [B,T]: at a query the value of its key, -100 elsewhere.

    Keys are 0 to KEYS - 1, each at most once among a row's pairs; values follow them in the vocabulary. Every token
    behind the pairs is a query.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (rows, pairs), generator=generator)
    asked = torch.randint(pairs, (rows, length - 2 * pairs), generator=generator)
    ids = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, asked)], 1)
    return ids, torch.cat([torch.full((rows, 2 * pairs), -100), values.gather(1, asked)], 1)


def build(row: str) -> LigerForCausalLM:
    """Two layers of the row's mixer: in the first, a router sees a value without the key before it."""
    mixer, heads, _ = ROWS[row]
    config = LigerModelConfig(
        vocab_size=KEYS + VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        head_dim=WIDTH,
        mixers=mixer,
        initializer_range=0.1,
    )
    return LigerForCausalLM(config)


def train(model: LigerForCausalLM, rate: float, seed: int, steps: int) -> None:
    """AdamW under a one-cycle rate, gradients clipped at 1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    coefficient = model.config.router_aux_loss_coef
    for step in range(steps):
        _, pairs, length = next(stage for stage in STAGES if step < stage[0] * steps)
        ids, labels = draw(TOKENS // length, pairs, length, generator)
        out = model(ids, output_router_logits=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        if out.aux_loss is not None:
            loss = loss + coefficient * out.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def accuracy(model: LigerForCausalLM, rows: int) -> float:
    """Share of queries answered right at the last stage, on rows that no training seed draws."""
    _, pairs, length = STAGES[-1]
    ids, labels = draw(rows, pairs, length, torch.Generator().manual_seed(10_000))
    asked = labels >= 0
    return (model.eval()(ids).logits.argmax(-1)[asked] == labels[asked]).float().mean().item()


def run(row: str, rate: float, seed: int, steps: int, rows: int) -> dict:
    torch.manual_seed(seed)
    model, start = build(row), time.perf_counter()
    train(model, rate, seed, steps)
    seconds = time.perf_counter() - start
    score = accuracy(model, rows)
    print(f"{row}, rate {rate}, seed {seed}: {100 * score:.1f} % after {seconds:.0f} s", flush=True)
    return {"row": row, "rate": rate, "seed": seed, "accuracy": score, "training_s": seconds}


def summary(row: str, runs: list[dict]) -> dict:
    """What a row of the table says: the accuracies of every rate, and those of the better one."""
    mixer, heads, active = ROWS[row]
    by_rate = {}
    for r in runs:
        by_rate.setdefault(str(r["rate"]), []).append(r["accuracy"])
    best = max(by_rate, key=lambda rate: sum(by_rate[rate]))
    return {
        "mixer": mixer,
        "active_state": active * heads * WIDTH**2,
        "state": (5 if mixer == "mom" else 1) * heads * WIDTH**2,
        "parameters": sum(p.numel() for p in build(row).parameters()),
        "accuracy_by_rate": by_rate,
        "best_rate": float(best),
        "accuracy": sum(by_rate[best]) / len(by_rate[best]),
        "training_s": sum(r["training_s"] for r in runs) / len(runs),
    }


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| mixer | state a token touches | whole state | parameters | accuracy, seeds | mean | learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        seeds = ", ".join(f"{100 * x:.1f}" for x in r["accuracy_by_rate"][str(r["best_rate"])])
        sizes = f"{r['active_state']} | {r['state']} | {r['parameters']}"
        lines.append(f"| {name} | {sizes} | {seeds} | **{100 * r['accuracy']:.1f} %** | {r['best_rate']} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--quick", action="store_true", help="a few steps of every row, to see that it runs")
    args = parser.parse_args(arguments)
    steps, rates, seeds, test = (8, RATES[:1], SEEDS[:1], 4) if args.quick else (args.steps, RATES, SEEDS, 128)
    start = time.perf_counter()
    jobs = list(zip(*product(ROWS, rates, seeds, [steps], [test]), strict=True))
    if args.quick:
        runs = list(map(run, *jobs))
    else:
        # Two runs at a time, a thread each.
        with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            runs = list(pool.map(run, *jobs))
    rows = {row: summary(row, [r for r in runs if r["row"] == row]) for row in ROWS}
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": steps,
        "rates": rates,
        "seeds": seeds,
        "stages": STAGES,
        "tokens_per_step": TOKENS,
        "keys": KEYS,
        "values": VALUES,
        "chance": 1 / VALUES,
        "total_s": time.perf_counter() - start,
        "rows": rows,
    }
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
