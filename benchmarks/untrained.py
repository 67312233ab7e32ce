"""What recall brings before any training: SmolLM2-135M by the number R of tokens recalled, beside the original.

python -m benchmarks.untrained --data FOLDER --out benchmarks/results/recovery/untrained.json

Perplexity on 4 and 12 held-out blocks of the help topics of Python, and of other text: two modules of its library, and
the .txt files in FOLDER; keys found in 512 and 1,024 tokens; SQuAD passages completed, where FOLDER has squad.jsonl.
A figure is written as soon as it is there, and one that is there is not measured again.
"""

import argparse
import json
import json.decoder
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import describe
from liger_models import checkpoint, linearize, perplexity, retrieval, run_tasks, standard_text
from liger_models._calibration import draw_text
from liger_models.demo import bundled_model
from liger_models.text import to_blocks

LENGTH, BLOCKS, CONTEXTS = 512, 4, (512, 1024)


def other_texts(tokenizer, folder: Path | None) -> dict[str, torch.Tensor]:
    """Blocks by name: of source code, and of the text files in a folder."""
    files = {"code": [Path(argparse.__file__), Path(json.decoder.__file__)]}
    for path in sorted(folder.glob("*.txt")) if folder else []:
        files.setdefault("novels" if path.name.startswith("book_") else path.stem, []).append(path)
    found = {}
    for name, paths in files.items():
        # Behind the beginning, which is often a preface.
        texts = [path.read_text(encoding="utf-8") for path in paths]
        rows = [to_blocks(tokenizer, text[len(text) // 4 :][: 8 * LENGTH * BLOCKS], LENGTH) for text in texts]
        found[name] = torch.cat([row[: max(1, BLOCKS // len(paths))] for row in rows])
    return found


def figures(model, tokenizer, folder: Path | None) -> dict[str, Any]:
    """What is to be measured, by name, each a call."""
    training, held_out = standard_text()
    blocks = to_blocks(tokenizer, held_out, LENGTH)
    found = {f"perplexity_{n}": lambda n=n: perplexity(model, blocks[:n]) for n in (4, 12)}
    for name, rows in other_texts(tokenizer, folder).items():
        found[f"perplexity_{name}"] = lambda rows=rows: perplexity(model, rows)
    for context in CONTEXTS:
        found[f"passkey_{context}"] = lambda n=context: retrieval(model, tokenizer, training, n)
    if folder and (folder / "squad.jsonl").is_file():
        found["squad"] = lambda: run_tasks(model, tokenizer, ["squad"], folder, examples=60)["squad"]["score"]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recall", type=int, nargs="*", default=[0, 64, 128], help="R of each row")
    parser.add_argument("--model", help="a folder or GGUF file; default: the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="folder with text files and squad.jsonl")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery/untrained.json"))
    args = parser.parse_args(argv)
    source, calibration = args.model or str(bundled_model()), None
    found = json.loads(args.out.read_text()) if args.out.exists() else describe(torch.device("cpu")) | {"rows": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for recall in [*args.recall, None]:
        row = found["rows"].setdefault("original" if recall is None else f"recall {recall}", {})
        model, tokenizer = checkpoint.load(source, torch.float32)
        if recall is not None:
            calibration = draw_text(model, batch=16) if calibration is None else calibration
            linearize(model, recall=recall, calibration=calibration, tokenizer=tokenizer)
        for name, measure in figures(model, tokenizer, args.data).items():
            if name not in row:
                start = time.monotonic()
                row[name] = measure()
                print(f"{recall} {name} {row[name]:.4f} ({time.monotonic() - start:.0f} s)", flush=True)
                args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
