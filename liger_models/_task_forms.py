"""How a row of a public task becomes a question: lm-evaluation-harness's field names and forms of prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Question(NamedTuple):
    """Contexts and endings in pairs, one a choice, of which `right` is the answer; names are the choices themselves.

    Of a single pair, the ending is to be what greedy decoding says.
    """

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    right: int
    names: tuple[str, ...]


class Completion(NamedTuple):
    """A prompt whose continuation is to contain one of the answers; `passage` is what stands in it to be read."""

    prompt: str
    answers: tuple[str, ...]
    passage: str


class Task(NamedTuple):
    """fields: what a row must hold, by path, and of which kind. form: of a row and the shots before it.

    score: the figure that stands for the task, and what decides how it is measured: acc, acc_norm (by characters of the
    choices), exact or contains. file, shots: names of files, where they are not the task's own.
    """

    fields: dict[str, type]
    form: Callable[[Row, Sequence[Row]], Question | Completion | None]
    score: str
    file: str | None = None
    shots: str | None = None


def _choose(context: str, choices: Sequence[str], right: int) -> Question:
    """One context before every choice."""
    for choice in choices:
        if not isinstance(choice, str):
            raise ValueError(f"expected text in every choice, got {choice!r:.80}")
    if not 0 <= right < len(choices):
        raise ValueError(f"expected an answer among {len(choices)} choices, got number {right}")
    return Question((context,) * len(choices), tuple(f" {x}" for x in choices), right, tuple(choices))


def _piqa(row: Row, shots: Sequence[Row]) -> Question:
    return _choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _lettered(context: str, row: Row) -> Question:
    """Choices with labels, of which answerKey names one."""
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if row["answerKey"] not in labels or len(labels) != len(texts):
        raise ValueError(f"expected answerKey among the labels of its choices, got {row['answerKey']!r}")
    return _choose(context, texts, labels.index(row["answerKey"]))


def _arc(row: Row, shots: Sequence[Row]) -> Question:
    return _lettered(f"Question: {row['question']}\nAnswer:", row)


def _openbookqa(row: Row, shots: Sequence[Row]) -> Question:
    return _lettered(row["question_stem"], row)


def _hellaswag(row: Row, shots: Sequence[Row]) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choose(_without_marks(context), [_without_marks(x) for x in row["endings"]], _number(row["label"]))


def _without_marks(text: str) -> str:
    """Without the brackets that WikiHow's pages left."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _number(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"expected the number of the answer, got {text!r}")
    return int(text)


def _winogrande(row: Row, shots: Sequence[Row]) -> Question:
    """Which option makes what follows it likelier: contexts differ, the ending does not."""
    before, blank, after = row["sentence"].partition("_")
    right, options = _number(row["answer"]) - 1, (row["option1"], row["option2"])
    if not blank or right not in (0, 1):
        raise ValueError(f"expected a sentence with _ and an answer 1 or 2, got answer {row['answer']!r}")
    return Question(tuple(before + x for x in options), (f" {after.strip()}",) * 2, right, options)


def _lambada(row: Row, shots: Sequence[Row]) -> Question:
    context, blank, word = row["text"].rpartition(" ")
    if not blank or not word:
        raise ValueError("expected a text of several words")
    return Question((context,), (f" {word}",), 0, (word,))


def _boolq(row: Row, shots: Sequence[Row]) -> Question:
    return _choose(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"])


def _copa(row: Row, shots: Sequence[Row]) -> Question:
    words = {"cause": "because", "effect": "therefore"}
    if row["question"] not in words:
        raise ValueError(f"expected a question cause or effect, got {row['question']!r}")
    choices = [x[:1].lower() + x[1:] for x in (row["choice1"], row["choice2"])]
    return _choose(f"{row['premise'].strip()[:-1]} {words[row['question']]}", choices, row["label"])


def _social_iqa(row: Row, shots: Sequence[Row]) -> Question:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _choose(f"Q: {row['context']} {row['question']}\nA:", choices, _number(row["label"]) - 1)


def _mmlu(row: Row, shots: Sequence[Row]) -> Question:
    def ask(one: Row) -> str:
        if len(one["choices"]) != 4:
            raise ValueError(f"expected 4 choices, got {len(one['choices'])}")
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", one["choices"], strict=True)]
        return "\n".join([one["question"].strip(), *lines, "Answer:"])

    own = [shot for shot in shots if shot["subject"] == row["subject"]]
    if not own:
        raise ValueError(f"expected shots of the subject {row['subject']!r}, got none")
    about = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}.\n\n"
    before = "".join(f"{ask(shot)} {'ABCD'[shot['answer']]}\n\n" for shot in own)
    return _choose(about + before + ask(row), "ABCD", row["answer"])


def _truthfulqa(row: Row, shots: Sequence[Row]) -> Question:
    choices, labels = row["mc1_targets"]["choices"], row["mc1_targets"]["labels"]
    if labels.count(1) != 1:
        raise ValueError(f"expected one right choice, got {labels.count(1)}")
    return _choose(f"Q: {row['question']}\nA:", choices, labels.index(1))


def _squad(row: Row, shots: Sequence[Row]) -> Completion | None:
    if row["cloze"] is None:
        return None
    return Completion(f"{row['context']}\n{row['cloze']}", (row["value"],), row["context"])


def _fda(row: Row, shots: Sequence[Row]) -> Completion:
    return Completion(row["text"], (row["value"],), row["text"])


def _kv_retrieval(row: Row, shots: Sequence[Row]) -> Completion:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in row["ordered_kv_records"]):
        raise ValueError("expected pairs in ordered_kv_records")
    records = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in row["ordered_kv_records"])
    asked = f'Key: "{row["key"]}"\nCorresponding value:'
    about = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    return Completion(f"{about}{{{records}}}\n\n{asked}", (row["value"],), records)


def _nq(row: Row, shots: Sequence[Row]) -> Completion:
    prompt = f"{row['title']}\n{row['context']}\nQuestion: {row['question']}?\nAnswer:"
    return Completion(prompt, tuple(row["answers"]), row["context"])


_LETTERED = {"choices.text": list, "choices.label": list, "answerKey": str}
_MMLU = dict(question=str, subject=str, choices=list, answer=int)
TASKS: dict[str, Task] = {
    "piqa": Task(dict(goal=str, sol1=str, sol2=str, label=int), _piqa, "acc_norm"),
    "arc_easy": Task({"question": str, **_LETTERED}, _arc, "acc_norm"),
    "arc_challenge": Task({"question": str, **_LETTERED}, _arc, "acc_norm"),
    "hellaswag": Task(dict(activity_label=str, ctx_a=str, ctx_b=str, endings=list, label=str), _hellaswag, "acc_norm"),
    "winogrande": Task(dict(sentence=str, option1=str, option2=str, answer=str), _winogrande, "acc"),
    "openbookqa": Task({"question_stem": str, **_LETTERED}, _openbookqa, "acc_norm"),
    "lambada": Task(dict(text=str), _lambada, "exact"),
    "boolq": Task(dict(passage=str, question=str, label=int), _boolq, "acc"),
    "copa": Task(dict(premise=str, choice1=str, choice2=str, question=str, label=int), _copa, "acc"),
    "social_iqa": Task(
        dict(context=str, question=str, answerA=str, answerB=str, answerC=str, label=str), _social_iqa, "acc"
    ),
    "mmlu": Task(_MMLU, _mmlu, "acc", "mmlu_test.jsonl", "mmlu_dev.jsonl"),
    "truthfulqa_mc": Task(
        {"question": str, "mc1_targets.choices": list, "mc1_targets.labels": list}, _truthfulqa, "acc"
    ),
    "squad": Task(dict(context=str, cloze=object, value=str), _squad, "contains"),
    "fda_510k": Task(dict(text=str, value=str), _fda, "contains"),
    "kv_retrieval": Task(
        dict(ordered_kv_records=list, key=str, value=str), _kv_retrieval, "contains", "kv_retrieval_75.jsonl"
    ),
    "nq": Task(dict(title=str, context=str, question=str, answers=list), _nq, "contains", "nq_gold_passage.jsonl"),
}
# What a linearized model is asked to keep, as published conversions report.
SIX_TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa")
