"""A model writes its own training text: the same whatever interrupted it, through the template, and into a file."""

import json

import pytest
import torch

from liger_linear.__main__ import main
from liger_models import draw, drawing
from liger_models.data import to_rows
from liger_models.teacher import mark_tuned, original
from tests.models.tiny import linearize_tiny, tiny, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content + '</s>' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}a{% endif %}"
QUICK = dict(length=32, batch=4)


def talker():
    return tiny(scale=1.0), tiny_tokenizer("<s>", chat_template=TEMPLATE)


def test_texts_and_conversations_as_the_original_would_say_them():
    model, tokenizer = talker()
    state = torch.random.get_rng_state()
    rows = draw(model, tokenizer, 300, **QUICK)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {frozenset(row) for row in rows} == {frozenset(["text"]), frozenset(["messages"])}
    for row in rows:
        if "messages" in row:
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert all(message["content"].strip() for message in row["messages"])
    assert draw(linearize_tiny(tiny(scale=1.0), window=4), tokenizer, 300, **QUICK) == rows
    assert draw(model, tokenizer, 300, seed=1, **QUICK) != rows
    assert all("text" in row for row in draw(model, tokenizer, 100, chat=0, **QUICK))
    assert all("messages" in row for row in draw(model, tokenizer, 60, chat=1, **QUICK))
    assert to_rows(tokenizer, rows, 64).tokens > 250


def test_a_tuned_model_writes_as_it_is(monkeypatch):
    model, tokenizer, asked = linearize_tiny(tiny(scale=1.0), window=8), tiny_tokenizer("<s>"), []
    monkeypatch.setattr(drawing, "original", lambda model: asked.append(model) or original(model))
    before = draw(model, tokenizer, 60, **QUICK)
    assert asked == [model]
    mark_tuned(model)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("z")] *= 100
    after = draw(model, tokenizer, 60, **QUICK)
    assert asked == [model] and after != before


def test_an_interrupted_draw_goes_on_to_the_same_rows(tmp_path):
    model, tokenizer = talker()
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    rows = draw(model, tokenizer, 300, out=path, **QUICK)
    whole = path.read_bytes()
    for cut in (0, 5, 60, whole.index(b"\n\n") + 1, whole.index(b"\n\n") + 2, len(whole) // 2, len(whole) - 1):
        other.write_bytes(whole[:cut])
        assert draw(model, tokenizer, 300, out=other, **QUICK) == rows
        assert other.read_bytes() == whole
    part = draw(model, tokenizer, 100, out=other, **QUICK)
    assert part == rows[: len(part)] and len(part) < len(rows) and other.read_bytes() == whole
    assert to_rows(tokenizer, path, 64).digest() == to_rows(tokenizer, rows, 64).digest()
    for content in (
        b"precious",
        b'{"text": "mine"}\n',
        b'{"text": "mine"}\n\n',
        whole.replace(b'"draw": "', b'"draw": "0'),
    ):
        other.write_bytes(content)
        with pytest.raises(ValueError, match="out: expected rows of this very draw in"):
            draw(model, tokenizer, 300, out=other, **QUICK)
        assert other.read_bytes() == content
    with pytest.raises(ValueError, match="out: expected rows of this very draw"):
        draw(model, tokenizer, 300, out=path, seed=1, **QUICK)


def test_bad_input_is_named():
    model, tokenizer = tiny(), tiny_tokenizer()
    for arguments, message in (
        (dict(tokens=0), "tokens: expected an integer >= 1, got 0"),
        (dict(length=4), "length: expected an integer >= 8, got 4"),
        (dict(chat=0.5), "chat: expected 0 for a tokenizer without a chat template, got 0.5"),
        (dict(chat=2), "chat: expected a share from 0 to 1, got 2"),
        (dict(temperature=0), "temperature: expected a number > 0, got 0"),
        (dict(model="small"), "model: expected a causal LM of transformers"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**{**dict(model=model, tokenizer=tokenizer, tokens=10), **arguments})
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(97).index_fill(0, torch.tensor(2), 100.0))
    with pytest.raises(ValueError, match="model: expected one that says something"):
        draw(model, tokenizer, 10, **QUICK)


def test_with_no_text_at_all_from_the_command_line(tmp_path, capsys, monkeypatch):
    model, tokenizer = talker()
    model.save_pretrained(tmp_path / "original"), tokenizer.save_pretrained(tmp_path / "original")
    monkeypatch.chdir(tmp_path)
    assert main(["draw", "original", "--tokens", "100", "--out", "rows.jsonl", "--length", "32", "--batch", "4"]) == 0
    assert capsys.readouterr().out.startswith("Wrote ")
    sizes = ["--window", "8", "--recall", "0", "--keep", "1"]
    assert main(["linearize", "original", "--out", "small", *sizes]) == 0
    given = ["finetune", "small", "--out", "tuned", "--data-free", "600", "--length", "32", "--steps", "2"]
    more = ["--objective", "kl=1,next=0.2,match=0.1", "--window-dropout", "0.5", "--freeze-kept"]
    assert main([*given, *more]) == 0
    assert len((tmp_path / "tuned.drawn.jsonl").read_text().split("\n")) > 10
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["liger_tuned"] is True
    for arguments, message in (
        (["finetune", "nowhere", "--out", "new", "--data-free", "0"], "data-free: expected an integer >= 1, got 0"),
        ([*given, "--text", "rows.jsonl", "--overwrite"], "data-free: expected --text or --data-free, got both"),
        (["finetune", "tuned", "--out", "x", "--text", "rows.jsonl", "--objective", "kl"], "teacher: expected weights"),
        (["finetune", "small", "--out", "x", "--data-free", "9", "--recall-dropout", "1"], "recall_dropout: expected"),
        (["finetune", "small", "--out", "x", "--objective", "none"], "objective: expected a mix of next, kl, match"),
        (["draw", "small", "--tokens", "9", "--out", "rows.txt"], "out: expected a file that ends in .jsonl"),
        (["draw", "small", "--tokens", "9", "--out", "rows.jsonl"], "out: expected rows of this very draw"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert message in error and not list(tmp_path.glob("x*"))
