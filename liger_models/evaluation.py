"""Perplexity, as a whole and by position, with each branch switched off in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from liger_models._inputs import check_ids, input_device
from liger_models.data import IGNORED, Rows, documents, to_rows
from liger_models.generation import base_of, evaluating
from liger_models.modeling import LigerMixin
from liger_models.retrieval import check_tokenizer, retrieval
from liger_models.variants import distinct_variants, window_alone, without_recurrence
from liger_ops.errors import fail

# Of which a perplexity is still a number.
_MOST = 700.0


def perplexity(model: PreTrainedModel, blocks: torch.Tensor | Rows, description: str = "Perplexity") -> float:
    """exp of the mean next-token loss over token ids [n, length] or rows with labels, one row at a time.

    Every token with a label counts alike, however long its row. ValueError for blocks of another shape.
    """
    return math.exp(mean_loss(model, blocks, description))


def mean_loss(model: PreTrainedModel, rows: torch.Tensor | Rows, description: str = "Evaluating") -> float:
    """Mean next-token loss over the tokens with a label, the first of a row aside; as `perplexity` takes them."""
    return position_losses(model, rows, description).mean()


class Losses(NamedTuple):
    """Sums of next-token losses [L-1] by position, float64, and of how many predictions [L-1] each is the sum."""

    sums: torch.Tensor
    counts: torch.Tensor

    def mean(self, start: int = 0, stop: int | None = None) -> float:
        """Of the predictions that have seen more than `start` tokens, and no more than `stop`; NaN where none has."""
        return (self.sums[start:stop].sum() / self.counts[start:stop].sum()).item()

    @property
    def predictions(self) -> int:
        return int(self.counts.sum())


@torch.no_grad()
def position_losses(model: PreTrainedModel, rows: torch.Tensor | Rows, description: str = "Evaluating") -> Losses:
    """Losses of a model by position over token ids [n, length] or rows with labels, one forward pass a row.

    ValueError for ids that the model does not know, or where their mean is no number, or too large for a perplexity.
    """
    rows = _rows(rows)
    check_ids(model, rows.ids)
    device = input_device(model)
    longest = max(map(len, rows.ids), default=1)
    found = Losses(torch.zeros(longest - 1, dtype=torch.float64), torch.zeros(longest - 1, dtype=torch.long))
    with evaluating(model):
        for row in tqdm(rows, desc=description, leave=False):
            labels = row["labels"][1:]
            asked = labels != IGNORED
            if asked.any():
                losses = _losses(model, row["input_ids"][None].to(device), labels.to(device))
                found.sums[: len(labels)] += losses.cpu().double()
                found.counts[: len(labels)] += asked
    if not found.predictions:
        fail("blocks", "rows with a token to predict", "none")
    if not found.mean() <= _MOST:
        fail("model", f"a loss of at most {_MOST:g} nats a token", f"{found.mean():g}; its weights may be damaged")
    return found


def _rows(blocks: torch.Tensor | Rows) -> Rows:
    if isinstance(blocks, Rows):
        return blocks
    if not isinstance(blocks, torch.Tensor) or blocks.ndim != 2 or blocks.is_floating_point():
        given = f"{blocks.dtype} {tuple(blocks.shape)}" if isinstance(blocks, torch.Tensor) else type(blocks).__name__
        fail("blocks", "token ids [n, length] or rows with labels", given)
    return Rows(tuple(blocks), tuple(blocks))


def _losses(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses [T-1] of ids [1,T] on the labels [T-1] of all but the first; the model's own may hold its routers'."""
    logits = model(ids, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")


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

    Returns perplexity and tokens, the predictions that it is of; for a linearized model also perplexity_window_only, of
    window and sinks alone, and, where tokens are recalled, perplexity_no_recurrence, of exact tokens alone: the closer
    that is to the perplexity, the less the recurrence does. For each context, a number of tokens of text, also
    passkey_N, the share of keys found that are hidden in it one at a time, each at one of `depths`, and multikey_N, the
    same among `keys` of them. `measure_variants` measures more, side by side. ValueError if the text cannot be read, or
    is shorter than a block or a context.
    """
    check_tokenizer(tokenizer)
    if max_blocks is not None and max_blocks < 1:
        fail("max_blocks", "at least 1", max_blocks)
    rows = to_rows(tokenizer, text, length).first(max_blocks)
    filler = documents(text) if contexts else ""
    found = {}
    with evaluating(model):
        # First, and the longest before the others: a context that the text cannot fill is to be known at once.
        for context in sorted(contexts, reverse=True):
            found[f"multikey_{context}"] = retrieval(model, tokenizer, filler, context, depths=depths, keys=keys)
            found[f"passkey_{context}"] = retrieval(model, tokenizer, filler, context, depths=depths)
        losses = position_losses(model, rows, "Perplexity")
        result = {"perplexity": math.exp(losses.mean()), "tokens": losses.predictions}
        if isinstance(base_of(model), LigerMixin):
            with window_alone(model):
                result["perplexity_window_only"] = perplexity(model, rows, "Perplexity, window only")
            if "no_recurrence" in distinct_variants(model):
                with without_recurrence(model):
                    result["perplexity_no_recurrence"] = perplexity(model, rows, "Perplexity, no recurrence")
    return result | dict(reversed(found.items()))


def perplexity_by_position(model: PreTrainedModel, blocks: torch.Tensor | Rows, first: int = 64) -> list[dict]:
    """Perplexity over token ids [n, length] or rows by how many tokens of its row a prediction has seen.

    Bins [0, first), [first, 2 first) and then twice as wide each, up to length: rows with start, stop, perplexity, and
    tokens, the number of predictions. The tokens' mean of log(perplexity) is the log of `perplexity`.
    """
    return binned(position_losses(model, blocks, "Perplexity by position"), first)


def binned(losses: Losses, first: int = 64) -> list[dict]:
    """The rows of `perplexity_by_position`; a bin without a prediction is left out."""
    found, start, stop, length = [], 0, first, len(losses.sums) + 1
    while start < length - 1:
        if tokens := int(losses.counts[start:stop].sum()):
            perplexity = math.exp(losses.mean(start, stop))
            found.append({"start": start, "stop": min(stop, length), "perplexity": perplexity, "tokens": tokens})
        start, stop = stop, 2 * stop
    return found
