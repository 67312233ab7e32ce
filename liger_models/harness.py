"""lm-evaluation-harness on a model at hand, where the extra `eval` is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liger_models.generation import evaluating
from liger_models.retrieval import check_tokenizer
from liger_ops.errors import fail

# Which of a task's figures stands for it, the first that it has: shares alone, for they are averaged.
_SCORES = ("acc_norm", "acc", "exact_match", "contains", "f1")


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    examples: int | None = None,
    shots: int | None = None,
    batch: int = 1,
) -> dict[str, dict[str, float]]:
    """What lm-evaluation-harness measures of a model on tasks by its own names; it fetches their data itself.

    Returns for each task its figures by name, such as acc and acc_norm, examples, and score, the share that stands for
    it, where there is one.
    ValueError where the harness is not installed, or knows no such task.
    """
    check_tokenizer(tokenizer)
    if isinstance(tasks, str) or not tasks:
        fail("tasks", "a list of names", repr(tasks))
    evaluator, wrapper = check_installed()
    try:
        with evaluating(model):
            found = evaluator.simple_evaluate(
                model=wrapper.HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch),
                tasks=list(tasks),
                num_fewshot=shots,
                limit=examples,
                bootstrap_iters=0,
            )
    except (KeyError, ValueError) as error:
        raise ValueError(f"tasks: lm-evaluation-harness refuses {', '.join(tasks)}: {error}") from error
    return {name: _figures(row) for name, row in found["results"].items()}


def check_installed() -> tuple[Any, Any]:
    """The harness's evaluator and its module of Hugging Face models; ValueError says how to install it."""
    try:
        return importlib.import_module("lm_eval"), importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ValueError(
            "tasks: expected a folder of JSONL files (--tasks-from) or lm-evaluation-harness; "
            f"run: pip install 'liger-linear[eval]' ({error})"
        ) from error


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Figures by name; the harness names them with the filter of answers behind a comma."""
    found: dict[str, float] = {}
    for key, value in row.items():
        name, _, kind = key.replace("sample_len", "examples").partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name:
            found.setdefault(name if kind in ("", "none") else f"{name}_{kind}", float(value))
    score = next((found[name] for name in _SCORES if name in found), None)
    return found if score is None else {**found, "score": score}
