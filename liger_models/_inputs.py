"""What a call says of its tokens, checked at the door: which are shown, where they stand, what a cache holds of them.

Shapes: B batch, T columns at hand, S columns seen before. A column holds a token that is shown, or padding.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel, PreTrainedModel

from liger_ops.documents import Documents
from liger_ops.errors import fail

# The keyword of every forward that takes a cache and of outputs that return one: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
# What a decoder must take by name for its padding and positions to be known.
_NEEDED = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache", CACHE}


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.device


def check_ids(model: PreTrainedModel, rows: Iterable[torch.Tensor]) -> None:
    """ValueError for token ids of a tokenizer that has more of them than a model has embeddings."""
    known = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    if (most := max((int(row.max()) for row in rows if row.numel()), default=0)) >= known:
        fail("tokenizer", f"ids below the model's {known}", most)


def argument_names(decoder: nn.Module) -> tuple[str, ...]:
    """Names of a decoder's arguments in order; TypeError if it is none that this package knows how to speak to."""
    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    if missing := sorted(_NEEDED - set(names)):
        kind, needed = type(decoder).__name__, ", ".join(sorted(_NEEDED))
        raise TypeError(f"{kind}: expected arguments {needed}, found no {missing[0]}")
    return names


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name; ValueError for a mask or positions that it does not read."""
    refuse_unread({name: value for name, value in kwargs.items() if name not in names})
    return {**dict(zip(names, args, strict=False)), **kwargs}


def refuse_unread(others: Mapping[str, Any]) -> None:
    """ValueError for a mask or positions among arguments that nobody reads."""
    for name, value in others.items():
        if value is not None and ("mask" in name or "position" in name):
            fail(name, "attention_mask or position_ids", "an argument that is not read")


def require(holds: torch.Tensor, name: str, expected: str, given: str | Callable[[], str]) -> None:
    """ValueError unless the condition [] holds; in a compiled graph a RuntimeError, which cannot ask what was given."""
    if torch.compiler.is_compiling():
        # Missing in torch's stubs.
        assert_async = torch._assert_async  # type: ignore
        assert_async(holds, f"{name}: expected {expected}, got {given if isinstance(given, str) else 'others'}")
    elif not holds:
        fail(name, expected, given if isinstance(given, str) else given())


def read_mask(mask: object, batch: int, tokens: int, seen: int, device: torch.device) -> torch.Tensor | None:
    """attention_mask [B,S+T] as bool on the device, true where a column is shown; None if there is none."""
    if mask is None:
        return None
    # The text only where it is needed: a compiler would make a graph for each number in it.
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        kind = f"a prepared pattern {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        fail("attention_mask", f"[{batch}, {seen + tokens}], 1 where a column is shown", kind)
    if mask.shape[0] != batch or mask.shape[1] != seen + tokens:
        more = f"; {seen} of the columns are in the cache" if seen else ""
        expected = f"[batch, tokens] = [{batch}, {seen + tokens}], 1 where a column is shown{more}"
        fail("attention_mask", expected, list(mask.shape))
    if mask.dtype != torch.bool:
        require(((mask == 0) | (mask == 1)).all(), "attention_mask", "numbers 0 and 1", "others")
    return mask.to(device=device, dtype=torch.bool)


def shown_columns(mask: torch.Tensor | None, seen: int) -> torch.Tensor | None:
    """Of mask [B,S+T], that of the columns at hand [B,T]; None where it is known that all of them are shown."""
    shown = None if mask is None else mask[:, seen:]
    return None if shown is not None and not torch.compiler.is_compiling() and shown.all() else shown


def find_documents(
    position: torch.Tensor | None,
    mask: torch.Tensor | None,
    others: Mapping[str, Any],
    shape: tuple[int, int],
    device: torch.device,
) -> Documents | None:
    """Documents that share rows of a shape (B, T); None where each row is one.

    Positions [B or 1,T] that start again tell so, wherever mask [B,T] shows their tokens, or the other arguments by
    which transformers bounds documents: cu_seq_lens_q [D+1], of all rows one behind the other, and seq_idx [B,T].
    """
    bounds, index = others.get("cu_seq_lens_q"), others.get("seq_idx")
    flat = position if position is not None and position.ndim == 2 and position.shape[1] > 1 else None
    starts = None if flat is None else _starts(flat, mask)
    if torch.compiler.is_compiling():
        _require_one(starts, bounds, index)
        return None
    again = starts is not None and bool(starts.any())
    if bounds is None and index is None and not again:
        return None
    begins = torch.zeros(shape, dtype=torch.bool, device=device)
    begins[:, :1] = True
    if bounds is not None:
        _check_bounds(bounds, begins.numel())
        inside = bounds[bounds < begins.numel()].long().to(device)
        begins.view(-1)[inside] = True
    if index is not None:
        if not isinstance(index, torch.Tensor) or index.shape != shape:
            given = list(index.shape) if isinstance(index, torch.Tensor) else type(index).__name__
            fail("seq_idx", f"integers {list(shape)}", given)
        begins[:, 1:] |= (index[:, 1:] != index[:, :-1]).to(device)
    if starts is not None and again:
        starts = starts.to(device).expand(shape)
        if (bounds is not None or index is not None) and (starts & ~begins).any():
            name = "seq_idx" if bounds is None else "cu_seq_lens_q"
            fail("position_ids", f"positions that go on in a document of {name}", "some that start again inside")
        begins |= starts
    if not begins[:, 1:].any():
        return None
    ends = torch.full((1,), begins.numel(), device=device)
    documents = Documents.of(torch.cat([begins.view(-1).nonzero().squeeze(1), ends]), mask)
    if flat is not None and documents.groups:
        first = torch.cat([rows[:, 0] for rows in documents.groups])
        at = flat.expand(shape).reshape(-1).to(device)[first]
        if at.any():
            fail("position_ids", "0 where each of several documents in a row begins", int(at.max()))
    return documents


def _check_bounds(bounds: object, places: int) -> None:
    given = bounds.tolist() if isinstance(bounds, torch.Tensor) and bounds.ndim == 1 else []
    rising = all(a <= b for a, b in itertools.pairwise(given))
    if not given or given[0] != 0 or given[-1] != places or not rising or any(isinstance(x, float) for x in given):
        fail("cu_seq_lens_q", f"integer bounds that rise from 0 to {places}", given or type(bounds).__name__)


def _starts(position: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Where positions [B or 1,T] are no further than that of the token before: [B or 1,T]."""
    if mask is None:
        return F.pad(position[:, 1:] <= position[:, :-1], (1, 0))
    position = position.expand(mask.shape)
    column = torch.arange(mask.shape[1], device=mask.device)
    # Of every column the last token before it.
    last = F.pad(torch.where(mask, column, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    return mask & (last >= 0) & (position <= position.gather(1, last.clamp(min=0)))


def _require_one(starts: torch.Tensor | None, bounds: torch.Tensor | None, index: torch.Tensor | None) -> None:
    """An error for several documents in a row of a compiled graph, whose shapes their lengths may not decide about."""
    one = "one document per row in a compiled graph"
    if bounds is not None and len(bounds) > 2:
        fail("cu_seq_lens_q", one, "bounds of several")
    if index is not None:
        require((index == index[:, :1]).all(), "seq_idx", one, "bounds of several")
    if starts is not None:
        require(~starts.any(), "position_ids", one, "positions that start again")


def read_positions(position: object, batch: int, tokens: int) -> torch.Tensor | None:
    """position_ids as they are, [B or 1,T] where a family has one position per token, or None."""
    if position is None:
        return None
    if (
        not isinstance(position, torch.Tensor)
        or position.is_floating_point()
        or position.shape[-1] != tokens
        or position.shape[0] not in (1, batch)
    ):
        given = list(position.shape) if isinstance(position, torch.Tensor) else type(position).__name__
        fail("position_ids", f"integers [{batch} or 1, {tokens}]", given)
    return position


def token_positions(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Of mask [B,S+T], how many shown tokens stand before each of the last T columns: [B,T]."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - tokens :]


class Account(NamedTuple):
    """What a cache has taken in, in constant size: sums of hashes over shown columns [B], of the columns and of the
    tokens in them. tokens is None once embeddings were given instead of ids."""

    columns: torch.Tensor
    tokens: torch.Tensor | None

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Account:
        nothing = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(nothing, nothing)

    def map(self, function) -> Account:
        return Account(function(self.columns), None if self.tokens is None else function(self.tokens))

    def add(self, first: int, shown: torch.Tensor, ids: torch.Tensor | None, taken: bool = True) -> Account:
        """The account after columns from `first` on, shown [B,T], that hold ids [B,T]; None: embeddings.

        taken=False is the account before them.
        """
        sign = 1 if taken else -1
        column = scattered(torch.arange(first, first + shown.shape[1], device=shown.device))
        columns = self.columns.to(shown.device) + sign * (shown * column).sum(1)
        if ids is None or self.tokens is None:
            return Account(columns, None)
        return Account(columns, self.tokens.to(shown.device) + sign * (shown * scattered(column + ids)).sum(1))


def scattered(x: torch.Tensor) -> torch.Tensor:
    """Integers far apart from integers close together, 0 included (SplitMix64, Steele et al. 2014)."""
    x = x - 0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
