"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927) from random weights, one table of mixers.

A row of tokens holds pairs of a key and a value, then keys again at random, whose values the model must name. Every
mixer gets the same steps, optimiser, learning rates and seeds, and as much data: training climbs from few pairs in
short rows to what is tested, 32 pairs in 256 tokens, as soon as a model answers well enough. There are six times as
many keys as a memory has channels: they cannot all stand at right angles, and what one write leaves of another is
what the rules differ in.

python -m benchmarks.recall --out benchmarks/results/recall.json

Shapes: B rows, T tokens, P pairs.
"""

import argparse
import json
import math
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from liger_models import LigerForCausalLM, LigerModelConfig

KEYS, VALUES = 192, 16
# Pairs and tokens of a row: each step has the same number of tokens.
STAGES = ((4, 32), (8, 64), (16, 128), (32, 256))
TOKENS = 1024
# A stage ends when so many answers are right, or else at its share of all steps.
ENOUGH, ENDS = 0.85, (0.4, 0.5, 0.6)
# Learning rates of the matrices, on all of which Muon runs; AdamW takes the rest.
RATES, ADAMW_RATE, SEEDS = (0.05, 0.1), 0.01, (0, 1)
WIDTH = 32


class Row(NamedTuple):
    """mixer and heads of a layer, values `wide` times as wide as keys, and the memories that a token writes to."""

    mixer: str
    heads: int = 1
    wide: int = 1
    touched: int = 1


ROWS = {
    "MoM, 4 memories, top 2, shared": Row("mom", touched=3),
    "one memory, three times the heads": Row("gated_deltanet", heads=3),
    "one memory, values three times as wide": Row("gated_deltanet", wide=3),
    "gla": Row("gla"),
    "deltanet": Row("deltanet"),
    "gated_deltanet": Row("gated_deltanet"),
}


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
    mixer, heads, wide, _ = ROWS[row]
    config = LigerModelConfig(
        vocab_size=KEYS + VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        head_dim=WIDTH,
        mixers=mixer,
        mixer_options={mixer: {"value_dim": wide * WIDTH}},
        initializer_range=0.1,
    )
    return LigerForCausalLM(config)


def optimizers(model: LigerForCausalLM, rate: float, steps: int) -> tuple[list[Optimizer], list[LambdaLR]]:
    """Muon for matrices between hidden states, AdamW for all else; rates rise, stay, and fall from ENDS[-1] on."""
    apart = ("embed_tokens", "router", "convolution")
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and not any(x in name for x in apart) else others).append(p)
    both = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, weight_decay=0.1),
    ]

    def factor(step: int) -> float:
        fall = max(0.0, (step / steps - ENDS[-1]) / (1 - ENDS[-1]))
        return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * fall))

    return both, [LambdaLR(x, factor) for x in both]


def train(model: LigerForCausalLM, rate: float, seed: int, steps: int) -> None:
    """Cross entropy and the routers' loss, gradients clipped at 1; stages as ENOUGH and ENDS say."""
    generator = torch.Generator().manual_seed(seed)
    runners, schedules = optimizers(model, rate, steps)
    stage, right = 0, 0.0
    for step in range(steps):
        if stage < len(ENDS) and (right > ENOUGH or step >= ENDS[stage] * steps):
            stage, right = stage + 1, 0.0
        pairs, length = STAGES[stage]
        ids, labels = draw(TOKENS // length, pairs, length, generator)
        out = model(ids, output_router_logits=True)
        asked = labels >= 0
        loss = F.cross_entropy(out.logits[asked], labels[asked])
        if out.aux_loss is not None:
            loss = loss + model.config.router_aux_loss_coef * out.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # A running mean over some twenty steps.
        right += 0.05 * ((out.logits.argmax(-1) == labels)[asked].float().mean().item() - right)
        for x in (*runners, *schedules):
            x.step()
        model.zero_grad()


@torch.no_grad()
def accuracy(model: LigerForCausalLM, rows: int) -> float:
    """Share of queries answered right at the last stage, on rows that no training seed draws."""
    pairs, length = STAGES[-1]
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
    mixer, heads, wide, touched = ROWS[row]
    memory = heads * wide * WIDTH**2
    by_rate = {}
    for r in runs:
        by_rate.setdefault(str(r["rate"]), []).append(r["accuracy"])
    best = max(by_rate, key=lambda rate: sum(by_rate[rate]))
    return {
        "mixer": mixer,
        "active_state": touched * memory,
        "state": (5 if mixer == "mom" else 1) * memory,
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
    parser.add_argument("--steps", type=int, default=1500)
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
