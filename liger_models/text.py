"""Text in, blocks of token ids out; and the text that the demonstration uses."""

from __future__ import annotations

from pydoc_data import topics
from typing import Any, cast

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from liger_models._templates import bounded, rendered
from liger_ops.errors import fail


def standard_text() -> tuple[str, str]:
    """The standard library's help topics, sorted by name: (training text, every eighth topic held out)."""
    names = sorted(topics.topics)

    def join(chosen: list[str]) -> str:
        return "\n\n".join(topics.topics[name] for name in chosen)

    return join([n for i, n in enumerate(names) if i % 8]), join(names[::8])


def hold_out(text: str) -> tuple[str, str]:
    """Split a user's text: (its first seven eighths, the last eighth)."""
    cut = len(text) * 7 // 8
    return text[:cut], text[cut:]


def find_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer under a model's name, if there is one."""
    try:
        return AutoTokenizer.from_pretrained(model.config.name_or_path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError, LookupError, AttributeError, RuntimeError):
        # Whatever keeps it from being read: there is something else to be done without one.
        return None


def framing(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer by itself puts before and behind a text; each may be empty."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text of any length, without what the tokenizer would put around it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    finally:
        logging.set_verbosity(verbosity)
    before, after = framing(tokenizer)
    # A text may hold them already.
    ids = ids[len(before) :] if before and ids[: len(before)] == before else ids
    return ids[: -len(after)] if after and ids[-len(after) :] == after else ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """Token ids of a templated conversation; what the tokenizer puts before a text stands before it exactly once.

    Options go to apply_chat_template. ValueError if there is no template or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        fail("messages", "a tokenizer with a chat template", "one without")
    ids = tokenizer(rendered(tokenizer, messages, **options), add_special_tokens=False)["input_ids"]
    return once_before(ids, framing(tokenizer)[0])


def marked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[bool]:
    """For each token id of a conversation, by a template with generation markers, whether the assistant says it."""
    # Which says that it is not too long; tokens are not made within a limit of memory, where their library would abort.
    rendered(tokenizer, messages, tools=tools)
    with bounded(tokenizer, tools):
        options: dict[str, Any] = dict(return_dict=True, return_assistant_tokens_mask=True, tools=tools)
        found = cast(BatchEncoding, tokenizer.apply_chat_template(messages, **options))
    return [bool(x) for x in cast(list[int], found["assistant_masks"])]


def once_before(ids: list[int], before: list[int]) -> list[int]:
    """ids with `before` at their start exactly once."""
    while before and ids[: len(before)] == before:
        ids = ids[len(before) :]
    return before + ids


def cut(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[list[int]]:
    """A text in rows of at most `length` token ids, the last of which may be shorter, empty for an empty text.

    Each row starts with what the tokenizer puts before a text; what it puts behind one follows the last token.
    """
    before, after = framing(tokenizer)
    if length < max(2, len(before) + 1):
        fail("length", f"blocks of at least {max(2, len(before) + 1)} tokens", length)
    ids, step = [*token_ids(tokenizer, text), *after], length - len(before)
    return [before + ids[start : start + step] for start in range(0, len(ids), step)]


def to_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, name: str = "text") -> torch.Tensor:
    """Token ids [n, length], each row begun as the tokenizer begins a text; the rest that fills no block is dropped.

    ValueError if there is not one block.
    """
    rows = cut(tokenizer, text, length)
    full = [row for row in rows if len(row) == length]
    if not full:
        fail(name, f"at least one block of {length} tokens", f"{sum(map(len, rows))} tokens")
    return torch.tensor(full)
