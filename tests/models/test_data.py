"""Every form of text gives the rows that it should: begun once, cut or left out, asked for what is to be learned."""

import json
from pathlib import Path

import pytest
import torch

from liger_models import perplexity, retrieval
from liger_models.data import IGNORED, Rows, collate, documents, to_rows
from liger_models.generation import generate
from liger_models.on_disk import _standard_rows
from liger_models.retrieval import make_prompt
from liger_models.selection import hidden_keys
from liger_models.text import framing, to_blocks, token_ids
from tests.models.test_exactness import ids
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

START, END = 1, 2
# A header by role, so that nothing of an answer stands before it, with or without the start of text.
CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "<s>{% for m in messages %}{{ m.role + ': ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "hi?"},
    {"role": "assistant", "content": "ho."},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "me!"},
]


def learned(tokenizer, rows):
    """What each row asks for, as text."""
    return [tokenizer.decode(labels[labels != IGNORED]).replace(" ", "") for labels in rows.labels]


@pytest.mark.parametrize(("before", "after"), [("", ""), ("<s>", ""), ("<s>", "</s>"), ("", "</s>")])
def test_every_block_begins_as_a_text_does_and_none_ends(before, after):
    tokenizer, plain = tiny_tokenizer(before, after), tiny_tokenizer()
    wanted = ([START] * bool(before), [END] * bool(after))
    assert framing(tokenizer) == wanted
    blocks, words = to_blocks(tokenizer, TEXT, 50), plain(TEXT)["input_ids"]
    assert blocks.shape == ((len(words) + bool(after)) // (50 - bool(before)), 50)
    assert blocks[:, : len(wanted[0])].tolist() == [wanted[0]] * len(blocks)
    body = blocks[:, len(wanted[0]) :].flatten().tolist()
    assert body == words[: len(body)]
    # A text that says so itself is not begun twice.
    assert token_ids(tokenizer, f"{before}abc{after}") == plain("abc")["input_ids"]


def test_prompts_with_keys_begin_once_and_their_text_does_not():
    tokenizer, plain = tiny_tokenizer("<s>", "</s>"), tiny_tokenizer()
    filler = torch.tensor(token_ids(tokenizer, TEXT))
    prompt, without = (make_prompt(t, filler, 100, 3, 0.25).ids for t in (tokenizer, plain))
    assert prompt == [START, *without]
    for row, answer in hidden_keys(tokenizer, TEXT, 100, torch.device("cpu")):
        assert (row == START).nonzero().tolist() == [[0, 0]] and END not in row
        assert answer.tolist() == row[0, -len(answer) :].tolist()


def test_rows_for_calibration_begin_as_a_text_does():
    rows = _standard_rows(tiny_tokenizer("<s>", "</s>"))
    assert rows.shape == (8, 256) and (rows[:, 0] == START).all() and not (rows[:, 1:] == START).any()


@pytest.mark.parametrize("template", [CHAT, "<s>" + CHAT, MARKED])
@pytest.mark.parametrize(("before", "after"), [("", ""), ("<s>", "</s>")])
def test_generation_begins_once(monkeypatch, template, before, after):
    tokenizer, model, seen = tiny_tokenizer(before, after, template), tiny(), []

    def listen(x, **options):
        seen.append(x[0].tolist())
        return torch.cat([x, x], 1)

    monkeypatch.setattr(model, "generate", listen)
    generate(model, tokenizer, "hi?", chat=True)
    generate(model, tokenizer, "hi?")
    generate(model, tokenizer, f"{before}hi?")
    retrieval(model, tokenizer, TEXT, 40, depths=1)
    told = [START] * (bool(before) or "<s>" in template)
    assert seen[0] == told + tokenizer("user: hi?assistant: ", add_special_tokens=False)["input_ids"]
    assert seen[1] == seen[2] == [START] * bool(before) + tokenizer("hi?", add_special_tokens=False)["input_ids"]
    assert seen[3].count(START) == bool(before) and END not in seen[3]


class Table:
    """Shaped like a datasets.Dataset: rows by iteration, no list."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, sorted({key for row in rows for key in row})

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


def test_every_form_gives_the_same_rows(tmp_path):
    tokenizer = tiny_tokenizer("<s>")
    texts = ["the first document", "a second one\u2028that is \u201clonger\u201d", "third"]
    rows = [{"text": text, "source": "here"} for text in texts]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", "utf-8")
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    wanted = to_rows(tokenizer, texts, 8)
    # Each by itself: full rows, then its rest.
    assert [len(row) for row in wanted.ids] == [8, 8, 5, 8, 8, 8, 8, 2, 6]
    assert all(row[0] == START and (row[1:] != START).all() for row in wanted.ids)
    for form in (rows, Table(rows), tmp_path / "x.jsonl", str(tmp_path / "x.jsonl"), tmp_path / "x.json", iter(texts)):
        found = to_rows(tokenizer, form, 8)
        assert found.digest() == wanted.digest()
    assert documents(tmp_path / "x.jsonl") == documents(texts) == "\n\n".join(texts)
    other = to_rows(tokenizer, [*texts[:2], "Third"], 8)
    assert other.digest() != wanted.digest()


@pytest.mark.parametrize("suffix", [".txt", ".md", ""])
def test_one_text_is_cut_into_full_blocks(tmp_path, suffix):
    tokenizer, path = tiny_tokenizer(), tmp_path / f"x{suffix}"
    path.write_text(TEXT)
    blocks = to_blocks(tokenizer, TEXT, 32)
    for form in (TEXT, path):
        rows = to_rows(tokenizer, form, 32)
        assert torch.equal(torch.stack(rows.ids), blocks) and torch.equal(torch.stack(rows.labels), blocks)
    assert "attention_mask" not in collate([rows[0], rows[1]], 0)


@pytest.mark.parametrize(("before", "after"), [("", ""), ("<s>", "</s>")])
@pytest.mark.parametrize("template", [CHAT, "<s>" + CHAT, MARKED])
def test_the_assistant_alone_is_learned(template, before, after):
    tokenizer = tiny_tokenizer(before, after, template)
    rows = to_rows(tokenizer, [{"messages": TALK}, {"messages": TALK[:2]}], 100)
    assert learned(tokenizer, rows) == ["ho.</s>me!</s>", "ho.</s>"]
    for row in rows.ids:
        begun = bool(before) or "<s>" in template
        assert (row == START).nonzero().flatten().tolist() == [0] * begun and row[-1] == END


@pytest.mark.parametrize(("before", "after"), [("", ""), ("<s>", ""), ("<s>", "</s>")])
def test_the_completion_alone_is_learned_to_its_end(before, after):
    tokenizer = tiny_tokenizer(before, after)
    rows = to_rows(tokenizer, [{"prompt": "2+2=", "completion": "4"}], 100)
    assert learned(tokenizer, rows) == ["4</s>"]
    assert rows.ids[0].tolist() == [START] * bool(before) + token_ids(tokenizer, "2+2=4") + [END]


def test_long_rows_are_cut_and_what_then_teaches_nothing_is_counted():
    tokenizer = tiny_tokenizer(chat_template=CHAT)
    rows = [{"prompt": "a" * n, "completion": "bcd"} for n in (3, 9, 10, 20)]
    with pytest.warns(UserWarning, match="text: 2 of 4 rows left out, with no token to learn within 10 tokens"):
        found = to_rows(tokenizer, rows, 10)
    assert [len(row) for row in found.ids] == [7, 10] and learned(tokenizer, found) == ["bcd</s>", "b"]
    message = "eval_text: expected rows with a token to learn within 4 tokens, got none in 3"
    with pytest.raises(ValueError, match=message):
        to_rows(tokenizer, [rows[1], {"messages": TALK[:1]}, ""], 4, "eval_text")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            [{"prompt": "a", "completions": "b"}],
            r"^text\[0\]: expected one of text, messages, or prompt and completion, got p",
        ),
        (
            {"train": [], "test": []},
            r"^text\[0\]: expected one of text, messages, or prompt and completion, got train, test",
        ),
        (
            [{"text": "a", "messages": TALK}],
            r"^text\[0\]: expected one of text, messages, or prompt and completion, got text, m",
        ),
        (["a text", 3], r"^text\[1\]: expected a document or a row with one of text, .*, got int"),
        ([{"prompt": TALK, "completion": "a"}], r"^text\[0\]: expected prompt to be a string, got list"),
        ([{"messages": "hi"}], r"^text\[0\]: expected messages to be a list, got str"),
        ([{"messages": [{"content": "hi"}]}], r"^text\[0\]: messages: expected a list of messages with a role"),
        ([{"messages": TALK[1:]}], r"^text\[0\]: messages: expected a message before the assistant's first"),
        ([{"messages": TALK[:2]}, {"messages": []}], r"^text\[1\]: messages: expected a list"),
        (None, "^text: expected text, a path, or a list of documents or rows, got None"),
        (b"bytes", "^text: expected text, a path, or a list of documents or rows, got bytes"),
        ([], "^text: expected rows with a token to learn within 64 tokens, got none in 0"),
        ("none.jsonl", "^text: could not read none.jsonl"),
        (Path("x.csv"), r"^text: expected a file that ends in .txt, .md, .jsonl or .json, got x.csv"),
    ],
)
def test_what_is_refused(form, message):
    with pytest.raises(ValueError, match=message):
        to_rows(tiny_tokenizer(chat_template=CHAT), form, 64)


def test_templates_that_say_too_little_are_refused():
    rows = [{"messages": TALK}]
    # Only the last answer keeps its mark, as where earlier thoughts are taken away.
    rewriting = CHAT.replace("{{ m.role", "{% if loop.last %}*{% endif %}{{ m.role", 1)
    refusing = "{{ raise_exception('no systems here') }}"
    for template, message in (
        (None, r"^text\[0\]: messages: expected a tokenizer with a chat template, got one without"),
        (rewriting, r"^text\[0\]: messages: the chat template rewrites what stands before message 1"),
        (refusing, r"^text\[0\]: messages: the chat template refuses them: no systems here"),
    ):
        with pytest.raises(ValueError, match=message):
            to_rows(tiny_tokenizer(chat_template=template), rows, 64)


def test_a_malformed_line_is_named(tmp_path):
    good, path = json.dumps({"text": "abc"}), tmp_path / "x.jsonl"
    for line, message in (
        ('{"text": "abc"', "line 3: expected JSON: .* at column 15"),
        ('{"words": "abc"}', "line 3: expected one of text, messages, or prompt and completion, got words"),
        ("[1]", "line 3: expected a document or a row"),
    ):
        path.write_text(f"{good}\n\n{line}\n{good}\n")
        with pytest.raises(ValueError, match=f"x.jsonl, {message}"):
            to_rows(tiny_tokenizer(), path, 64)
    path = tmp_path / "x.json"
    path.write_text(f"[{good},\n{good}\n{good}]")
    with pytest.raises(ValueError, match=r"x\.json, line 3: expected JSON: Expecting ',' delimiter at column 1"):
        to_rows(tiny_tokenizer(), path, 64)


@pytest.mark.parametrize("options", [{}, dict(gate="gla"), dict(memories=2)], ids=str)
def test_padding_teaches_nothing(options):
    """Loss and gradients of rows padded to one length, against each of them alone."""
    model = linearize_tiny(tiny(), window=8, sinks=2, **options).double().train()
    rows = [{"input_ids": x, "labels": x.clone()} for x in (ids(1, 40)[0], ids(1, 23)[0] + 1, ids(1, 31)[0] + 2)]
    rows[0]["labels"][:30] = IGNORED
    batch = collate(rows, 0)
    assert batch["attention_mask"].sum(1).tolist() == [40, 23, 31]
    assert (batch["labels"][1, 23:] == IGNORED).all()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    counts = [int((row["labels"][1:] != IGNORED).sum()) for row in rows]
    alone = [model(**{k: v[None] for k, v in row.items()}, use_cache=False).loss for row in rows]
    wanted = sum(n * x for n, x in zip(counts, alone, strict=True)) / sum(counts)
    wanted.backward()
    # transformers takes the loss in float32.
    assert loss.item() == pytest.approx(wanted.item(), abs=2e-6)
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert (found[n] - p.grad).abs().max() <= 1e-6, n


def test_perplexity_counts_every_learned_token_alike():
    model = tiny().double()
    rows = Rows((ids(1, 40)[0], ids(1, 12)[0] + 1), (ids(1, 40)[0].clone(), ids(1, 12)[0] + 1))
    rows.labels[0][:25] = IGNORED
    with torch.no_grad():
        losses = [
            -model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[max(first - 1, 0) :, 0]
            for row, first in zip(rows.ids, (25, 0), strict=True)
        ]
    assert [len(x) for x in losses] == [15, 11]
    assert perplexity(model, rows) == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-7)
    with pytest.raises(ValueError, match="blocks: expected rows with a token to predict, got none"):
        perplexity(model, ids(2, 1))
    blocks = ids(3, 40)
    each = [perplexity(model, block[None]) for block in blocks]
    assert perplexity(model, blocks) == pytest.approx(torch.tensor(each, dtype=torch.float64).log().mean().exp().item())
