"""The conversion without recall on SmolLM2-135M: perplexity before and after training, the original trained alike.

python -m benchmarks.quality --out benchmarks/results/quality-smollm2.json
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers

from liger_models import checkpoint, finetune, linearize, perplexity
from liger_models.costs import measure_costs
from liger_models.demo import bundled_model
from liger_models.evaluation import without_recurrence
from liger_models.text import standard_text, to_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prefill", action="store_true", help="also compare prefill at 8,192 tokens, interleaved")
    args = parser.parse_args()
    training, held_out = standard_text()
    path, result = str(bundled_model()), {"torch": torch.__version__, "transformers": transformers.__version__}
    result["steps"] = args.steps
    for name in ("original", "linearized", "paper-gla"):
        model, tokenizer = checkpoint.load(path, torch.float32)
        blocks = to_blocks(tokenizer, held_out, 512)
        if name != "original":
            linearize(model, preset="default" if name == "linearized" else name, recall=0)
        row = result[name] = {"before": perplexity(model, blocks[:4]), "before_12": perplexity(model, blocks[:12])}
        if name == "linearized":
            with without_recurrence(model):
                row["before_window_only"] = perplexity(model, blocks[:4])
        if name != "paper-gla":
            start = time.perf_counter()
            model = finetune(model, tokenizer, training, steps=args.steps)
            row["training_s"] = time.perf_counter() - start
            row |= {"after": perplexity(model, blocks[:4]), "after_12": perplexity(model, blocks[:12])}
        if name == "linearized":
            with without_recurrence(model):
                row["after_window_only"] = perplexity(model, blocks[:4])
        print(name, row, flush=True)
    for key in ("after", "after_12"):
        result[f"ratio_{key}"] = result["linearized"][key] / result["original"][key]
    if args.prefill:
        result["prefill_8192"] = prefill(path)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def prefill(path: str, context: int = 8192, rounds: int = 3) -> dict:
    """Seconds of prefill, original and linearized in turns in one process; medians."""
    models = {name: checkpoint.load(path, torch.float32)[0] for name in ("original", "linearized")}
    linearize(models["linearized"], recall=0)
    costs = measure_costs(models, [context], rounds=rounds, decode_tokens=1, threads=None)
    medians = {name: rows[0]["prefill_s"]["median"] for name, rows in costs.items()}
    return {**medians, "ratio": medians["original"] / medians["linearized"]}


if __name__ == "__main__":
    main()
