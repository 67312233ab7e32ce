"""The `liger` command's words: what may be typed, read without importing torch; liger_models.cli does the work."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from liger_linear import __version__

# What the help lists. The tables themselves lie behind seconds of imports; a test compares them.
PRESETS = ("default", "paper-gla", "paper-gsa", "paper-hgrn2")
RECIPES = ("default", "paper")
OBJECTIVES = ("next", "kl", "match")
POOLINGS = ("identity", "width", "heads")
FEATURE_MAPS = ("softmax", "kernel", "unit")
GATES = ("gla", "gsa", "hgrn2", "mamba2", "mlstm", "gated_retention", "rwkv6", "retention", "linear")
GATES += ("deltanet", "gated_deltanet", "kda")
FIGURES = ("perplexity", "positions", "passkey", "multikey", "multivalue", "agreement", "kl", "tasks")
VARIANTS = ("window", "no_recall", "no_recurrence", "everything")
LETTERS = dict(L="liger", F="full", W="window", M="memories")
LETTERS |= {letter: f"liger:{gate}" for letter, gate in zip("GSHBXRVTNDEK", GATES, strict=True)}

_LETTERS = ", ".join(f"{letter} {name}" for letter, name in LETTERS.items())
_MODEL = "a local folder, a GGUF file, or the name of a model on the Hugging Face hub"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="liger",
        description="Turn a pretrained Transformer into a linear-recurrent model that decodes in constant memory.",
        epilog="A first session: liger linearize MODEL --out small; liger finetune small --text book.txt --out tuned; "
        'liger generate tuned "Once upon a time"; liger evaluate tuned --text other.txt',
    )
    parser.add_argument("--version", action="version", version=f"liger-linear {__version__}")
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
    p.add_argument("--recall", type=int, metavar="R", help="tokens beyond them that stay exact (default: 128 or 0)")
    p.add_argument("--mix", type=float, help="initial weight of the recurrence; 0 leaves exact tokens alone")
    p.add_argument(
        "--fit-mix", action="store_const", const=True, help="choose it for each head, nearest to the model's attention"
    )
    p.add_argument("--memories", type=int, help="routed memories beside the one that sees every token (default: 0)")
    p.add_argument("--top-k", type=int, help="routed memories that a token uses (default: 2)")
    p.add_argument(
        "--pattern", type=_layers, help=f"a letter a layer, repeated: {_LETTERS}; or names, as in liger:gla,full"
    )
    p.add_argument("--keep", type=_indices, metavar="I,J,...", help="layers that stay full attention")
    p.add_argument("--select", type=int, metavar="N", help="measure which N layers should stay full attention")

    p.add_argument(
        "--on-disk",
        action="store_true",
        help="for a folder of safetensors larger than memory: file by file, without loading the model",
    )

    p = _command(commands, "finetune", "Fine-tune with LoRA and merge the adapters. Ctrl-C leaves a checkpoint.")
    _output(p)
    _text(
        p,
        "training text (.txt, .md) or rows (.jsonl, .json) with text, messages, or prompt and completion; default: the "
        "standard library's help topics, every eighth held out",
    )
    p.add_argument("--eval-text", type=Path, metavar="FILE", help="text to measure the loss on at the end")
    p.add_argument("--eval-steps", type=int, metavar="N", help="measure that loss also every N steps")
    p.add_argument(
        "--report-to", default="none", metavar="NAME", help="where to report to, such as tensorboard or wandb"
    )
    p.add_argument("--no-merge", action="store_true", help="write the adapters alone, for the model as it is")
    p.add_argument("--recipe", default="default", choices=RECIPES, help="hyperparameters (default: %(default)s)")
    p.add_argument("--steps", type=int, help="optimiser steps; default: whole passes over the text")
    p.add_argument("--length", type=int, help="tokens in a block")
    p.add_argument("--batch", type=int, help="blocks in a step")
    p.add_argument("--learning-rate", type=float, help="peak learning rate")
    p.add_argument(
        "--objective",
        metavar="NAME=W,...",
        help=f"what to learn from, of {', '.join(OBJECTIVES)}, each alone or with a weight: the text, what the model "
        "as it was before predicts, what its layers put out (default: next)",
    )
    p.add_argument("--window-dropout", type=float, metavar="P", help="share of batches under a shorter window")
    p.add_argument("--recall-dropout", type=float, metavar="P", help="share of batches that recall fewer tokens")
    p.add_argument("--retrieval", type=float, metavar="P", help="share of rows that ask for what was hidden in them")
    p.add_argument(
        "--freeze-kept", action="store_true", help="leave queries and keys of layers that stayed full attention"
    )
    p.add_argument("--bf16", action="store_true", help="matrix products in bfloat16, on weights that stay as they are")
    p.add_argument(
        "--data-free", type=int, metavar="TOKENS", help="no text: draw so many tokens from the model (see liger draw)"
    )
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint of an interrupted run")

    p = _command(commands, "draw", "Let a model write text to train on; the same command continues after Ctrl-C.")
    p.add_argument("--tokens", type=int, required=True, metavar="N", help="how many tokens to sample at least")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="file of rows to append to (.jsonl)")
    p.add_argument("--length", type=int, default=512, help="tokens in a row (default: %(default)s)")
    p.add_argument("--batch", type=int, default=16, help="rows that are sampled at once (default: %(default)s)")
    p.add_argument(
        "--chat", type=float, metavar="P", help="share of conversations; default: half, with a chat template"
    )
    p.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="another one draws other rows (default: %(default)s)")

    p = _command(commands, "generate", "Continue a prompt.")
    p.add_argument("prompt", help="text to continue")
    p.add_argument("--max-new-tokens", type=int, default=64, help="length of the continuation (default: %(default)s)")
    p.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    p.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")

    p = _command(
        commands,
        "evaluate",
        "Perplexity on held-out text, also of windows alone and without the recurrence, and hidden keys; or, with any "
        "of --original, --figures, --variants, --tasks, --markdown and --report, a table of the model with each "
        "part switched off.",
    )
    _text(p, "text or rows to score, as for finetune; default: the held-out help topics of the standard library")
    p.add_argument("--length", type=int, default=512, help="tokens in a block (default: %(default)s)")
    p.add_argument("--max-blocks", type=int, help="score only the first blocks")
    p.add_argument("--contexts", type=_indices, default=[], metavar="N,M,...", help="also hide keys in so many tokens")
    p.add_argument("--depths", type=int, default=8, help="depths to hide them at (default: %(default)s)")
    p.add_argument("--keys", type=int, default=4, help="keys hidden together, for multikey (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    _side_by_side(p)
    return parser


def _side_by_side(p: argparse.ArgumentParser) -> None:
    """What else evaluate takes, for variants side by side."""
    p.add_argument("--original", metavar="MODEL", help="the model that was linearized, to measure beside it")
    p.add_argument(
        "--figures", type=_names, metavar="A,B,...", help=f"of {', '.join(FIGURES)}; default: all that the rest allows"
    )
    p.add_argument(
        "--variants",
        type=_names,
        metavar="A,B,...",
        help=f"of original, {', '.join(VARIANTS)}; default: all that differ",
    )
    p.add_argument("--values", type=int, metavar="N", help="values hidden under one name, for multivalue (default: 4)")
    p.add_argument("--tasks", type=_names, metavar="A,B,...", help="public tasks, such as piqa,arc_easy,squad")
    p.add_argument(
        "--tasks-from",
        type=Path,
        metavar="FOLDER",
        help="their JSONL files; without it they are tasks of lm-evaluation-harness: pip install liger-linear[eval]",
    )
    p.add_argument("--examples", type=int, metavar="N", help="only the first examples of each task")
    p.add_argument("--passage", type=int, metavar="N", help="of squad, passages of more tokens (default: 150)")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to a file")
    p.add_argument("--report", type=Path, metavar="FOLDER", help="also write report.json, report.md and report.png")


def _command(commands, name: str, text: str) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=text, description=text)
    p.add_argument("model", metavar="MODEL", help=_MODEL)
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="weights' dtype")
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with a model; without it such a model is refused",
    )
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


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _layers(text: str) -> str | list[str]:
    return text if text.isupper() and "," not in text else text.split(",")


def main(argv: list[str] | None = None) -> int:
    """Read the arguments (those of the process without argv), then do what they say; the exit status."""
    args = _parser().parse_args(argv)
    # By name, for it lies above, and only here, for it takes seconds.
    return importlib.import_module("liger_models.cli").run(args)


if __name__ == "__main__":
    sys.exit(main())
