"""What the `liger` command does, once liger_linear has read its words."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from liger_linear.__main__ import main
from liger_models import checkpoint
from liger_models.configuration import LigerConfig
from liger_models.data import read
from liger_models.drawing import draw
from liger_models.evaluation import evaluate
from liger_models.finetune import finetune
from liger_models.generation import generate
from liger_models.linearize import linearize
from liger_models.on_disk import linearize_on_disk
from liger_models.recipe import recipe_of
from liger_models.selection import select_layers
from liger_models.text import standard_text
from liger_ops.errors import fail


def _checked(path: Path | None, name: str = "text") -> Path | None:
    """A path to text that can be read, which is known before a model is loaded."""
    if path is not None:
        read(path, name)
    return path


def _linearize(args) -> None:
    checkpoint.check_output(args.out, args.overwrite)
    names = ("gate", "tau", "pool", "feature_map", "window", "sinks", "recall", "mix", "memories", "top_k", "pattern")
    changes, keep = {name: getattr(args, name) for name in names}, args.keep
    # Before a model is loaded, which takes longer.
    LigerConfig.from_preset(args.preset, **changes)
    if args.on_disk:
        if args.select is not None or args.dtype != "auto":
            raise ValueError("on-disk: expected neither --select nor --dtype, which need the model in memory")
        options = dict(preset=args.preset, keep=keep, overwrite=args.overwrite)
        print(f"Wrote {linearize_on_disk(args.model, args.out, **options, **changes)}")
        return
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    if args.select is not None:
        if keep is not None:
            fail("select", "--keep or --select", "both")
        text = standard_text()[0]
        keep = select_layers(model, text, args.select, tokenizer=tokenizer, preset=args.preset, **changes)
        print(f"Full attention stays in layers {', '.join(map(str, sorted(keep))) or 'none'}")
    linearize(model, preset=args.preset, keep=keep, **changes)
    checkpoint.save(model, tokenizer, args.out, args.overwrite)
    print(f"Wrote {args.out}")


def _finetune(args) -> None:
    checkpoint.check_output(args.out, args.overwrite)
    if args.data_free is not None and args.text is not None:
        fail("data-free", "--text or --data-free", "both")
    text, held_out = _checked(args.text) or standard_text()[0], _checked(args.eval_text, "eval_text")
    names = ("steps", "length", "batch", "learning_rate", "objective", "window_dropout", "retrieval")
    changes: dict[str, Any] = {name: getattr(args, name) for name in names}
    changes["freeze_kept"] = args.freeze_kept or None
    # Before a model is loaded, which takes longer.
    recipe = recipe_of(args.recipe, changes)
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    if args.data_free is not None:
        text = args.out.with_name(args.out.name + ".drawn.jsonl")
        draw(model, tokenizer, args.data_free, out=text, length=recipe.length)
    changes |= dict(eval_text=held_out, eval_steps=args.eval_steps, report_to=args.report_to, merge=not args.no_merge)
    store = args.out.with_name(args.out.name + ".checkpoints")
    model = finetune(model, tokenizer, text, args.recipe, checkpoints=store, resume=args.resume, **changes)
    checkpoint.save(model, tokenizer, args.out, args.overwrite)
    checkpoint.discard(store)
    print(f"Wrote {args.out}")


def _draw(args) -> None:
    if args.out.is_dir() or args.out.suffix != ".jsonl":
        fail("out", "a file that ends in .jsonl", args.out)
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    names = ("length", "batch", "chat", "temperature", "seed")
    rows = draw(model, tokenizer, args.tokens, out=args.out, **{name: getattr(args, name) for name in names})
    print(f"Wrote {len(rows)} rows to {args.out}")


def _generate(args) -> None:
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    print(
        generate(
            model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, chat=args.chat, do_sample=args.sample
        )
    )


def _evaluate(args) -> None:
    if args.json and not args.json.parent.is_dir():
        fail("json", "a file in a folder that exists", args.json)
    text = _checked(args.text) or standard_text()[1]
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    names = ("length", "max_blocks", "contexts", "depths", "keys")
    figures = evaluate(model, tokenizer, text, **{name: getattr(args, name) for name in names})
    for name, value in figures.items():
        print(f"{name:24} {value:,.4g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _import(modules: list[str]) -> None:
    """Modules on the path or in the folder that the command runs in."""
    sys.path.append("")
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"import: could not import {name!r}: {error}") from error
    finally:
        sys.path.remove("")


def run(args: Namespace) -> int:
    """Do what a command line says; the exit status, after one line on stderr where it is not 0."""
    commands = {
        "linearize": _linearize,
        "finetune": _finetune,
        "draw": _draw,
        "generate": _generate,
        "evaluate": _evaluate,
    }
    try:
        _import(args.modules)
        commands[args.command](args)
    except (ValueError, OSError) as error:
        print(f"liger: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        hint = "; the same command with --resume continues" if "can be resumed" in str(error) else ""
        print(f"liger: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
