"""Which layers of SmolLM2-135M stay full attention: measured selection against even spacing, before and after training.

python -m benchmarks.selection --out benchmarks/results/selection-smollm2.json

The key loss is the mean loss on six keys, each hidden in 512 tokens of the training text, that selection has not seen;
pass-key the share of eight that greedy decoding finds; perplexity that of four held-out blocks. Some of the original's
answers are near ties, which bfloat16 decides otherwise than float32 does: both are told.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from liger_models import checkpoint, finetune, linearize, perplexity, retrieval, select_layers
from liger_models._calibration import draw_text
from liger_models.demo import bundled_model
from liger_models.selection import hidden_keys, key_loss
from liger_models.text import standard_text, to_blocks

TRAINING, HELD_OUT = standard_text()
CONTEXTS = (256, 512, 1024)
# Seed of keys that neither `select_layers` nor `retrieval` hides.
SEED = 100


def load(dtype: torch.dtype = torch.float32):
    return checkpoint.load(str(bundled_model()), dtype)


@torch.no_grad()
def measure(model, tokenizer, contexts: Sequence[int]) -> dict:
    rows = hidden_keys(tokenizer, TRAINING, 512, torch.device("cpu"), SEED)
    return {
        "key_loss": sum(key_loss(model, *row) for row in rows) / len(rows),
        "perplexity": perplexity(model, to_blocks(tokenizer, HELD_OUT, 512)[:4]),
        "passkey": {n: retrieval(model, tokenizer, TRAINING, n) for n in contexts},
        "multikey": {n: retrieval(model, tokenizer, TRAINING, n, keys=4) for n in contexts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--steps", type=int, default=98, help="of fine-tuning with 4 layers, 1,024 tokens each")
    args = parser.parse_args()
    model, tokenizer = load()
    text, depth = draw_text(model), model.config.num_hidden_layers
    result = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = result["rows"] = {"original": measure(model, tokenizer, CONTEXTS)}
    print("original", rows["original"], flush=True)
    half = load(torch.bfloat16)[0]
    rows["original in bfloat16"] = {"passkey": {n: retrieval(half, tokenizer, TRAINING, n) for n in CONTEXTS}}
    print("in bfloat16", rows["original in bfloat16"], flush=True)
    del half
    for n in args.keep:
        start = time.perf_counter()
        chosen = select_layers(model, TRAINING, n, tokenizer=tokenizer, calibration=text, recall=0)
        result[f"selection_{n}_s"] = time.perf_counter() - start
        for name, keep in (("selected", chosen), ("even", [int((i + 0.5) * depth / n) for i in range(n)])):
            made, _ = load()
            linearize(made, keep=keep, calibration=text, recall=0)
            rows[f"{name} {n}"] = {"layers": sorted(keep), **measure(made, tokenizer, [512])}
            print(name, n, rows[f"{name} {n}"], flush=True)
            if name == "selected" and n == 4 and args.steps:
                made = finetune(made, tokenizer, TRAINING, steps=args.steps)
                rows["selected 4, fine-tuned"] = measure(made, tokenizer, [512])
                print("fine-tuned", rows["selected 4, fine-tuned"], flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
