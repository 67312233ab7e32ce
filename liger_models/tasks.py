"""Public tasks from local JSONL files: multiple choice by likelihood, completion by greedy decoding. No network.

Shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from liger_models._inputs import check_ids, input_device
from liger_models._task_forms import SIX_TASKS as SIX_TASKS
from liger_models._task_forms import TASKS as TASKS
from liger_models._task_forms import Completion, Question, Row, Task
from liger_models.data import read
from liger_models.generation import continued, evaluating, without_settings
from liger_models.retrieval import check_tokenizer
from liger_models.text import framing, token_ids
from liger_ops.errors import check_known, check_positive, fail

# As the completion tasks of lm-evaluation-harness: so many new tokens, and no second line.
_NEW_TOKENS = 48
# Passages of fewer tokens lie mostly inside a window.
PASSAGE = 150
# Tokens of a forward pass, padding included, and how much of it may be padding; so many times as many in rows that are
# continued, whose new tokens cost little more in many rows than in one.
_AT_ONCE, _PADDING, _WRITTEN = {"cpu": 1024, "cuda": 16384}, 0.15, 4
_KINDS = {str: "text", int: "a whole number", list: "a list", object: "text or null"}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: str | Path,
    *,
    examples: int | None = None,
    passage: int = PASSAGE,
) -> dict[str, dict[str, float]]:
    """Scores of a model on public tasks, whose JSONL files lie in a folder under the tasks' names.

    Zero-shot, MMLU with the shots of its subject, in the prompt forms of lm-evaluation-harness; no chat template.

    Args:
        tasks: names in TASKS.
        folder: holds `piqa.jsonl` and so on, in the field names of lm-evaluation-harness's data sets.
        examples: only the first ones of each.
        passage: of squad, rows whose passage has more tokens than this.

    Returns:
        For each task examples, how many; score, the figure that stands for it; and that by its name: acc (the likeliest
        choice), acc_norm (the likeliest by characters), exact (greedy decoding says the ending), contains (it says an
        answer in its first line of 48 tokens at most, in any case of letters).

    Raises:
        ValueError: a task that is not known; a file, a line or a field that is missing or of another kind.
    """
    questions = read_tasks(tokenizer, tasks, folder, examples=examples, passage=passage)
    return {name: score_task(model, tokenizer, name, found) for name, found in questions.items()}


def read_tasks(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: str | Path,
    *,
    examples: int | None = None,
    passage: int = PASSAGE,
) -> dict[str, list[Question] | list[Completion]]:
    """The questions of each task, read and checked; as `run_tasks` takes them."""
    check_tokenizer(tokenizer)
    if isinstance(tasks, str):
        fail("tasks", "a list of names", repr(tasks))
    for name in tasks:
        check_known("tasks", name, TASKS)
    if examples is not None:
        check_positive("examples", examples)
    check_positive("passage", passage, 0)
    if not Path(folder).is_dir():
        fail("tasks_from", "a folder of JSONL files", folder)
    found = {}
    for name in dict.fromkeys(tasks):
        found[name] = _questions(tokenizer, name, Path(folder), examples, passage)
    return found


def _questions(tokenizer, name: str, folder: Path, examples: int | None, passage: int) -> list:
    task, found = TASKS[name], []
    path = folder / (task.file or f"{name}.jsonl")
    shots = [row for _, row in _checked(name, task, folder / task.shots)] if task.shots else []
    for where, row in _checked(name, task, path):
        if len(found) == examples:
            break
        try:
            question = task.form(row, shots)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{where}: {error}") from error
        if question is None:
            continue
        if name == "squad" and len(token_ids(tokenizer, cast(Completion, question).passage)) <= passage:
            continue
        found.append(question)
    if not found:
        fail("tasks_from", f"rows of {name} in {path.name}", "none")
    return found


def _checked(name: str, task: Task, path: Path) -> list[tuple[str, Row]]:
    """Rows of a file with where each stands, and every field that the task reads."""
    if not path.is_file():
        fail("tasks_from", f"a file {path.name} for {name}", f"nothing at {path}")
    rows = cast(list, read(path, "tasks_from"))
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected an object with the fields of {name}, got {type(row).__name__}")
        for field, kind in task.fields.items():
            value: Any = row
            for part in field.split("."):
                if not isinstance(value, Mapping) or part not in value:
                    raise ValueError(f"{where}: {name} expected a field {field}, got {', '.join(map(str, row))}")
                value = value[part]
            wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
            if wrong or (kind is object and not isinstance(value, str | None)):
                raise ValueError(f"{where}: {name} expected {_KINDS[kind]} in {field}, got {value!r:.80}")
    return rows


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    questions: Sequence[Question] | Sequence[Completion],
) -> dict[str, float]:
    """The scores of one task, as `run_tasks` returns them, on questions that `read_tasks` found."""
    with evaluating(model):
        if TASKS[name].score == "contains":
            shares = {"contains": _contained(model, tokenizer, cast(Sequence[Completion], questions), name)}
        else:
            shares = _chosen(model, tokenizer, cast(Sequence[Question], questions), name)
    return {**shares, "score": shares[TASKS[name].score], "examples": len(questions)}


def _chosen(model, tokenizer, questions: Sequence[Question], name: str) -> dict[str, float]:
    """Shares of questions whose right choice is the likeliest."""
    pairs = [pair for q in questions for pair in zip(q.contexts, q.endings, strict=True)]
    scores, at, hits = log_likelihoods(model, tokenizer, pairs, name), 0, {"acc": 0, "acc_norm": 0, "exact": 0}
    for question in questions:
        own = scores[at : at + len(question.endings)]
        at += len(own)
        plain = torch.tensor([score.sum for score in own], dtype=torch.float64)
        characters = torch.tensor([max(len(choice), 1) for choice in question.names], dtype=torch.float64)
        hits["acc"] += int(plain.argmax()) == question.right
        hits["acc_norm"] += int((plain / characters).argmax()) == question.right
        hits["exact"] += own[question.right].greedy
    asked = {"exact": ("exact",), "acc": ("acc",), "acc_norm": ("acc", "acc_norm")}[TASKS[name].score]
    return {key: hits[key] / len(questions) for key in asked}


class Score(NamedTuple):
    """Log-likelihood of an ending behind its context, and whether greedy decoding says it."""

    sum: float
    greedy: bool


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    description: str = "Likelihoods",
) -> list[Score]:
    """A score for each (context, ending). What is read alike is read once; rows of like lengths share a batch."""
    asked: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for i, (context, ending) in enumerate(pairs):
        start, rest = _encoded(tokenizer, context, ending)
        # The last token is only asked for.
        asked.setdefault(tuple(start + rest[:-1]), []).append((i, rest))
    device, scores = input_device(model), {}
    with tqdm(total=len(pairs), desc=description, leave=False) as bar:
        for batch in _batches(sorted(asked, key=len), _AT_ONCE.get(device.type, _AT_ONCE["cuda"])):
            for row, logs in zip(batch, _log_probabilities(model, batch, asked, device), strict=True):
                for i, rest in asked[row]:
                    own, wanted = logs[len(logs) - len(rest) :], torch.tensor(rest, device=logs.device)
                    sums = own.gather(1, wanted[:, None]).double().sum().item()
                    scores[i] = Score(sums, bool((own.argmax(1) == wanted).all()))
                bar.update(len(asked[row]))
    return [scores[i] for i in range(len(pairs))]


def _encoded(tokenizer, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Token ids of a context, begun as the tokenizer begins a text, and of its ending.

    A border of tokens is a border of words: blanks at the context's end belong to the ending.
    """
    bare = context.rstrip()
    context, ending = bare, context[len(bare) :] + ending
    before, start = framing(tokenizer)[0], token_ids(tokenizer, context)
    rest = token_ids(tokenizer, context + ending)[len(start) :]
    if not rest:
        fail("ending", "at least one token", repr(ending))
    first = [x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None][:1]
    return (before + start) or cast(list[int], first), rest


def _batches(rows: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, ...]]]:
    """Rows, sorted by length, in groups of so many tokens, of which few are padding."""
    found: list[list[tuple[int, ...]]] = []
    for row in rows:
        last = found[-1] if found else []
        if last and len(row) * (len(last) + 1) <= tokens and len(row) * (1 - _PADDING) <= len(last[0]):
            last.append(row)
        else:
            found.append([row])
    return found


def _log_probabilities(model, batch, asked, device: torch.device) -> list[torch.Tensor]:
    """For each row of a batch, log-probabilities [N,vocabulary] behind its last N tokens, N the longest ending."""
    lengths = [len(row) for row in batch]
    longest = [max(len(rest) for _, rest in asked[row]) for row in batch]
    ids = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(device)
    check_ids(model, ids)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long().to(device)
    # Nothing is asked before the earliest ending.
    first = min(length - n for length, n in zip(lengths, longest, strict=True))
    options = {} if mask.all() else {"attention_mask": mask}
    logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - first, **options).logits
    rows = zip(logits, lengths, longest, strict=True)
    return [own[length - n - first : length - first].float().log_softmax(-1) for own, length, n in rows]


class _Told(StoppingCriteria):
    """Ends a row where its first line ends, once there is anything in it, or as soon as it has said all that is asked.

    said reads texts off rows [B,T] of tokens; answers are those of each of the questions of each row.
    """

    def __init__(self, said: Callable[[torch.Tensor], list[str]], answers: Sequence[Sequence[Sequence[str]]]):
        self.said, self.answers = said, answers

    def __call__(self, input_ids, scores, **kwargs):
        rows = zip(self.said(input_ids), self.answers, strict=True)
        ended = ["\n" in text or all(_holds(text, own) for own in answers) for text, answers in rows]
        return torch.tensor(ended, device=input_ids.device)


def _holds(text: str, answers: Sequence[str]) -> bool:
    """Whether the first line of a text holds one of several answers, in any case of letters."""
    line = text.partition("\n")[0].lower()
    return any(answer.lower() in line for answer in answers)


@torch.no_grad()
def _contained(model, tokenizer, questions: Sequence[Completion], name: str) -> float:
    """Share of prompts behind which the first line of greedy decoding holds an answer."""
    device, found, ends = input_device(model), 0, tokenizer.eos_token_id
    pad = 0 if ends is None else ends
    greedy = GenerationConfig(do_sample=False, max_new_tokens=_NEW_TOKENS, pad_token_id=pad, eos_token_id=ends)
    plain, asked = without_settings(model), {}
    for question in questions:
        row = tuple(framing(tokenizer)[0] + token_ids(tokenizer, question.prompt.rstrip()))
        asked.setdefault(row, []).append(question.answers)
    with tqdm(total=len(questions), desc=name, leave=False) as bar:
        for batch in _batches(sorted(asked, key=len), _WRITTEN * _AT_ONCE.get(device.type, _AT_ONCE["cuda"])):
            # On the left, so that what is said begins in one column.
            ids = [torch.tensor(row) for row in batch]
            shown = [torch.ones_like(row) for row in ids]
            ids = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left").to(device)
            shown = pad_sequence(shown, batch_first=True, padding_side="left").to(device)

            def said(out: torch.Tensor, start: int = ids.shape[1]) -> list[str]:
                texts = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
                return [text.lstrip() for text in texts]

            told = StoppingCriteriaList([_Told(said, [asked[row] for row in batch])])
            out = continued(plain, ids, shown, generation_config=greedy, stopping_criteria=told)
            for text, row in zip(said(out), batch, strict=True):
                found += sum(_holds(text, answers) for answers in asked[row])
                bar.update(len(asked[row]))
    return found / len(questions)
