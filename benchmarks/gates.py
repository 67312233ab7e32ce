"""Every gate on SmolLM2-135M before any training: perplexity on four held-out blocks of 512 tokens.

python -m benchmarks.gates --out benchmarks/results/gates-smollm2.json
"""

import argparse
import json
from pathlib import Path

import torch
import transformers

from liger_layers.recurrences import with_gate
from liger_models import PRESETS, checkpoint, linearize, perplexity
from liger_models._calibration import draw_text
from liger_models.demo import bundled_model
from liger_models.evaluation import without_recurrence
from liger_models.text import standard_text, to_blocks


def measure(path: str, **options) -> dict[str, float]:
    """Perplexity of a conversion, and of its windows alone."""
    model, tokenizer = checkpoint.load(path, torch.float32)
    blocks = to_blocks(tokenizer, standard_text()[1], 512)[:4]
    linearize(model, **options)
    found = {"perplexity": perplexity(model, blocks)}
    with without_recurrence(model):
        return found | {"window_only": perplexity(model, blocks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = str(bundled_model())
    model, tokenizer = checkpoint.load(path, torch.float32)
    original = perplexity(model, to_blocks(tokenizer, standard_text()[1], 512)[:4])
    # Every conversion draws the same text by itself; once is enough.
    text = draw_text(model)
    rows = {gate: measure(path, gate=gate, recall=0, calibration=text) for gate in with_gate()}
    rows |= {preset: measure(path, preset=preset) for preset in PRESETS if preset != "default"}
    result = {"torch": torch.__version__, "transformers": transformers.__version__, "original": original, "rows": rows}
    print(f"| gate | perplexity | window alone |\n|---|---|---|\n| the original | {original:.2f} | |")
    for name, row in rows.items():
        print(f"| {name} | {row['perplexity']:,.2f} | {row['window_only']:,.2f} |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
