"""Text in, blocks of token ids out; and the text that the demonstration uses."""

from __future__ import annotations

from pydoc_data import topics

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


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


def to_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, name: str = "text") -> torch.Tensor:
    """Token ids [n, length]; the rest that fills no block is dropped. ValueError if there is not one block."""
    if length < 2:
        raise ValueError(f"length: expected blocks of at least 2 tokens, got {length}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        ids = tokenizer(text)["input_ids"]
    finally:
        logging.set_verbosity(verbosity)
    count = len(ids) // length
    if not count:
        raise ValueError(f"{name}: expected at least one block of {length} tokens, got {len(ids)} tokens")
    return torch.tensor(ids[: count * length]).view(count, length)
