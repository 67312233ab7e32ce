"""What is claimed of a linearized SmolLM2-135M, on one day: models trained and measured, two side by side.

python -m benchmarks.claims --data FOLDER --out FOLDER           every step that is not there yet
python -m benchmarks.claims --out FOLDER --table                 what is there, beside what it is held to

A step is a process of its own and leaves NAME.json, and a model where others need it. A figure is written as soon as it
is there, and one that is there is not measured again, so that an interrupted study goes on where it stopped. FOLDER of
--data holds JSONL files of the tasks.
"""

import argparse
import json
import math
import operator
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.recovery import PUBLISHED
from benchmarks.report import describe
from liger_models import checkpoint, draw, finetune, linearize, perplexity, retrieval, run_tasks, standard_text
from liger_models.demo import bundled_model
from liger_models.evaluation import position_losses
from liger_models.tasks import SIX_TASKS
from liger_models.text import to_blocks
from liger_models.variants import exact_tokens, with_recall, without_recurrence

LENGTH, BLOCKS, STEPS, DRAWN = 512, 12, 300, 90_000
# Window, sinks and the recall that layers are made with.
START = dict(recall=64, fit_mix=True)
ALIKE = dict(batch=1, length=LENGTH, steps=STEPS, retrieval=0.25, learning_rate=5e-4, bf16=True)
LEARN = ALIKE | dict(objective="kl=1,next=0.5", window_dropout=0.5, recall_dropout=0.5)
# Four of thirty layers full, chosen by `select_layers` with recall on keys in 1,024 tokens.
KEPT = dict(recall=64, keep=(2, 7, 8, 20))
KEEPING = ALIKE | dict(objective="kl=1,next=0.5", length=1024, steps=290, retrieval=0.55, window_dropout=0.25)


class Step(NamedTuple):
    """liger: options of `linearize`, None for the original. recipe: of `finetune`, None for no training. text: "own",
    what the model wrote, or "help", the standard library's topics. figures: names of figures, by how many tokens are
    recalled, None for as many as the layers were made with. needs: steps that come before."""

    liger: dict[str, Any] | None
    recipe: dict[str, Any] | None
    figures: dict[int | None, tuple[str, ...]]
    text: str = "own"
    needs: tuple[str, ...] = ()


# Beside a model that a step has saved: how it learned.
ABOUT = "recipe.json"
FOUND = ("perplexity", "passkey_512", "passkey_1024", "squad", "six")
STEPS_BY_NAME: dict[str, Step] = {
    "linear-selected": Step(
        KEPT, KEEPING, {None: ("passkey_512", "passkey_1024", "passkey_2048", "multikey_512", "perplexity")}, "help"
    ),
    "drawn": Step(None, None, {}),
    "linear": Step(
        START,
        LEARN,
        {
            128: FOUND,
            256: ("passkey_2048",),
            None: ("perplexity", "off_512", "off_1024", "off_2048"),
            0: ("perplexity", "off_512"),
        },
        needs=("drawn",),
    ),
    "original-tuned": Step(None, ALIKE, {None: FOUND}, needs=("drawn",)),
    **{
        name: Step(dict(preset=name), ALIKE | PUBLISHED, {None: FOUND}, needs=("drawn",))
        for name in ("paper-gla", "paper-gsa", "paper-hgrn2")
    },
    "linear-text": Step(START, LEARN, {128: ("perplexity",)}, "help"),
    "original": Step(None, None, {None: (*FOUND, "passkey_2048", "multikey_512")}),
    "untrained": Step(START, None, {128: ("six",)}),
}


def figure(name: str, model, tokenizer, data: Path) -> Any:
    """One figure of a model as it is."""
    training, held_out = standard_text()
    kind, _, number = name.partition("_")
    if kind in ("passkey", "multikey"):
        return retrieval(model, tokenizer, training, int(number), keys=4 if kind == "multikey" else 1)
    if kind == "squad":
        return run_tasks(model, tokenizer, ["squad"], data, examples=60)["squad"]["score"]
    if kind == "six":
        found = {k: v["score"] for k, v in run_tasks(model, tokenizer, SIX_TASKS, data, examples=200).items()}
        return found | {"average": sum(found.values()) / len(found)}
    blocks = to_blocks(tokenizer, held_out, LENGTH)[:BLOCKS]
    if kind == "perplexity":
        return perplexity(model, blocks)
    # As many tokens in longer rows; what switching the recurrence off costs beyond the exact ones.
    rows, exact = blocks.reshape(-1, int(number)), exact_tokens(model)
    losses = []
    for context in (nullcontext(), without_recurrence(model)):
        with context:
            losses.append(position_losses(model, rows).mean(exact))
    return losses[1] - losses[0]


def run(name: str, args: argparse.Namespace) -> None:
    """One step: a model that learns, if it has not, and every figure of it that is not there."""
    step, path, weights = STEPS_BY_NAME[name], args.out / f"{name}.json", args.out / "weights" / name
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else describe(torch.device("cpu"))

    def note(key: str, value: Any, start: float) -> None:
        found[key], found.setdefault("seconds", {})[key] = value, round(time.monotonic() - start)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name} {key}: {value}, {found['seconds'][key]} s", flush=True)

    start, trained = time.monotonic(), weights.exists()
    source = str(weights) if trained else args.model or str(bundled_model())
    model, tokenizer = checkpoint.load(source, torch.float32)
    if name == "drawn":
        rows = draw(model, tokenizer, args.drawn, out=args.out / "drawn.jsonl", length=LENGTH, batch=args.drawn_at_once)
        note("rows", len(rows), start)
    if step.liger is not None and not trained:
        linearize(model, tokenizer=tokenizer, **step.liger)
    if step.recipe is not None and not trained:
        recipe = step.recipe | dict(steps=max(1, step.recipe["steps"] // args.shorter))
        text = standard_text()[0] if step.text == "help" else args.out / "drawn.jsonl"
        model = finetune(model, tokenizer, text, **recipe)
        checkpoint.save(model, tokenizer, weights, overwrite=True)
        (weights / ABOUT).write_text(json.dumps(recipe), encoding="utf-8")
    if step.recipe is not None and "recipe" not in found:
        recipe = json.loads((weights / ABOUT).read_text(encoding="utf-8"))
        told = dict(tokens=recipe["steps"] * recipe["length"], liger=step.liger, text=step.text)
        note("recipe", recipe | told, start)
    for recall, names in step.figures.items():
        with nullcontext() if recall is None else with_recall(model, recall):
            for each in names:
                key, start = each if recall is None else f"{each}@{recall}", time.monotonic()
                if key not in found:
                    note(key, figure(each, model, tokenizer, args.data), start)
    note("done", True, start)


def done(name: str, out: Path) -> bool:
    path = out / f"{name}.json"
    return path.exists() and "done" in json.loads(path.read_text(encoding="utf-8"))


def run_all(args: argparse.Namespace, start: Callable[[str], int]) -> None:
    """Every step that is not done, --jobs at once, in the order of the table where what a step needs is there."""
    waiting = [name for name in args.only or STEPS_BY_NAME if not done(name, args.out)]
    for need in {x for name in waiting for x in STEPS_BY_NAME[name].needs} - set(waiting):
        if not done(need, args.out):
            sys.exit(f"--only: expected {need} too, which is not done and others need")
    ready, failed = threading.Condition(), []

    def work() -> None:
        while True:
            with ready:
                while True:
                    if failed or not waiting:
                        return
                    able = [n for n in waiting if all(done(x, args.out) for x in STEPS_BY_NAME[n].needs)]
                    if able:
                        break
                    ready.wait()
                waiting.remove(able[0])
            code = start(able[0])
            with ready:
                failed.extend([able[0]] if code else [])
                ready.notify_all()

    workers = [threading.Thread(target=work) for _ in range(args.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        sys.exit(f"{', '.join(failed)}: failed; what they say lies in {args.out}")


def bars(at: Callable[[str, str], float]) -> Iterator[tuple[str, float, str, float]]:
    """What figures are held to: a row's name, what was measured, and what it is to be at least or at most."""
    tuned = at("linear", "perplexity@128") / at("original-tuned", "perplexity")
    yield "perplexity, R = 128, of the original's tuned alike", tuned, "<=", 1.02
    for name, key, least in (
        ("512", "512@128", 0.95),
        ("1,024", "1024@128", 0.85),
        ("2,048, R = 256", "2048@256", 0.6),
    ):
        yield f"keys in {name}", at("linear", f"passkey_{key}"), ">=", least
    kept = ("keys in 512", "passkey_512"), ("keys in 1,024", "passkey_1024"), ("one of four in 512", "multikey_512")
    for name, key in (*kept, ("keys in 2,048", "passkey_2048")):
        least = 0.95 if key in ("passkey_512", "passkey_1024") else 0.85
        yield f"four layers full, R = 64: {name}", at("linear-selected", key), ">=", least
    yield "six tasks, of the original's", at("linear", "six@128") / at("original", "six"), ">=", 0.99
    yield "of the untrained", at("linear", "six@128") / at("untrained", "six@128"), ">=", 1.0
    yield "SQuAD, of the original's", at("linear", "squad@128") / at("original", "squad"), ">=", 0.97
    for length in (512, 1024, 2048):
        yield f"recurrence off, R = 64, rows of {length:,}", at("linear", f"off_{length}"), ">=", 0.02
    yield "R = 0, rows of 512", at("linear", "off_512@0"), ">=", 0.05
    for name in (x for x in STEPS_BY_NAME if x.startswith("paper-")):
        yield f"perplexity, of {name}", at("linear", "perplexity@128") / at(name, "perplexity"), "<", 1.0
        for key in FOUND[1:]:
            yield f"{key} above {name}", at("linear", f"{key}@128") - at(name, key), ">", 0.0
    gap = math.log(at("linear", "perplexity@128") / at("linear-text", "perplexity@128"))
    yield "nats from text of its own to the help topics'", gap, "<=", 0.05


def table(out: Path) -> str:
    """Markdown of `bars`, "-" where a figure is missing."""

    def at(step: str, key: str) -> float:
        path = out / f"{step}.json"
        value = json.loads(path.read_text(encoding="utf-8")).get(key, math.nan) if path.exists() else math.nan
        return value["average"] if isinstance(value, dict) else value

    compare = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
    lines = ["| | measured | bar | |", "|---|---|---|---|"]
    for said, value, sign, bound in bars(at):
        met = "" if math.isnan(value) else "met" if compare[sign](value, bound) else "**missed**"
        lines.append(f"| {said} | {'-' if math.isnan(value) else f'{value:.4f}'} | {sign} {bound:g} | {met} |")
    return "\n".join(lines)


def in_process(args: argparse.Namespace) -> Callable[[str], int]:
    """A step in a process of its own, which has its share of the processor."""
    cores = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))

    def start(name: str) -> int:
        told = ["--step", name, "--out", args.out, "--data", args.data, "--shorter", args.shorter]
        told += ["--drawn", args.drawn, "--drawn-at-once", args.drawn_at_once]
        told += ["--model", args.model] if args.model else []
        with (args.out / f"{name}.log").open("a") as log:
            command = [sys.executable, "-m", "benchmarks.claims", *map(str, told)]
            return subprocess.call(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": cores})

    return start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of JSONL files of the tasks; needed but for --table")
    parser.add_argument("--out", type=Path, required=True, help="figures, models, and what every step says")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...", help="these steps")
    parser.add_argument("--jobs", type=int, default=2, help="steps at once (default: %(default)s)")
    parser.add_argument("--model", help="default: the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--drawn", type=int, default=DRAWN, help="tokens that the model writes (default: %(default)s)")
    parser.add_argument("--drawn-at-once", type=int, default=48, help="texts of them (default: %(default)s)")
    parser.add_argument("--shorter", type=int, default=1, help="learn so many times less, to try it out")
    parser.add_argument("--table", action="store_true", help="run nothing: print what there is, and its bars")
    parser.add_argument("--step", choices=STEPS_BY_NAME, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.only or () if name not in STEPS_BY_NAME]:
        parser.error(f"--only: expected some of {', '.join(STEPS_BY_NAME)}, got {unknown[0]}")
    if args.data is None and not args.table:
        parser.error("--data: expected a folder of JSONL files of the tasks, got none")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        print(table(args.out))
    elif args.step:
        run(args.step, args)
    else:
        run_all(args, in_process(args))


if __name__ == "__main__":
    main()
