"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927) from random weights, one table of mixers.

A row of tokens holds pairs of a key and a value, then keys again at random, whose values the model must name. Every
mixer gets the same steps, optimisers, learning rates and seeds, and as much data: training climbs from few pairs in
short rows to what is tested, 32 pairs in 256 tokens, as soon as a model answers well enough. There are six times as
many keys as a memory of width 32 has channels: they cannot all stand at right angles, and what one write leaves of
another is what the rules differ in. At width 32 a memory nearly holds a row's 32 pairs, at width 16 it cannot.

A mixture of memories is compared with a single memory of the size that one of its tokens touches (values three times
as wide), and with the three memories of three heads. These run the delta rule, for nothing here is to be forgotten.
Learning rates, decay, the routers' loss and the ends of stages were chosen by rows of width 16, a mixture and that
single memory, over other seeds.

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
ENOUGH, ENDS = 0.85, (0.6, 0.7, 0.8)
# Learning rates of Muon, which takes matrices between hidden states, and of AdamW, which takes the rest and decays it.
MUON_RATE, ADAMW_RATE, DECAY, SEEDS = 0.01, 0.01, 0.3, (0, 1, 2, 3)
# Weight of the routers' loss.
BALANCE = 0.003
# Standard deviation of a fresh router's weights; that of all others is 0.1.
ROUTER_STD = 0.3


class Row(NamedTuple):
    """mixer, key width and heads of a layer, values `wide` times as wide, memories that a token writes to, options."""

    mixer: str
    width: int = 32
    heads: int = 1
    wide: int = 1
    touched: int = 1
    options: dict = {}  # noqa: RUF012


_MEMORIES = {
    "MoM, 4 memories, top 2, shared": Row("mom", touched=3, options=dict(rule="deltanet", router_shift=True)),
    "the same, its router blind to the token before": Row("mom", touched=3, options=dict(rule="deltanet")),
    "one memory, values three times as wide": Row("mixer:deltanet", wide=3),
    "three memories: three times the heads": Row("mixer:deltanet", heads=3),
}
ROWS = {
    **_MEMORIES,
    "gla": Row("mixer:gla"),
    "deltanet": Row("mixer:deltanet"),
    "gated_deltanet": Row("mixer:gated_deltanet"),
    **{f"{name}; width 16": row._replace(width=16) for name, row in _MEMORIES.items()},
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
    """Two layers of the row's mixer, of which the second may read what the first one found."""
    mixer, width, heads, wide, _, options = ROWS[row]
    config = LigerModelConfig(
        vocab_size=KEYS + VALUES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        head_dim=width,
        mixers=mixer,
        mixer_options={mixer: {"value_dim": wide * width, **options}},
        initializer_range=0.1,
        router_aux_loss_coef=BALANCE,
    )
    model = LigerForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("router.weight"):
            torch.nn.init.normal_(p, std=ROUTER_STD)
    return model


def optimizers(model: LigerForCausalLM, steps: int) -> tuple[list[Optimizer], list[LambdaLR]]:
    """Muon for matrices between hidden states, AdamW for the rest; rates rise, and fall from ENDS[-1] on.

    Gates of memories and of MLPs are among the rest, gates of a mixer's output are not.
    """
    # Turned as fast as other matrices, they may be shut or open before anything is worth remembering.
    apart = ("embed_tokens", "router", "convolution", "gate_proj.weight")
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and not any(x in name for x in apart) else others).append(p)
    both = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_RATE, weight_decay=DECAY),
    ]

    def factor(step: int) -> float:
        fall = max(0.0, (step / steps - ENDS[-1]) / (1 - ENDS[-1]))
        return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * fall))

    return both, [LambdaLR(x, factor) for x in both]


def train(model: LigerForCausalLM, seed: int, steps: int) -> None:
    """Cross entropy and the routers' loss, gradients clipped at 1; stages as ENOUGH and ENDS say."""
    generator = torch.Generator().manual_seed(seed)
    runners, schedules = optimizers(model, steps)
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


def run(row: str, seed: int, steps: int, rows: int) -> dict:
    torch.manual_seed(seed)
    model, start = build(row), time.perf_counter()
    train(model, seed, steps)
    seconds = time.perf_counter() - start
    score = accuracy(model, rows)
    print(f"{row}, seed {seed}: {100 * score:.1f} % after {seconds:.0f} s", flush=True)
    return {"row": row, "seed": seed, "accuracy": score, "training_s": seconds}


def summary(row: str, runs: list[dict]) -> dict:
    """What a row of the table says."""
    mixer, width, heads, wide, touched, options = ROWS[row]
    memory, scores = heads * wide * width**2, [r["accuracy"] for r in runs]
    return {
        "mixer": mixer,
        "options": options,
        "width": width,
        "active_state": touched * memory,
        "state": (5 if mixer == "mom" else 1) * memory,
        "parameters": sum(p.numel() for p in build(row).parameters()),
        "accuracies": scores,
        "accuracy": sum(scores) / len(scores),
        "training_s": [r["training_s"] for r in runs],
    }


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| mixer | state a token touches | whole state | parameters | accuracy, by seed | mean |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        seeds = ", ".join(f"{100 * x:.1f}" for x in r["accuracies"])
        sizes = f"{r['active_state']} | {r['state']} | {r['parameters']}"
        lines.append(f"| {name} | {sizes} | {seeds} | **{100 * r['accuracy']:.1f} %** |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="a few steps of every row, to see that it runs")
    args = parser.parse_args(arguments)
    steps, seeds, test = (8, SEEDS[:1], 4) if args.quick else (args.steps, SEEDS, 128)
    start = time.perf_counter()
    jobs = [(row, seed, steps, test) for seed, row in product(seeds, ROWS)]
    if args.quick:
        runs = [run(*job) for job in jobs]
    else:
        # Two runs at a time, a thread each.
        with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            runs = list(pool.map(run, *zip(*jobs, strict=True)))
    rows = {row: summary(row, [r for r in runs if r["row"] == row]) for row in ROWS}
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": steps,
        "muon_rate": MUON_RATE,
        "adamw_rate": ADAMW_RATE,
        "weight_decay": DECAY,
        "router_aux_loss_coef": BALANCE,
        "router_std": ROUTER_STD,
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
