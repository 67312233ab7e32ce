"""The `liger` command: linearize, finetune, generate, evaluate."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from liger_layers import FEATURE_MAPS, GATES, POOLINGS
from liger_layers.patterns import LETTERS
from liger_models import checkpoint
from liger_models.configuration import PRESETS, LigerConfig
from liger_models.evaluation import evaluate
from liger_models.finetune import RECIPES, finetune
from liger_models.generation import generate
from liger_models.linearize import linearize
from liger_models.on_disk import linearize_on_disk
from liger_models.selection import select_layers
from liger_models.text import standard_text

_LETTERS = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())
_MODEL = "a local folder, a GGUF file, or the name of a model on the Hugging Face hub"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="liger",
        description="Turn a pretrained Transformer into a linear-recurrent model that decodes in constant memory.",
        epilog="A first session: liger linearize MODEL --out small; liger finetune small --text book.txt --out tuned; "
        'liger generate tuned "Once upon a time"; liger evaluate tuned --text other.txt',
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a Python module first, one that registers a gate; may be repeated",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = _command(commands, "linearize", "Swap the attention of a pretrained causal LM for Liger Attention.")
    _output(p)
    p.add_argument("--preset", default="default", choices=PRESETS, help="starting point (default: %(default)s)")
    p.add_argument("--gate", metavar="NAME", help=f"how the recurrence forgets: {', '.join(GATES)}")
    p.add_argument("--tau", type=float, help="temperature of the gate: the larger, the slower it forgets")
    p.add_argument("--pool", choices=POOLINGS, help="what the gate averages the key over")
    p.add_argument("--feature-map", choices=FEATURE_MAPS, help="features of the recurrent branch")
    p.add_argument("--window", type=int, help="tokens with exact softmax attention")
    p.add_argument("--sinks", type=int, help="first tokens that stay visible for ever")
    p.add_argument("--mix", type=float, help="initial weight of the recurrence; 0 leaves the window alone")
    p.add_argument("--memories", type=int, help="routed memories beside the one that sees every token (default: 0)")
    p.add_argument("--top-k", type=int, help="routed memories that a token uses (default: 2)")
    p.add_argument("--pattern", type=_layers, help=f"a letter a layer, repeated: {_LETTERS}; or names, as in gla,full")
    p.add_argument("--keep", type=_indices, metavar="I,J,...", help="layers that stay full attention")
    p.add_argument("--select", type=int, metavar="N", help="measure which N layers should stay full attention")

    p.add_argument(
        "--on-disk",
        action="store_true",
        help="for a folder of safetensors larger than memory: file by file, without loading the model",
    )

    p = _command(commands, "finetune", "Fine-tune with LoRA and merge the adapters. Ctrl-C leaves a checkpoint.")
    _output(p)
    _text(p, "training text; default: the standard library's help topics, every eighth held out")
    p.add_argument("--recipe", default="default", choices=RECIPES, help="hyperparameters (default: %(default)s)")
    p.add_argument("--steps", type=int, help="optimiser steps; default: whole passes over the text")
    p.add_argument("--length", type=int, help="tokens in a block")
    p.add_argument("--batch", type=int, help="blocks in a step")
    p.add_argument("--learning-rate", type=float, help="peak learning rate")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint of an interrupted run")

    p = _command(commands, "generate", "Continue a prompt.")
    p.add_argument("prompt", help="text to continue")
    p.add_argument("--max-new-tokens", type=int, default=64, help="length of the continuation (default: %(default)s)")
    p.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    p.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")

    p = _command(
        commands,
        "evaluate",
        "Perplexity on held-out text, also without the recurrence, and keys hidden in it.",
    )
    _text(p, "text to score; default: the held-out help topics of the standard library")
    p.add_argument("--length", type=int, default=512, help="tokens in a block (default: %(default)s)")
    p.add_argument("--max-blocks", type=int, help="score only the first blocks")
    p.add_argument("--contexts", type=_indices, default=[], metavar="N,M,...", help="also hide keys in so many tokens")
    p.add_argument("--depths", type=int, default=8, help="depths to hide them at (default: %(default)s)")
    p.add_argument("--keys", type=int, default=4, help="keys hidden together, for multikey (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    return parser


def _command(commands, name: str, text: str) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=text, description=text)
    p.add_argument("model", metavar="MODEL", help=_MODEL)
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="weights' dtype")
    return p


def _output(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def _text(p: argparse.ArgumentParser, text: str) -> None:
    p.add_argument("--text", type=Path, metavar="FILE", help=text)


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected indices such as 0,7,-1, got {text!r}") from None


def _layers(text: str) -> str | list[str]:
    return text if text.isupper() and "," not in text else text.split(",")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: could not read {path} as UTF-8: {error}") from error


def _linearize(args) -> None:
    checkpoint.check_output(args.out, args.overwrite)
    names = ("gate", "tau", "pool", "feature_map", "window", "sinks", "mix", "memories", "top_k", "pattern")
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
            raise ValueError("select: expected --keep or --select, got both")
        text = standard_text()[0]
        keep = select_layers(model, text, args.select, tokenizer=tokenizer, preset=args.preset, **changes)
        print(f"Full attention stays in layers {', '.join(map(str, sorted(keep))) or 'none'}")
    linearize(model, preset=args.preset, keep=keep, **changes)
    checkpoint.save(model, tokenizer, args.out, args.overwrite)
    print(f"Wrote {args.out}")


def _finetune(args) -> None:
    checkpoint.check_output(args.out, args.overwrite)
    text = _read(args.text) if args.text else standard_text()[0]
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    names = ("steps", "length", "batch", "learning_rate")
    changes = {name: getattr(args, name) for name in names}
    store = args.out.with_name(args.out.name + ".checkpoints")
    model = finetune(model, tokenizer, text, args.recipe, checkpoints=store, resume=args.resume, **changes)
    checkpoint.save(model, tokenizer, args.out, args.overwrite)
    checkpoint.discard(store)
    print(f"Wrote {args.out}")


def _generate(args) -> None:
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    print(
        generate(
            model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, chat=args.chat, do_sample=args.sample
        )
    )


def _evaluate(args) -> None:
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"json: expected a file in a folder that exists, got {args.json}")
    text = _read(args.text) if args.text else standard_text()[1]
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


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    commands = {"linearize": _linearize, "finetune": _finetune, "generate": _generate, "evaluate": _evaluate}
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
