"""What a linearized SmolLM2-135M keeps of the original, by configuration, at equal tokens: the study of recovery.

python -m benchmarks.recovery --tokens 100000 --data FOLDER            the grid, on a CPU
python -m benchmarks.recovery --only default,recall-64 --tokens 20000  a rehearsal
python -m benchmarks.recovery --device cuda --minutes 9 --text corpus.jsonl --data FOLDER    the whole recipe
python -m benchmarks.recovery --device cuda --only original --tokens 0 --data FOLDER         what it is held against
python -m benchmarks.recovery --report                                 one table and one picture of what is there

Each row of ROWS is linearized, fine-tuned on as many tokens (--tokens 0: not at all) and measured: all figures of the
model as it is, losses with each of its parts switched off, and the same again with other numbers of tokens recalled. A
JSON file a row is written as it goes, and a row whose file is there is not run again; with --keep, nor is a model
trained that lies there. With --minutes, training ends early enough to be measured, and no row is begun that has no
time.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from benchmarks.recovery_report import NEEDLES, report, whole
from benchmarks.report import describe
from liger_layers import RECURRENCES
from liger_models import LigerConfig, Recipe, checkpoint, draw, finetune, linearize, measure_variants, select_layers
from liger_models.data import read
from liger_models.demo import bundled_model
from liger_models.recipe import RECIPES
from liger_models.tasks import SIX_TASKS
from liger_models.text import standard_text
from liger_models.variants import distinct_variants, with_recall

OUT = Path("benchmarks/results/recovery")
# Passages to complete; each is decoded token by token.
SQUAD = 60
# Texts that a model writes at once.
_DRAWN_AT_ONCE = 64
# What is not said, by device: a grid of many rows, or one model that learns from much more.
_USUAL: dict[str, dict[str, Any]] = {
    "cpu": dict(tokens=100_000, batch=2, contexts=[512, 1024, 2048], only=None),
    "cuda": dict(tokens=20_000_000, batch=16, contexts=[512, 2048, 8192], only=["whole"]),
}
# Beside a model that --keep has saved: what making it took.
_ABOUT = "recovery.json"
# What is left for measuring when --minutes ends training, as a share of them.
_MEASURING = 0.35


class Row(NamedTuple):
    """liger: options of `linearize`, None for the original tuned alike. recipe: changes of `finetune`'s. select: how
    many layers stay full attention by selection. also: tokens recalled by the same weights, measured too. own_text:
    learn from what the model writes, half of it conversations. first: changes of the recipe by which the original
    learns from _FIRST of the tokens before it is linearized."""

    liger: dict[str, Any] | None
    recipe: dict[str, Any] = {}  # noqa: RUF012
    select: int = 0
    also: tuple[int, ...] = ()
    own_text: bool = False
    first: dict[str, Any] | None = None


# Of all tokens, those that the original learns from where it learns first.
_FIRST = 0.68
# The published recipe, in rows and batches of the size that all have here.
_PAPER = ("paper-gla", "paper-gsa", "paper-hgrn2")
PUBLISHED = {
    name: getattr(RECIPES["paper"], name)
    for name in ("rank", "alpha", "targets", "learning_rate", "warmup", "features")
}
# How the whole recipe starts, and what it has, of which one is left out at a time.
_START = dict(recall=64, fit_mix=True)
_WHOLE = dict(objective="kl", window_dropout=0.5, recall_dropout=0.5, retrieval=0.25, learning_rate=5e-4)
# And the original's, beside it.
_ORIGINAL = dict(retrieval=0.25, learning_rate=5e-4)
_LEFT_OUT = {
    "no-window-dropout": {**_WHOLE, "window_dropout": 0.0},
    "no-recall-dropout": {**_WHOLE, "recall_dropout": 0.0},
    "no-kl": {**_WHOLE, "objective": "next"},
    "no-retrieval": {**_WHOLE, "retrieval": 0.0},
    "no-features": {**_WHOLE, "features": False},
}
# The default's, 128, has a row by that name.
_RECALLS = (0, 32, 64, 256)
# The default's has rows of its own.
_GATES = tuple(name for name, entry in RECURRENCES.items() if entry.gate is not None and name != LigerConfig().gate)
ROWS: dict[str, Row] = {
    "original": Row(None),
    "default": Row({}),
    **{name: Row(dict(preset=name), PUBLISHED) for name in _PAPER},
    # Softmax over the window and the sinks, and nothing else.
    "window": Row(dict(pattern="W")),
    **{f"gate-{name}": Row(dict(gate=name, recall=0)) for name in _GATES},
    **{f"gate-{name}-recall-64": Row(dict(gate=name, recall=64)) for name in _GATES},
    **{f"recall-{n}": Row(dict(recall=n)) for n in _RECALLS},
    # A longer window in the place of recall: a token of either takes as much of the cache.
    **{f"window-{64 + n}": Row(dict(window=64 + n, recall=0)) for n in (32, 64, 128, 256)},
    **{f"recall-{n}-alone": Row(dict(recall=n, mix=0.0, learn_mix=False)) for n in (64, 128)},
    "selected": Row(dict(recall=0), select=4),
    "selected-recall-64": Row(dict(recall=64), select=4),
    "mom": Row(dict(memories=4, recall=0)),
    "whole": Row(_START, _WHOLE, also=(0, 128, 256)),
    "whole-own-text": Row(_START, _WHOLE, also=(0, 128), own_text=True),
    "whole-selected": Row(_START, _WHOLE, select=4),
    "whole-no-recall": Row(dict(recall=0, fit_mix=True), _LEFT_OUT["no-recall-dropout"]),
    "whole-no-fit-mix": Row(dict(recall=64), _WHOLE, also=(0, 128)),
    **{f"whole-{name}": Row(_START, recipe, also=(0, 128)) for name, recipe in _LEFT_OUT.items()},
    "whole-tuned-first": Row(_START, _WHOLE, also=(0, 128, 256), first=_ORIGINAL),
    **{f"{name}-tuned-first": Row(dict(preset=name), PUBLISHED, first=_ORIGINAL) for name in _PAPER},
    "original-whole": Row(None, _ORIGINAL),
}


def waits_for(row: Row) -> str | None:
    """Why a row cannot be run with what there is, or None."""
    try:
        if row.liger is not None:
            LigerConfig.from_preset(**row.liger)
        if unknown := sorted(set(row.recipe) - {f.name for f in dataclasses.fields(Recipe)}):
            return f"{unknown[0]}: no such field of a recipe"
        for recipe in (row.recipe, row.first or {}):
            Recipe(**recipe)
    except ValueError as error:
        return str(error)
    return None


class _Deadline(TrainerCallback):
    """Ends training in time, and knows after how many steps."""

    def __init__(self, end: float | None):
        self.end, self.steps = end, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps = state.global_step
        if self.end is not None and time.monotonic() > self.end:
            control.should_training_stop = True


def run(row: Row, args: argparse.Namespace, end: float | None) -> dict[str, Any]:
    """What one configuration gives, as its file says."""
    training, held_out = texts(args)
    kept = args.keep and args.keep / f"{row_name(row)}-{args.tokens}"
    if kept and (kept / _ABOUT).exists():
        found = json.loads((kept / _ABOUT).read_text(encoding="utf-8"))
        model, tokenizer = checkpoint.load(kept, getattr(torch, args.dtype))
        model = model.to(args.device)
    else:
        model, tokenizer, found = made(row, training, args, end)
        if kept:
            checkpoint.save(model, tokenizer, kept, overwrite=True)
            (kept / _ABOUT).write_text(json.dumps(found), encoding="utf-8")
    start = time.monotonic()
    found["measured"] = measure(model, tokenizer, held_out, args)
    for recall in row.also:
        with with_recall(model, recall):
            found.setdefault("recalling", {})[recall] = measure(model, tokenizer, held_out, args)
    return found | {"measuring_s": time.monotonic() - start}


def made(row: Row, training: Any, args: argparse.Namespace, end: float | None) -> tuple[Any, Any, dict[str, Any]]:
    """The model of a configuration, linearized and fine-tuned, its tokenizer, and what that took."""
    model, tokenizer = load(args)
    found: dict[str, Any] = {"liger": row.liger, "recipe": row.recipe, "select": row.select}
    tokens, before = args.tokens, 0
    if row.own_text and tokens:
        start, out = time.monotonic(), (args.keep or args.out) / f"drawn-{tokens}.jsonl"
        draw(model, tokenizer, tokens, out=out, length=args.length, batch=_DRAWN_AT_ONCE)
        training, found["drawing_s"] = out, time.monotonic() - start
    if row.first is not None and tokens:
        now = time.monotonic()
        until = None if end is None else now + _FIRST * (end - now)
        model, found["first"] = tuned(model, tokenizer, training, row.first, int(_FIRST * tokens), args, until)
        before = found["first"]["tokens"]
    start = time.monotonic()
    if row.liger is not None:
        options = dict(row.liger)
        if row.select:
            options["keep"] = select_layers(model, documents_of(training), row.select, tokenizer=tokenizer, **options)
            found["keep"] = sorted(options["keep"])
        linearize(model, tokenizer=tokenizer, **options)
    found["linearizing_s"] = time.monotonic() - start
    if tokens:
        model, about = tuned(model, tokenizer, training, row.recipe, tokens - before, args, end)
        found |= about | {"tokens": before + about["tokens"]}
    return model, tokenizer, found


def tuned(
    model: Any, tokenizer: Any, training: Any, changes: dict[str, Any], tokens: int, args: argparse.Namespace, end
) -> tuple[Any, dict[str, Any]]:
    """The model after so many tokens of a recipe, and what that took."""
    recipe = Recipe(**{"batch": args.batch, "length": args.length, **changes})
    steps = max(1, tokens // (recipe.batch * recipe.length))
    deadline, start = _Deadline(end), time.monotonic()
    options = dict(steps=steps, warmup=min(recipe.warmup, steps // 2), callbacks=[deadline])
    model = finetune(model, tokenizer, training, recipe, **options)
    found = {"steps": deadline.steps, "tokens": deadline.steps * recipe.batch * recipe.length}
    return model, found | {"wanted_steps": steps, "training_s": time.monotonic() - start}


def measure(model, tokenizer, held_out: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `measure_variants` finds: all of the model as it is, and losses of it with a part switched off.

    The original is there for tokens agreed and KL; its figures are a row's own.
    """
    names = args.variants or distinct_variants(model)
    options: dict[str, Any] = dict(length=512, max_blocks=args.blocks)
    found = measure_variants(
        model,
        tokenizer,
        held_out,
        original=load(args)[0],
        figures=["perplexity", "positions", "agreement", "kl"],
        variants=names,
        **options,
    )
    for more in asked(args) if "everything" in names else ():
        own = measure_variants(model, tokenizer, held_out, variants=["everything"], **options, **more)
        everything, new = found["variants"]["everything"], own["variants"]["everything"]
        new["tasks"] = everything.get("tasks", {}) | new.get("tasks", {})
        new["seconds"] += everything["seconds"]
        found["variants"]["everything"] = everything | new
    return found


def asked(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Options of `measure_variants` for what is asked in words: needles, the six tasks, and passages to complete."""
    if args.contexts:
        yield dict(figures=NEEDLES, contexts=args.contexts, depths=args.depths)
    if args.data:
        # The six come last, whose average stands for a row.
        for tasks, examples in (
            (["mmlu"], args.mmlu),
            (["squad"], min(SQUAD, args.examples)),
            (SIX_TASKS, args.examples),
        ):
            if examples:
                yield dict(figures=["tasks"], tasks=tasks, tasks_from=args.data, examples=examples)


def texts(args: argparse.Namespace) -> tuple[Any, str]:
    """Text to train on, and the standard library's help topics, which nobody trains on, every eighth of them."""
    own, held_out = standard_text()
    return (args.text or own), held_out


def documents_of(training: Any) -> str:
    """The first of the training text, to hide keys in."""
    found = read(training)
    text = found if isinstance(found, str) else "\n\n".join(row["text"] for _, row in found[:2000] if "text" in row)
    return text[: 2**20] or standard_text()[0]


def load(args: argparse.Namespace):
    model, tokenizer = checkpoint.load(args.model or str(bundled_model()), getattr(torch, args.dtype))
    return model.to(args.device), tokenizer


def row_name(row: Row) -> str:
    return next(name for name, other in ROWS.items() if other is row)


def run_all(args: argparse.Namespace) -> None:
    """Every row that is asked for and not there yet."""
    start, longest, end = time.monotonic(), 0.0, None
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or ROWS:
        path = args.out / f"{name}-{args.tokens}.json"
        left = float("inf") if args.minutes is None else 60 * args.minutes - (time.monotonic() - start)
        if path.exists():
            print(f"{name}: there already", flush=True)
        elif why := waits_for(ROWS[name]):
            print(f"{name}: waits, {why}", flush=True)
        elif left <= longest:
            print(f"{name}: no time left", flush=True)
        else:
            began = time.monotonic()
            if args.minutes is not None:
                end = began + max(0.0, left - _MEASURING * 60 * args.minutes)
            about = describe(torch.device(args.device)) | {"name": name, "wanted_tokens": args.tokens}
            found = about | run(ROWS[name], args, end)
            # Whole or not at all.
            path.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".part").replace(path)
            longest = max(longest, time.monotonic() - began)
            print(f"{name}: {longest:.0f} s, perplexity {whole(found)['perplexity']:.2f}", flush=True)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"expected rows of {', '.join(ROWS)}, got {unknown[0]!r}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", type=_names, metavar="NAME,...", help="these rows, in this order; on a GPU: whole")
    parser.add_argument("--list", action="store_true", help="name the rows, and what those wait for that cannot be run")
    parser.add_argument("--report", action="store_true", help="run nothing: write report.md and report.png of --out")
    parser.add_argument("--model", help="default: the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--minutes", type=float, help="end training early, and begin no row, when time is short")
    parser.add_argument("--tokens", type=int, help="of training, each row; 0 for none (100,000; on a GPU 20,000,000)")
    parser.add_argument("--batch", type=int, help="2; on a GPU 16")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--text", type=Path, help="to train on; default: the standard library's help topics")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="JSONL files of the tasks; without it, no tasks")
    parser.add_argument("--examples", type=int, default=200, help=f"of each task (squad: {SQUAD} at most)")
    parser.add_argument("--blocks", type=int, default=12, help="held-out blocks of 512 tokens")
    parser.add_argument("--mmlu", type=int, default=0, help="questions of MMLU, with shots of their subjects")
    parser.add_argument("--contexts", type=_numbers, help="512,1024,2048; on a GPU 512,2048,8192")
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--variants", type=lambda text: text.split(","), help="default: those that differ")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="save models there, and take what is there")
    args = parser.parse_args(arguments)
    for name, value in _USUAL[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.list:
        for name, row in ROWS.items():
            print(f"{name}: {waits_for(row) or 'can be run'}")
    elif args.report:
        (args.out / "report.md").write_text(report(args.out, list(ROWS)), encoding="utf-8")
        print(f"Wrote {args.out / 'report.md'} and report.png")
    else:
        run_all(args)


if __name__ == "__main__":
    main()
