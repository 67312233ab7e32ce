"""Perplexity, as a whole and by position, with each branch switched off in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liger_layers import Mix
from liger_models._inputs import input_device
from liger_models.data import IGNORED, Rows, documents, to_rows
from liger_models.generation import base_of
from liger_models.modeling import LigerMixin
from liger_models.retrieval import retrieval
from liger_ops.errors import fail


def perplexity(model: PreTrainedModel, blocks: torch.Tensor | Rows, description: str = "Perplexity") -> float:
    """exp of the mean next-token loss over token ids [n, length] or rows with labels, one row at a time.

    Every token with a label counts alike, however long its row.
    """
    return math.exp(mean_loss(model, blocks, description))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: torch.Tensor | Rows, description: str = "Evaluating") -> float:
    """Mean next-token loss over the tokens with a label, the first of a row aside; as `perplexity` takes them."""
    model.eval()
    device = input_device(model)
    rows = rows if isinstance(rows, Rows) else Rows(tuple(rows), tuple(rows))
    total, count = 0.0, 0
    for row in tqdm(rows, desc=description, leave=False):
        labels = row["labels"][1:]
        asked = int((labels != IGNORED).sum())
        if asked:
            total += _losses(model, row["input_ids"][None].to(device), labels.to(device)).sum().item()
            count += asked
    if not count:
        fail("blocks", "rows with a token to predict", "none")
    return total / count


def _losses(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses [T-1] of ids [1,T] on the labels [T-1] of all but the first; the model's own may hold its routers'."""
    logits = model(ids, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


@contextmanager
def without_recurrence(model: PreTrainedModel):
    """Take every layer's mix, and that of its routed memories, for zero for a while: the window branch alone."""
    hooks = [m.register_forward_hook(_nothing) for m in model.modules() if isinstance(m, Mix)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nothing(module: Mix, args: tuple, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Any,
    *,
    length: int = 512,
    max_blocks: int | None = None,
    contexts: Sequence[int] = (),
    depths: int = 8,
    keys: int = 4,
) -> dict[str, float]:
    """Held-out figures of a model on text, in rows of at most `length` tokens.

    text may be anything that `finetune` takes; of conversations and completions only what the model would say counts.

    Returns perplexity and tokens, those with a label; for a linearized model also perplexity_window_only, with the
    recurrence switched off: the closer the two, the less the recurrence does. For each context, a number of tokens of
    text, also passkey_N, the share of keys found that are hidden in it one at a time, each at one of `depths`, and
    multikey_N, the same among `keys` of them. ValueError if the text cannot be read, or is shorter than a block or a
    context.
    """
    if max_blocks is not None and max_blocks < 1:
        fail("max_blocks", "at least 1", max_blocks)
    rows = to_rows(tokenizer, text, length).first(max_blocks)
    filler = documents(text) if contexts else ""
    training, found = model.training, {}
    # First, and the longest before the others: a context that the text cannot fill is to be known at once.
    for context in sorted(contexts, reverse=True):
        found[f"multikey_{context}"] = retrieval(model, tokenizer, filler, context, depths=depths, keys=keys)
        found[f"passkey_{context}"] = retrieval(model, tokenizer, filler, context, depths=depths)
    result = {"perplexity": perplexity(model, rows), "tokens": rows.tokens}
    if isinstance(base_of(model), LigerMixin):
        with without_recurrence(model):
            result["perplexity_window_only"] = perplexity(model, rows, "Perplexity, window only")
    model.train(training)
    return result | dict(reversed(found.items()))


@torch.no_grad()
def perplexity_by_position(model: PreTrainedModel, blocks: torch.Tensor, first: int = 64) -> list[dict[str, float]]:
    """Perplexity over token ids [n, length] by how many tokens of its block a prediction has seen.

    Bins [0, first), [first, 2 first) and then twice as wide each, up to length: rows with start, stop, perplexity, and
    tokens, the number of predictions. The tokens' mean of log(perplexity) is the log of `perplexity`.
    """
    model.eval()
    device = input_device(model)
    rows = tqdm(blocks, desc="Perplexity by position", leave=False)
    losses = torch.stack([_losses(model, row[None].to(device), row[1:].to(device)).cpu() for row in rows])
    found, start, stop = [], 0, first
    while start < losses.shape[1]:
        part = losses[:, start:stop]
        found.append(
            {
                "start": start,
                "stop": min(stop, blocks.shape[1]),
                "perplexity": part.mean(dtype=torch.float64).exp().item(),
                "tokens": part.numel(),
            }
        )
        start, stop = stop, 2 * stop
    return found
