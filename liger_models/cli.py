"""What the `liger` command does, once liger_linear has read its words."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liger_linear.__main__ import main
from liger_models import checkpoint
from liger_models._runs import SavedAtTheEnd, discard, is_first_process
from liger_models._whole import check_output, write_json
from liger_models.configuration import LigerConfig
from liger_models.data import read
from liger_models.drawing import draw
from liger_models.evaluation import evaluate
from liger_models.figures import measure_variants
from liger_models.finetune import checked_objective, finetune
from liger_models.generation import generate
from liger_models.linearize import linearize
from liger_models.on_disk import linearize_on_disk
from liger_models.recipe import recipe_of
from liger_models.selection import select_layers
from liger_models.text import standard_text
from liger_ops.errors import check_positive, fail


def _checked(path: Path | None, name: str = "text") -> Path | None:
    """A path to text that can be read, which is known before a model is loaded."""
    if path is not None:
        read(path, name)
    return path


def _load(args, model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return checkpoint.load(model, args.dtype, trust_remote_code=args.trust_remote_code)


def _linearize(args) -> None:
    check_output(args.out, args.overwrite)
    names = "gate", "tau", "pool", "feature_map", "window", "sinks", "recall", "mix", "fit_mix", "memories", "top_k"
    changes, keep = {name: getattr(args, name) for name in (*names, "pattern")}, args.keep
    # Before a model is loaded, which takes longer.
    LigerConfig.from_preset(args.preset, **changes)
    if args.on_disk:
        if args.select is not None or args.dtype != "auto":
            raise ValueError("on-disk: expected neither --select nor --dtype, which need the model in memory")
        if args.trust_remote_code:
            raise ValueError("on-disk: expected no --trust-remote-code, for no code goes along")
        options = dict(preset=args.preset, keep=keep, overwrite=args.overwrite)
        print(f"Wrote {linearize_on_disk(args.model, args.out, **options, **changes)}")
        return
    model, tokenizer = _load(args, args.model)
    if args.select is not None:
        if keep is not None:
            fail("select", "--keep or --select", "both")
        text = standard_text()[0]
        keep = select_layers(model, text, args.select, tokenizer=tokenizer, preset=args.preset, **changes)
        print(f"Full attention stays in layers {', '.join(map(str, sorted(keep))) or 'none'}")
    linearize(model, preset=args.preset, keep=keep, tokenizer=tokenizer, **changes)
    checkpoint.save(model, tokenizer, args.out, args.overwrite)
    print(f"Wrote {args.out}")


def _finetune(args) -> None:
    check_output(args.out, args.overwrite)
    if args.data_free is not None and args.text is not None:
        fail("data-free", "--text or --data-free", "both")
    if args.data_free is not None:
        check_positive("data-free", args.data_free)
    text, held_out = _checked(args.text) or standard_text()[0], _checked(args.eval_text, "eval_text")
    names = "steps", "length", "batch", "learning_rate", "objective"
    names += "window_dropout", "recall_dropout", "retrieval"
    changes: dict[str, Any] = {name: getattr(args, name) for name in names}
    changes |= {name: getattr(args, name) or None for name in ("freeze_kept", "bf16")}
    # Before a model is loaded, which takes longer.
    recipe = recipe_of(args.recipe, changes)
    model, tokenizer = _load(args, args.model)
    if args.data_free is not None:
        # Before the model writes, which takes longer still.
        checked_objective(model, recipe)
        text = args.out.with_name(args.out.name + ".drawn.jsonl")
        draw(model, tokenizer, args.data_free, out=text, length=recipe.length)
    changes |= dict(eval_text=held_out, eval_steps=args.eval_steps, report_to=args.report_to, merge=not args.no_merge)
    store = args.out.with_name(args.out.name + ".checkpoints")
    # Which outlive a model that cannot be saved.
    changes["callbacks"] = [SavedAtTheEnd()]
    model = finetune(model, tokenizer, text, args.recipe, checkpoints=store, resume=args.resume, **changes)
    if not is_first_process():
        return
    try:
        checkpoint.save(model, tokenizer, args.out, args.overwrite)
    except (ValueError, OSError) as error:
        raise OSError(f"{error}; what was learned lies in {store}, and --resume saves it again") from error
    discard(store)
    print(f"Wrote {args.out}")


def _draw(args) -> None:
    if args.out.is_dir() or args.out.suffix != ".jsonl":
        fail("out", "a file that ends in .jsonl", args.out)
    model, tokenizer = _load(args, args.model)
    names = ("length", "batch", "chat", "temperature", "seed")
    rows = draw(model, tokenizer, args.tokens, out=args.out, **{name: getattr(args, name) for name in names})
    print(f"Wrote {len(rows)} rows to {args.out}")


def _generate(args) -> None:
    model, tokenizer = _load(args, args.model)
    print(
        generate(
            model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, chat=args.chat, do_sample=args.sample
        )
    )


# With one of these, evaluate measures variants side by side.
_LONG = ("original", "figures", "variants", "tasks", "markdown", "report")


def _evaluate(args) -> None:
    for name in ("json", "markdown"):
        path = getattr(args, name)
        if path and (path.is_dir() or not path.parent.is_dir()):
            fail(name, "a file in a folder that exists", path)
    if args.report and args.report.exists() and not (args.report / "report.json").is_file():
        fail("report", "a new folder or an earlier report's", args.report)
    beside = dict(values="contexts", tasks_from="tasks", examples="tasks", passage="tasks_from")
    for name, wanted in beside.items():
        if getattr(args, name) is not None and not getattr(args, wanted):
            fail(name, f"--{wanted.replace('_', '-')} beside it", "none")
    text = _checked(args.text) or standard_text()[1]
    names = ("length", "max_blocks", "contexts", "depths", "keys")
    options = {name: getattr(args, name) for name in names}
    if any(getattr(args, name) for name in _LONG):
        _measure_variants(args, text, options)
        return
    if args.values is not None:
        fail("values", f"one of --{', --'.join(_LONG)} beside it", "none")
    model, tokenizer = _load(args, args.model)
    figures = evaluate(model, tokenizer, text, **options)
    for name, value in figures.items():
        print(f"{name:24} {value:,.4g}")
    if args.json:
        write_json(args.json, figures)


def _measure_variants(args, text, options) -> None:
    """The long form of evaluate: variants side by side, in one table."""
    # Here, for matplotlib takes a second.
    from liger_models._figures_report import markdown, write_report

    names = ("figures", "variants", "values", "tasks", "tasks_from", "examples", "passage")
    options |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model, tokenizer = _load(args, args.model)
    original = _load(args, args.original)[0] if args.original else None
    found = measure_variants(model, tokenizer, text, original=original, **options)
    result = {"model": str(args.model), "original": args.original, **found}
    table = markdown(result)
    print(table, end="")
    if args.json:
        write_json(args.json, result)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    if args.report:
        write_report(args.report, result, Path(args.model).name)


def _import(modules: list[str]) -> None:
    """Modules on the path or in the folder that the command runs in."""
    sys.path.append("")
    try:
        for name in modules:
            importlib.import_module(name)
    # A module may raise anything, or end the process.
    except (Exception, SystemExit) as error:
        raise ValueError(f"import: could not import {name!r}: {' '.join(str(error).split()) or repr(error)}") from error
    finally:
        sys.path.remove("")


@contextmanager
def _ends_alike() -> Iterator[None]:
    """Within, a process that is told to end does what Ctrl-C does, which ends in nothing but KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = []

    def end(*given):
        asked.append(given)
        signal.default_int_handler(*given)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, end)
    try:
        yield
    # Of an interruption within torch it makes an error of its own.
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        with _ends_alike():
            _import(args.modules)
            commands[args.command](args)
    except (ValueError, OSError) as error:
        if os.environ.get("LIGER_DEBUG") == "1":
            raise
        print(f"liger: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        hint = "; the same command with --resume continues" if "can be resumed" in str(error) else ""
        print(f"liger: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
