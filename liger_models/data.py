"""Text, documents, conversations and completions, from memory or a file, to rows of token ids with labels.

Shapes: T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from liger_models.text import chat_ids, cut, framing, marked, to_blocks, token_ids
from liger_ops.errors import fail

# The label of a position that nothing is asked of, as torch's cross_entropy has it.
IGNORED = -100
_PLAIN, _LINES, _LIST = (".txt", ".md", ""), ".jsonl", ".json"
_FORMS = {"text": ("text",), "messages": ("messages",), "prompt and completion": ("prompt", "completion")}
_CHOICES = "one of text, messages, or prompt and completion"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rows(torch.utils.data.Dataset):
    """Rows for next-token prediction: per row the token ids [T] and their labels [T], int64.

    A label is the token's own id, or IGNORED where it is only read. Rows may differ in length.
    """

    ids: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(len(self)))

    def first(self, count: int | None) -> Rows:
        """The first rows alone."""
        return Rows(self.ids[:count], self.labels[:count])

    @property
    def tokens(self) -> int:
        """How many tokens have a label."""
        return sum(int((labels != IGNORED).sum()) for labels in self.labels)

    @property
    def even(self) -> bool:
        """Whether all rows are of one length."""
        return len({len(row) for row in self.ids}) < 2

    def digest(self) -> str:
        """What tells other data apart: the number of rows and a hash of all ids and labels."""
        found = hashlib.sha256()
        for row in (*self.ids, *self.labels):
            found.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
        return f"{len(self)} rows, sha256 {found.hexdigest()[:16]}"


def collate(rows: list[dict[str, torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """Rows of a batch as tensors [B,T], padded on the right; with an attention_mask where there is padding."""

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    batch = {"input_ids": padded("input_ids", pad), "labels": padded("labels", IGNORED)}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    if (lengths != lengths[0]).any():
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def read(source: Any, name: str = "text") -> str | list[tuple[str, str | Mapping]]:
    """Plain text, or documents and rows with where each of them stands, as errors are to say.

    Takes a text; a path to plain text (.txt, .md), JSON lines (.jsonl) or a JSON list (.json); a list, a dataset or
    anything else that yields documents and rows. A text of one line that ends like such a file is its path.
    ValueError names what cannot be read, and where.
    """
    if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
        return _read_file(Path(source), name)
    if isinstance(source, str):
        return source
    if isinstance(source, Mapping):
        source = [source]
    if isinstance(source, (bytes, torch.Tensor)) or not isinstance(source, Iterable):
        fail(name, "text, a path, or a list of documents or rows", _kind(source))
    return [(f"{name}[{i}]", row) for i, row in enumerate(source)]


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _is_path(text: str) -> bool:
    return "\n" not in text and len(text) < 4096 and Path(text).suffix.lower() in (*_PLAIN[:-1], _LINES, _LIST)


def _read_file(path: Path, name: str) -> str | list[tuple[str, Any]]:
    kind = path.suffix.lower()
    if kind not in (*_PLAIN, _LINES, _LIST):
        fail(name, "a file that ends in .txt, .md, .jsonl or .json", path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: could not read {path} as UTF-8: {error}") from error
    if kind in _PLAIN:
        return content
    if kind == _LINES:
        # Not splitlines: a string in JSON may hold other marks that end a line.
        lines = ((i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip())
        return [(f"{path}, line {i}", _parse(line, f"{path}, line {i}")) for i, line in lines]
    rows = _parse(content, str(path))
    rows = rows if isinstance(rows, list) else [rows]
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if where.endswith(_LIST) else ""
        raise ValueError(f"{where}{line}: expected JSON: {error.msg} at column {error.colno}") from error


def to_rows(tokenizer: PreTrainedTokenizerBase, source: Any, length: int, name: str = "text") -> Rows:
    """Rows of at most `length` tokens from any form of text that `read` takes.

    One plain text is cut into full blocks. Each document of several is cut by itself, and its rest is a shorter row. A
    row `messages` learns what the assistant says, a row `prompt` and `completion` the completion and, where the
    tokenizer has one, the end of text behind it; both are cut off at `length`.

    Raises:
        ValueError: nothing to learn, a row of another form, messages without a chat template, a file or line that
            cannot be read.

    Warns:
        UserWarning: how many rows are left out because none of their first `length` tokens is to be learned.
    """
    found = read(source, name)
    if isinstance(found, str):
        blocks = tuple(to_blocks(tokenizer, found, length, name))
        return Rows(blocks, blocks)
    # Refuses a length that is too short.
    cut(tokenizer, "", length)
    ids, labels, dropped = [], [], 0
    for where, row in found:
        for tokens, asked in _tokenized(tokenizer, row, length, where):
            row_ids = torch.tensor(tokens[:length], dtype=torch.long)
            row_labels = torch.where(torch.tensor(asked[:length], dtype=torch.bool), row_ids, IGNORED)
            # Nothing precedes the first token, which is never asked for.
            if (row_labels[1:] == IGNORED).all():
                dropped += 1
            else:
                ids.append(row_ids)
                labels.append(row_labels)
    if not ids:
        fail(name, f"rows with a token to learn within {length} tokens", f"none in {dropped}")
    if dropped:
        warnings.warn(
            f"{name}: {dropped} of {dropped + len(ids)} rows left out, with no token to learn within {length} tokens",
            stacklevel=3,
        )
    return Rows(tuple(ids), tuple(labels))


def documents(source: Any, name: str = "text") -> str:
    """All plain text of a source in one; ValueError where it holds conversations or completions."""
    found = read(source, name)
    if isinstance(found, str):
        return found
    texts = [row if isinstance(row, str) else _form(row, where)["text"] for where, row in found if _plain(row, where)]
    if len(texts) < len(found):
        fail(name, "plain text to hide keys in", "messages or completions")
    return "\n\n".join(texts)


def _plain(row: Any, where: str) -> bool:
    return isinstance(row, str) or "text" in _form(row, where)


def _form(row: Any, where: str) -> dict[str, Any]:
    """The columns of a row that make up its form; others, such as its source, are not looked at."""
    if not isinstance(row, Mapping):
        fail(where, f"a document or a row with {_CHOICES}", _kind(row))
    forms = [keys for keys in _FORMS.values() if all(row.get(key) is not None for key in keys)]
    if len(forms) != 1:
        fail(where, _CHOICES, ", ".join(map(str, row)) or "an empty row")
    form = {key: row[key] for key in forms[0]}
    for key, value in form.items():
        if not isinstance(value, list if key == "messages" else str):
            wanted = "a list" if key == "messages" else "a string"
            fail(where, f"{key} to be {wanted}", _kind(value))
    return form | ({"tools": row["tools"]} if key == "messages" and row.get("tools") else {})


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, row: Any, length: int, where: str
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids, and which of them are to be learned, for each row that a document or a row gives."""
    form: dict[str, Any] = {"text": row} if isinstance(row, str) else _form(row, where)
    if "text" in form:
        for ids in cut(tokenizer, form["text"], length) or [[]]:
            yield ids, [True] * len(ids)
    elif "messages" in form:
        try:
            yield _conversation(tokenizer, form["messages"], form.get("tools"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    else:
        yield _completion(tokenizer, form["prompt"], form["completion"])


def _completion(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Token ids of a prompt and its completion, and which of them are the completion and its end."""
    start, whole = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + completion)
    # As the model will see the prompt, alone; a token across the border is of neither.
    rest = whole[len(start) :] if whole[: len(start)] == start else token_ids(tokenizer, completion)
    start = framing(tokenizer)[0] + start
    rest = rest + ([] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)])
    return start + rest, [False] * len(start) + [True] * len(rest)


def _conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], tools: list[Any] | None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if not roles or not all(isinstance(role, str) for role in roles):
        raise ValueError("messages: expected a list of messages with a role and a content")
    options: dict[str, Any] = {"tools": tools} if tools else {}
    messages = [dict(message) for message in messages]
    ids = chat_ids(tokenizer, messages, **options)
    asked = [False] * len(ids)
    if _MARKED.search(tokenizer.get_chat_template(tools=tools)):
        mask = marked(tokenizer, messages, tools or None)
        # What stands before a text may have been added or taken away there.
        shared = min(len(mask), len(ids))
        return ids, [False] * (len(ids) - shared) + mask[len(mask) - shared :]
    for i, role in enumerate(roles):
        if role != "assistant":
            continue
        if i == 0:
            raise ValueError("messages: expected a message before the assistant's first")
        start = chat_ids(tokenizer, messages[:i], add_generation_prompt=True, **options)
        end = chat_ids(tokenizer, messages[: i + 1], **options)
        if ids[: len(start)] != start or ids[: len(end)] != end:
            raise ValueError(
                f"messages: the chat template rewrites what stands before message {i}, so that the assistant's tokens "
                "cannot be told apart; expected one answer a row, or a template with generation markers"
            )
        asked[len(start) : len(end)] = [True] * (len(end) - len(start))
    return ids, asked
