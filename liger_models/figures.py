"""What is measured of a linearized model, side by side: the original, and the model with each part switched off.

Shapes: T tokens.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_models._inputs import check_ids, input_device
from liger_models._objectives import divergence
from liger_models.data import IGNORED, Rows, documents, to_rows
from liger_models.evaluation import Losses, binned, position_losses
from liger_models.generation import continued, evaluating, without_settings
from liger_models.harness import check_installed, run_harness
from liger_models.retrieval import check_tokenizer, make_prompt, retrieval
from liger_models.tasks import PASSAGE, TASKS, read_tasks, score_task
from liger_models.text import token_ids
from liger_models.variants import ORIGINAL, VARIANTS, chosen_variants, exact_tokens
from liger_ops.errors import check_known, check_positive, fail

# Prompts that the original continues greedily, and for how many tokens.
_PROMPTS, _CONTINUED = 8, 32


@dataclass
class _Subject:
    """What figures are measured on and with, the same for every variant."""

    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    filler: str
    original: PreTrainedModel | None
    beyond: int
    contexts: Sequence[int]
    depths: int
    keys: int
    values: int
    tasks: Sequence[str]
    questions: Mapping[str, list] | None
    examples: int | None

    @functools.cached_property
    def greedy(self) -> list[tuple[torch.Tensor, int]]:
        """Token ids [1,T] that the original has continued greedily, and how many of them were given."""
        original, found = without_settings(cast(PreTrainedModel, self.original)), []
        plain = GenerationConfig(do_sample=False, max_new_tokens=_CONTINUED, pad_token_id=0)
        with torch.no_grad():
            for row in self.rows.first(_PROMPTS).ids:
                given = row[None, : (len(row) + 1) // 2].to(input_device(original))
                found.append((continued(original, given, generation_config=plain), given.shape[1]))
        return found


def _perplexity(model: PreTrainedModel, subject: _Subject, losses: Callable[[], Losses]) -> dict[str, Any]:
    return {"perplexity": math.exp(losses().mean())}


def _positions(model: PreTrainedModel, subject: _Subject, losses: Callable[[], Losses]) -> dict[str, Any]:
    """Also the loss of those predictions that have seen more than the exact tokens."""
    found: dict[str, Any] = {"positions": binned(losses())}
    return found | ({"loss_beyond": losses().mean(subject.beyond)} if subject.beyond else {})


def _hidden(name: str, **options: str) -> Callable[..., dict[str, Any]]:
    """Keys found at each context; options name the fields of a subject that say how many are hidden."""

    def measure(model: PreTrainedModel, subject: _Subject, losses: Callable[[], Losses]) -> dict[str, Any]:
        told = {key: getattr(subject, field) for key, field in options.items()}
        return {
            f"{name}_{n}": retrieval(model, subject.tokenizer, subject.filler, n, depths=subject.depths, **told)
            for n in subject.contexts
        }

    return measure


@torch.no_grad()
def _agreement(model: PreTrainedModel, subject: _Subject, losses: Callable[[], Losses]) -> dict[str, Any]:
    """Share of the tokens, said greedily by the original, that this model would say in their place."""
    if model is subject.original:
        return {}
    agreed = total = 0
    for ids, given in subject.greedy:
        ids = ids.to(input_device(model))
        said = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - given + 1).logits[0, :-1].argmax(-1)
        agreed += int((said == ids[0, given:]).sum())
        total += ids.shape[1] - given
    return {"agreement": agreed / total}


@torch.no_grad()
def _divergence(model: PreTrainedModel, subject: _Subject, losses: Callable[[], Losses]) -> dict[str, Any]:
    """Mean KL(original || model) in nats, over the predictions that perplexity is of."""
    original = cast(PreTrainedModel, subject.original)
    if model is original:
        return {}
    total, count = 0.0, 0
    for row in subject.rows:
        asked, ids = F.pad(row["labels"][1:] != IGNORED, (0, 1)), row["input_ids"][None]
        p, q = (m(ids.to(input_device(m)), use_cache=False).logits for m in (original, model))
        total += divergence(q, p, asked[None].to(q.device)).item()
        count += int(asked.sum())
    return {"kl": total / count}


def _tasks(model: PreTrainedModel, subject: _Subject, losses: Callable[[], Losses]) -> dict[str, Any]:
    """Every task, and the average score of those that choose."""
    if subject.questions is None:
        found = run_harness(model, subject.tokenizer, subject.tasks, examples=subject.examples)
        chosen = list(found)
    else:
        found = {name: score_task(model, subject.tokenizer, name, own) for name, own in subject.questions.items()}
        chosen = [name for name in found if TASKS[name].score.startswith("acc")]
    scores = [found[name]["score"] for name in chosen if "score" in found[name]]
    return {"tasks": found} | ({"average": sum(scores) / len(scores)} if scores else {})


# Name, what it measures, and what of `measure_variants` it cannot do without.
FIGURES: dict[str, tuple[Callable[..., dict[str, Any]], str | None]] = {
    "perplexity": (_perplexity, None),
    "positions": (_positions, None),
    "passkey": (_hidden("passkey"), "contexts"),
    "multikey": (_hidden("multikey", keys="keys"), "contexts"),
    "multivalue": (_hidden("multivalue", values="values"), "contexts"),
    "agreement": (_agreement, "original"),
    "kl": (_divergence, "original"),
    "tasks": (_tasks, "tasks"),
}


def measure_variants(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Any,
    *,
    original: PreTrainedModel | None = None,
    figures: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    length: int = 512,
    max_blocks: int | None = None,
    contexts: Sequence[int] = (),
    depths: int = 8,
    keys: int = 4,
    values: int = 4,
    tasks: Sequence[str] = (),
    tasks_from: str | Path | None = None,
    examples: int | None = None,
    passage: int = PASSAGE,
) -> dict[str, Any]:
    """Figures of a model side by side: the original, and a linearized model with each of its parts switched off.

    Args:
        text: held out, anything that `finetune` takes; in rows of at most `length` tokens, the first `max_blocks`.
        original: the model that was linearized, if it is at hand.
        figures: names in FIGURES; None: all that the other arguments allow. perplexity; positions, perplexity by
            position and loss_beyond, in nats, of the predictions that have seen more than the exact tokens; passkey,
            multikey, multivalue, the share of keys found in each of `contexts` tokens of text (see `retrieval`);
            agreement, the share of tokens alike under the original's greedy decoding; kl, the mean KL(original ||
            model) a token in nats; tasks.
        variants: names in VARIANTS, and "original"; None: those that differ.
        tasks: names in liger_models.tasks.TASKS with their files in the folder tasks_from (see `run_tasks`); without
            the folder, tasks of lm-evaluation-harness, which is to be installed.

    Returns:
        tokens, the predictions that perplexity is of; exact, the most tokens that a layer sees exactly; and variants:
        for each by name its figures, with `average` of the tasks that choose, its `share` of the original's, and the
        seconds that it took. "everything" is the model as it is.

    Raises:
        ValueError: a name that is not known, a figure without what it needs or the other way round, text that is too
            short, another model's original.
    """
    check_tokenizer(tokenizer)
    for name, number in (("max_blocks", max_blocks), ("depths", depths), ("examples", examples)):
        if number is not None:
            check_positive(name, number)
    chosen = _figures(figures, dict(contexts=contexts, original=original, tasks=tasks))
    names = chosen_variants(model, variants)
    if variants is not None and ORIGINAL in variants and original is None:
        fail("variants", "an original to measure", "none")
    if original is not None and original.config.vocab_size != model.config.vocab_size:
        fail("original", f"a vocabulary of {model.config.vocab_size}", original.config.vocab_size)
    rows, exact = to_rows(tokenizer, text, length).first(max_blocks), exact_tokens(model)
    check_ids(model, rows.ids)
    if "positions" in chosen and exact and max(map(len, rows.ids)) <= exact + 1:
        fail("length", f"more than {exact + 1} tokens, so that some lie beyond the exact ones", max(map(len, rows.ids)))
    questions = _questions(tokenizer, tasks, tasks_from, examples, passage)
    filler = documents(text) if contexts else ""
    _check_contexts(tokenizer, filler, contexts, keys, values)
    subject = _Subject(
        tokenizer, rows, filler, original, exact, contexts, depths, keys, values, tasks, questions, examples
    )
    models = {name: model for name in names}
    if original is not None and (variants is None or ORIGINAL in variants):
        models = {ORIGINAL: original, **models}
    return {"exact": exact, **_side_by_side(models, subject, chosen)}


def _figures(asked: Sequence[str] | None, given: Mapping[str, Any]) -> list[str]:
    """The figures to measure in the order of the table."""
    there = {name for name, value in given.items() if value is not None and value != () and value != []}
    if asked is None:
        return [name for name, (_, needed) in FIGURES.items() if needed is None or needed in there]
    for name in asked:
        check_known("figures", name, FIGURES)
        needed = FIGURES[name][1]
        if needed is not None and needed not in there:
            fail(needed, f"what {name} is measured with", "none")
    used = {FIGURES[name][1] for name in asked}
    # The original may be there to be measured itself.
    if unused := sorted(there - used - {"original"}):
        fail("figures", f"one that is measured with {unused[0]}", ", ".join(asked) or "none")
    return [name for name in FIGURES if name in asked]


def _questions(tokenizer, tasks: Sequence[str], folder: str | Path | None, examples: int | None, passage: int):
    """Of tasks that lie in a folder; None where the harness has them, which is to be there."""
    if folder is not None and not tasks:
        fail("tasks", "tasks to read from the folder", "none")
    if examples is not None and not tasks:
        fail("tasks", f"tasks whose first {examples} examples are asked for", "none")
    if folder is not None:
        return read_tasks(tokenizer, tasks, folder, examples=examples, passage=passage)
    if tasks:
        check_installed()
    return None


def _check_contexts(tokenizer, text: str, contexts: Sequence[int], keys: int, values: int) -> None:
    """A context that the text cannot fill is to be known at once."""
    filler = torch.tensor(token_ids(tokenizer, text))
    for context in contexts:
        for options in (dict(keys=keys), dict(values=values)):
            make_prompt(tokenizer, filler, context, 0, 0.5, **options)


def _side_by_side(models: Mapping[str, PreTrainedModel], subject: _Subject, chosen: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name, model in models.items():
        start = time.perf_counter()
        with evaluating(model), VARIANTS.get(name, nullcontext)(model):
            # Where no figure asks for them they are not measured.
            losses = functools.cache(functools.partial(position_losses, model, subject.rows, f"Losses, {name}"))
            found[name] = {}
            for figure in chosen:
                found[name] |= FIGURES[figure][0](model, subject, losses)
        found[name]["seconds"] = time.perf_counter() - start
    whole = found.get(ORIGINAL, {}).get("average")
    for row in found.values():
        if whole and "average" in row:
            row["share"] = row["average"] / whole
    tokens = sum(int((labels[1:] != IGNORED).sum()) for labels in subject.rows.labels)
    return {"tokens": tokens, "variants": found}
