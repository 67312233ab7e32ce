"""Text that a model writes for its own training, where there is none: drawn in batches, kept in a file, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_models._inputs import input_device
from liger_models._snapshot import fingerprint
from liger_models._templates import rendered
from liger_models.generation import continued, without_settings
from liger_models.modeling import LigerMixin
from liger_models.teacher import is_tuned, original
from liger_models.text import chat_ids, framing, once_before
from liger_ops.errors import check_positive, fail

# Stands for what a user says, to see what a template puts before and behind it.
_SAID = "What the user says."
# Of the tokens of a row, what a question may take.
_QUESTION = 4
# Batches without a token before a model is taken to have nothing to say.
_SILENT = 8


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    out: str | Path | None = None,
    length: int = 512,
    batch: int = 16,
    chat: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of text that a model writes itself, at least `tokens` of its own tokens in all, as `finetune` reads them.

    A text begins as the tokenizer begins one, or else at a random token. Of the batches, a share `chat` are
    conversations: the chat template up to where the user speaks, the user's words as the model continues it, and its
    answer to them ("Magpie", arXiv 2406.08464). A linearized model whose adapters were not merged writes as the
    pretrained one that it came from, on the same weights; any other writes as it is.

    Args:
        model: a causal LM; stays as it is.
        tokenizer: its tokenizer.
        tokens: how many are to be sampled.
        out: a file of JSON lines that every batch is appended to as soon as it is drawn. What it holds of the same
            draw already is read and continued, and the rows are those of a draw that was never interrupted.
        length: tokens of a row at most.
        batch: rows that are sampled at once.
        chat: from 0 to 1; None is half of the batches where the tokenizer has a chat template, otherwise none.
        temperature: of sampling, from the whole vocabulary.
        seed: every batch has one of its own, made from it.

    Returns:
        Rows with `text`, or with `messages`, in the order in which they were drawn.

    Raises:
        ValueError: an argument out of range, a share of conversations without a chat template, a file that holds
            something else or another draw, or a model that says nothing.
    """
    _check(tokens, length, batch, chat, temperature)
    if not isinstance(model, PreTrainedModel):
        fail("model", "a causal LM of transformers, adapters merged first", type(model).__name__)
    if chat and not tokenizer.chat_template:
        fail("chat", "0 for a tokenizer without a chat template", chat)
    share = (0.5 if tokenizer.chat_template else 0.0) if chat is None else float(chat)
    model = original(model) if isinstance(model, LigerMixin) and not is_tuned(model) else model
    told = dict(length=length, batch=batch, chat=share, temperature=temperature, seed=seed, model=fingerprint(model))
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    path, rows, drawn, number, silent = None if out is None else Path(out), [], 0, 0, 0
    held = {} if path is None else _held(path, name)
    # The model's own settings may penalise repetition.
    author = _Author(without_settings(model), tokenizer, length, batch, temperature, input_device(model))
    bar = tqdm(total=tokens, desc="Drawing text", leave=False)
    while drawn < tokens:
        found = held.get(number)
        if found is None:
            # So that conversations are spread evenly.
            chatting = int((number + 1) * share) > int(number * share)
            found = [{"draw": name, "number": number, **row} for row in author.batch_of(chatting, seed, number)]
            if path is not None and found:
                _append(path, found)
        new = sum(row["tokens"] for row in found)
        silent = 0 if new else silent + 1
        if silent == _SILENT:
            fail("model", "one that says something", f"{_SILENT} batches without a token")
        rows, drawn, number = rows + found, drawn + new, number + 1
        bar.update(new)
    bar.close()
    return [{key: row[key] for key in ("text", "messages") if key in row} for row in rows]


def _check(tokens: int, length: int, batch: int, chat: float | None, temperature: float) -> None:
    check_positive("tokens", tokens)
    check_positive("length", length, 8)
    check_positive("batch", batch)
    if chat is not None and (isinstance(chat, bool) or not isinstance(chat, (int, float)) or not 0 <= chat <= 1):
        fail("chat", "a share from 0 to 1", repr(chat))
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < 100:
        fail("temperature", "a number > 0", repr(temperature))


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """A batch of rows, behind which an empty line says that it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _held(path: Path, name: str) -> dict[int, list[dict[str, Any]]]:
    """The rows of all whole batches of this draw in a file, by number; a batch that was torn is cut off."""
    if not path.exists():
        return {}
    found: dict[int, list[dict[str, Any]]] = {}
    try:
        content = path.read_bytes()
        *batches, rest = content.decode(errors="replace").split("\n\n")
        for line in (line for batch in batches for line in batch.split("\n")):
            row = json.loads(line)
            if row["draw"] != name:
                raise ValueError
            found.setdefault(row["number"], []).append(row)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"out: expected rows of this very draw in {path}, found something else") from error
    begun = json.dumps({"draw": name})[:-1]
    if not rest.startswith(begun[: len(rest)]):
        fail("out", f"rows of this very draw in {path}", "something else")
    if rest:
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n\n") + 2 if batches else 0)
    return found


class _Author(NamedTuple):
    """A model that writes, and how."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    length: int
    batch: int
    temperature: float
    device: torch.device

    def batch_of(self, chatting: bool, seed: int, number: int) -> list[dict[str, Any]]:
        """Rows of the batch with this number, whatever was drawn before it."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big"))
            return self.conversations() if chatting else self.texts()

    def texts(self) -> list[dict[str, Any]]:
        before = framing(self.tokenizer)[0]
        first = self.tokenizer.bos_token_id
        start = [cast(int, first)] if not before and first is not None else before
        rows = [start or [self._any()] for _ in range(self.batch)]
        written = self._continued(rows, self.length - len(rows[0]), self._ends())
        whole = [part if start else row + part for row, part in zip(rows, written, strict=True)]
        return [dict(text=self._say(ids), tokens=len(ids)) for ids in whole if self._say(ids).strip()]

    def conversations(self) -> list[dict[str, Any]]:
        before, behind = self._template()
        ends = self._ends() + behind[:1]
        room = max(2, min(self.length // _QUESTION, self.length - len(before) - len(behind)))
        asked = self._continued([before] * self.batch, room, ends)
        said = [self._say(ids).strip() for ids in asked]
        talks = [([{"role": "user", "content": text}], len(ids)) for text, ids in zip(said, asked, strict=True) if text]
        if not talks:
            return []
        prompts = [chat_ids(self.tokenizer, talk, add_generation_prompt=True) for talk, _ in talks]
        room = max(2, self.length - max(map(len, prompts)))
        rows = []
        for (talk, count), ids in zip(talks, self._continued(prompts, room, ends), strict=True):
            if answer := self._say(ids).strip():
                messages = [*talk, {"role": "assistant", "content": answer}]
                rows.append(dict(messages=messages, tokens=count + len(ids)))
        return rows

    def _template(self) -> tuple[list[int], list[int]]:
        """The token ids that the template puts before what a user says, and those behind it."""
        messages = [{"role": "user", "content": _SAID}]
        parts = rendered(self.tokenizer, messages).split(_SAID)
        if len(parts) != 2:
            fail("chat", "a chat template that repeats what a user says once", f"{len(parts) - 1} times")
        before, behind = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        return once_before(before, framing(self.tokenizer)[0]) or [self._any()], behind

    def _any(self) -> int:
        return int(torch.randint(len(self.tokenizer), ()))

    def _ends(self) -> list[int]:
        own = self.model.config.eos_token_id
        ends = [self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        return [x for x in dict.fromkeys(ends) if isinstance(x, int)]

    def _say(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))

    def _continued(self, rows: list[list[int]], room: int, ends: list[int]) -> list[list[int]]:
        """What the model samples behind each row, up to one of the ends."""
        width, pad = max(map(len, rows)), (self.tokenizer.pad_token_id or 0)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(width, device=self.device) >= width - lengths[:, None]
        settings = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=room,
            eos_token_id=ends or None,
            pad_token_id=pad,
        )
        new = continued(self.model, ids, shown=mask.long(), generation_config=settings)[:, width:].tolist()
        return [row[: next((i for i, x in enumerate(row) if x in ends), len(row))] for row in new]
