"""Public tasks from local files: prompts as others make them, scores as the formulas say. All rows are made up."""

import json

import pytest
import torch
import torch.nn.functional as F

from liger_models import generate, run_tasks, tasks
from liger_models.tasks import TASKS, log_likelihoods, read_tasks
from tests.models.tiny import linearize_tiny, tiny, tiny_tokenizer

LETTERED = dict(choices={"text": ["a cat", "a dog"], "label": ["A", "B"]}, answerKey="B")
MMLU = dict(subject="odd_sums", choices=["1", "2", "3", "4"])
# A row of each task, and what of it is asked: context and ending of the right choice, or prompt and answer.
ROWS = {
    "piqa": (dict(goal="Sort.", sol1="By hand.", sol2="Not.", label=1), "Question: Sort.\nAnswer:", " Not."),
    "arc_easy": (dict(question="Who?", **LETTERED), "Question: Who?\nAnswer:", " a dog"),
    "arc_challenge": (dict(question="Who?", **LETTERED), "Question: Who?\nAnswer:", " a dog"),
    "hellaswag": (
        dict(
            activity_label="Tea", ctx_a="Pour. [title] Now", ctx_b="she", endings=["sits [step].", "goes."], label="0"
        ),
        "Tea: Pour.. Now She",
        " sits .",
    ),
    "winogrande": (
        dict(sentence="Ann fed Bea as _ was late.", option1="Ann", option2="Bea", answer="2"),
        "Ann fed Bea as Bea",
        " was late.",
    ),
    "openbookqa": (dict(question_stem="Who barks is", **LETTERED), "Who barks is", " a dog"),
    "lambada": (dict(text="over the lazy dog"), "over the lazy", " dog"),
    "boolq": (dict(passage="It is.", question="is it", label=1), "It is.\nQuestion: is it?\nAnswer:", " yes"),
    "copa": (
        dict(premise="It rained.", choice1="He ran.", choice2="He sat.", question="effect", label=0),
        "It rained therefore",
        " he ran.",
    ),
    "social_iqa": (
        dict(context="Al left.", question="Why?", answerA="x", answerB="y", answerC="z", label="3"),
        "Q: Al left. Why?\nA:",
        " z",
    ),
    "mmlu": (
        dict(question=" 1 + 2? ", answer=2, **MMLU),
        "The following are multiple choice questions (with answers) about odd sums.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n1 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
        " C",
    ),
    "truthfulqa_mc": (
        dict(question="Is it?", mc1_targets={"choices": ["Yes.", "No."], "labels": [1, 0]}),
        "Q: Is it?\nA:",
        " Yes.",
    ),
    "squad": (
        dict(context="The dog is called Rex and old.", cloze="The dog is called", value="Rex"),
        "The dog is called Rex and old.\nThe dog is called",
        "Rex",
    ),
    "fda_510k": (dict(text="Applicant Ann.\nApplicant:", value="Ann"), "Applicant Ann.\nApplicant:", "Ann"),
    "kv_retrieval": (
        dict(ordered_kv_records=[["k1", "v1"], ["k2", "v2"]], key="k2", value="v2"),
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"k1": "v1",\n "k2": "v2"}\n\nKey: "k2"\nCorresponding value:',
        "v2",
    ),
    "nq": (
        dict(title="Rex", context="Rex is a dog.", question="what is rex", answers=["a dog", "dog"]),
        "Rex\nRex is a dog.\nQuestion: what is rex?\nAnswer:",
        "a dog",
    ),
}


def write(folder, name, rows):
    (folder / (TASKS[name].file or f"{name}.jsonl")).write_text("\n".join(map(json.dumps, rows)))
    if TASKS[name].shots:
        shots = [dict(question="1 + 1?", answer=1, **MMLU), dict(question="?", answer=0, **{**MMLU, "subject": "art"})]
        (folder / TASKS[name].shots).write_text("\n".join(map(json.dumps, shots)))


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_asked_in_the_known_form(name, tmp_path):
    row, context, wanted = ROWS[name]
    write(tmp_path, name, [row, row])
    (question,) = read_tasks(tiny_tokenizer(), [name], tmp_path, examples=1, passage=20)[name]
    if TASKS[name].score == "contains":
        assert (question.prompt, question.answers[0]) == (context, wanted)
    else:
        assert (question.contexts[question.right], question.endings[question.right]) == (context, wanted)


@torch.no_grad()
def log_likelihood(model, tokenizer, context, ending):
    """One row alone; a token a character."""
    start, rest = (tokenizer(x)["input_ids"] for x in (context, ending))
    logits = model(torch.tensor([start + rest])).logits[0, len(start) - 1 : -1]
    picked = F.cross_entropy(logits, torch.tensor(rest), reduction="none")
    return -picked.sum().item(), bool((logits.argmax(-1) == torch.tensor(rest)).all())


@pytest.mark.parametrize("make", [tiny, lambda: linearize_tiny(tiny(), window=8, sinks=2)], ids=["plain", "linear"])
def test_likelihoods_in_batches_are_those_of_rows_alone(make):
    model, tokenizer = make(), tiny_tokenizer()
    words = ["the quick brown fox jumps over", "the lazy", "dogs and cats sleep the whole day long"]
    pairs = [(a, b) for a in words for b in ("x", "y", " a longer ending", " some ending")]
    said = generate(model, tokenizer, words[0], max_new_tokens=3)
    pairs.append((words[0], "".join(said.split())))
    for score, pair in zip(log_likelihoods(model, tokenizer, pairs), pairs, strict=True):
        total, greedy = log_likelihood(model, tokenizer, *pair)
        assert score.sum == pytest.approx(total, abs=1e-3) and score.greedy == greedy
    assert log_likelihoods(model, tokenizer, pairs)[-1].greedy


def test_what_is_read_alike_is_read_once(monkeypatch):
    model, rows = tiny(), []
    model.register_forward_pre_hook(lambda m, args: rows.append(tuple(args[0].shape)))
    log_likelihoods(model, tiny_tokenizer(), [("who?", ending) for ending in "ABCD"])
    assert rows == [(1, 4)]


def test_scores_are_shares_of_right_choices(tmp_path):
    model, tokenizer = linearize_tiny(tiny(), window=8, sinks=2).train(), tiny_tokenizer()
    rows = [
        dict(
            goal=f"sort {i}", sol1=f"by hand {i} " + "or not " * (i % 3), sol2="no" * (i % 4 + 1), label=int(i % 4 > 0)
        )
        for i in range(20)
    ]
    write(tmp_path, "piqa", rows)
    found = run_tasks(model, tokenizer, ["piqa"], tmp_path)["piqa"]
    assert model.training
    model.eval()
    acc = norm = 0
    for row in rows:
        context = f"Question: {row['goal']}\nAnswer:"
        sums = [log_likelihood(model, tokenizer, context, f" {row[key]}")[0] for key in ("sol1", "sol2")]
        acc += (sums[1] > sums[0]) == row["label"]
        norm += (sums[1] / len(row["sol2"]) > sums[0] / len(row["sol1"])) == row["label"]
    assert found == {"acc": acc / 20, "acc_norm": norm / 20, "score": norm / 20, "examples": 20}
    assert 0 < acc != norm


def test_an_exact_word_is_what_greedy_decoding_says(tmp_path, monkeypatch):
    model, tokenizer = tiny(), tiny_tokenizer()
    monkeypatch.setattr(tasks, "log_likelihoods", lambda *args: [tasks.Score(-1.0, i != 1) for i in range(4)])
    write(tmp_path, "lambada", [dict(text="a b")] * 4)
    assert run_tasks(model, tokenizer, ["lambada"], tmp_path)["lambada"] == dict(exact=0.75, score=0.75, examples=4)


def test_a_completion_holds_an_answer_in_any_letters(tmp_path):
    model, tokenizer = linearize_tiny(tiny(), window=8, sinks=2), tiny_tokenizer()
    said = generate(model, tokenizer, "the quick", max_new_tokens=48).replace(" ", "")
    assert len(said) > 4
    rows = [dict(text="the quick ", value=x) for x in (said[0].swapcase(), "none of it", tokenizer.eos_token)]
    write(tmp_path, "fda_510k", rows)
    model.generation_config.repetition_penalty = 5.0
    found = run_tasks(model, tokenizer, ["fda_510k"], tmp_path)["fda_510k"]
    assert found == dict(contains=1 / 3, score=1 / 3, examples=3)


def test_a_line_ends_a_completion_and_so_does_all_that_is_asked_for():
    texts = {"ab": False, "a Yes": True, "yes\nno": True, "ab\n": True, "no": False, "no, YES": True, "ye": False}
    answers = [[("yes", "si")]] * 4 + [[("yes",), ("no", "nope")]] * 3
    told = tasks._Told(lambda rows: [list(texts)[i] for i in rows[:, 0]], answers)
    assert told(torch.arange(len(texts))[:, None], None).tolist() == list(texts.values())


@pytest.mark.parametrize("linear", [True, False])
def test_completions_side_by_side_are_those_of_each_alone(linear, tmp_path, monkeypatch):
    whole, tokenizer, calls = tiny(), tiny_tokenizer(), []
    model = linearize_tiny(whole, window=8, sinks=2, recall=3) if linear else whole
    words = [("the quick brown fox jumps over the lazy dog " * 2)[i : i + 30 + i % 5] for i in range(6)]
    said = [generate(model, tokenizer, x.rstrip(), max_new_tokens=48).lstrip().partition("\n")[0] for x in words]
    # Half are asked for what comes late, half for what never comes.
    rows = [dict(text=x, value=s[-4:] if i % 2 else "none") for i, (x, s) in enumerate(zip(words, said, strict=True))]
    write(tmp_path, "fda_510k", [*rows, dict(rows[1], value="neither")])
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    for at_once, most in ((1, 6 * 48), (1024, 3 * 48)):
        monkeypatch.setattr(tasks, "_AT_ONCE", {"cpu": at_once, "cuda": at_once})
        found = run_tasks(model, tokenizer, ["fda_510k"], tmp_path)["fda_510k"]
        assert found["contains"] == sum(r["value"].lower() in s.lower() for r, s in zip(rows, said, strict=True)) / 7
        assert found["contains"] > 0 and 0 < len(calls) <= most
        calls.clear()


def test_a_completion_stops_where_its_answer_is_said(tmp_path):
    model, tokenizer, calls = tiny(), tiny_tokenizer(), []
    said = generate(model, tokenizer, "the quick", max_new_tokens=48).lstrip()
    write(tmp_path, "fda_510k", [dict(text="the quick ", value=said[:3])])
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    assert run_tasks(model, tokenizer, ["fda_510k"], tmp_path)["fda_510k"]["contains"] == 1
    assert len(calls) <= 4


def test_passages_are_long_and_have_a_cloze(tmp_path):
    rows = [dict(context="c" * n, cloze=cloze, value="c") for n, cloze in ((9, "a"), (30, None), (31, "b"), (32, "c"))]
    write(tmp_path, "squad", rows)
    found = read_tasks(tiny_tokenizer(), ["squad"], tmp_path, passage=10)["squad"]
    assert [len(q.passage) for q in found] == [31, 32]
    assert len(read_tasks(tiny_tokenizer(), ["squad"], tmp_path, passage=10, examples=1)["squad"]) == 1
    with pytest.raises(ValueError, match=r"tasks_from: expected rows of squad in squad\.jsonl, got none"):
        read_tasks(tiny_tokenizer(), ["squad"], tmp_path, passage=99)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("piqa", dict(sol1=None), "piqa expected text in sol1, got None"),
        ("piqa", dict(goal=...), "piqa expected a field goal, got sol1, sol2, label"),
        ("piqa", dict(label=True), "piqa expected a whole number in label, got True"),
        ("piqa", dict(label=2), "expected an answer among 2 choices, got number 2"),
        ("arc_easy", dict(choices={"text": []}), "arc_easy expected a field choices.label"),
        ("arc_easy", dict(answerKey="Z"), "expected answerKey among the labels of its choices, got 'Z'"),
        ("arc_easy", dict(choices={"text": [1], "label": ["B"]}), "expected text in every choice, got 1"),
        ("hellaswag", dict(label="x"), "expected the number of the answer, got 'x'"),
        ("winogrande", dict(sentence="no blank"), "expected a sentence with _ and an answer 1 or 2"),
        ("mmlu", dict(subject="chess"), "expected shots of the subject 'chess', got none"),
        ("mmlu", dict(choices=["1"]), "expected 4 choices, got 1"),
        ("copa", dict(question="why"), "expected a question cause or effect, got 'why'"),
        ("lambada", dict(text="word"), "expected a text of several words"),
        ("truthfulqa_mc", dict(mc1_targets={"choices": ["a"], "labels": [0]}), "expected one right choice, got 0"),
        ("kv_retrieval", dict(ordered_kv_records=["k"]), "expected pairs in ordered_kv_records"),
        ("squad", dict(cloze=3), "squad expected text or null in cloze, got 3"),
    ],
)  # fmt: skip
def test_wrong_fields_are_one_line_with_file_and_line(name, changes, message, tmp_path):
    row = ROWS[name][0]
    bad = {key: value for key, value in {**row, **changes}.items() if value is not ...}
    write(tmp_path, name, [row, bad])
    with pytest.raises(ValueError) as error:
        read_tasks(tiny_tokenizer(), [name], tmp_path, passage=1)
    said = str(error.value)
    assert f"{TASKS[name].file or name + '.jsonl'}, line 2: " in said and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tasks=["chess"]), "tasks: expected one of piqa, arc_easy, .*, got 'chess'"),
        (dict(tasks="piqa"), "tasks: expected a list of names, got 'piqa'"),
        (dict(folder="nowhere"), "tasks_from: expected a folder of JSONL files, got nowhere"),
        (dict(tasks=["piqa", "copa"]), "tasks_from: expected a file copa.jsonl for copa"),
        (dict(examples=0), "examples: expected an integer >= 1"),
        (dict(passage=-1), "passage: expected an integer >= 0"),
        (dict(tokenizer=None), "tokenizer: expected the model's tokenizer"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path):
    write(tmp_path, "piqa", [ROWS["piqa"][0]])
    options = dict(tokenizer=tiny_tokenizer(), tasks=["piqa"], folder=tmp_path) | options
    with pytest.raises(ValueError, match=message):
        run_tasks(tiny(), **options)
