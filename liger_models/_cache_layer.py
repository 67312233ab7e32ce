"""One layer of a constant-size cache, and what it keeps account of.

Shapes: B batch, T columns at hand, S columns seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from liger_layers import LigerState, MemoryState
from liger_models._inputs import Account
from liger_models._rollback import AT_LEAST, Given, Past


class LigerCacheLayer(CacheLayerMixin):
    """One layer's state and the number of columns, padding included, that it has seen.

    The first such layer of a cache also keeps account of what was taken in: whether every column was `whole`, shown in
    all rows, the Account of those which were, what the model was `told` that filled it, and with which `source`, the
    name of its weights and what its mixes were told; and how many columns calls brought that `ended` well.
    """

    # Kept layers may slide or not, and masks take their size from the first layer of their own kind.
    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.told: dict[str, Any] | None = None
        self.past: Past | None = None
        self._forget()

    def _forget(self) -> None:
        self.state: LigerState | MemoryState | None = None
        self.account: Account | None = None
        self.source: tuple[str, list] | None = None
        # What account and whole become once this layer has taken in the columns at hand.
        self.pending: tuple[Account, bool] | None = None
        self.seen, self.ended, self.whole, self.is_initialized = 0, 0, True, False
        if self.past is not None:
            self.past = Past(self.past.limit, self.past.growing)
        # Of the last columns which were shown, [B,N], and their ids, None for embeddings: in the first layer alone.
        self.columns: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def run(
        self, attend: Callable, given: Given, state: LigerState | MemoryState | None, router_logits: list | None
    ) -> torch.Tensor:
        """What a layer makes of what it is given behind the state, y [B,T,hidden]; the state after is stored.

        attend(given, state, router_logits) returns y and the state after, and adds to the list.
        """
        T, told = given.tokens, None if router_logits is None else []
        if self.past is None:
            y, after = attend(given, state, router_logits)
        else:
            y, after = self.past.run(lambda g, s: attend(g, s, told), given, state, not self.seen)
        if told and router_logits is not None:
            # Of the tokens at hand, whatever was given again, and in how many parts.
            parts = [x.unflatten(0, (len(y), -1)) for x in told]
            router_logits.append(torch.cat(parts, 1)[:, -T:].flatten(0, 1))
        self.store(after, T)
        return y

    def remember(self, shown: torch.Tensor, ids: torch.Tensor | None) -> None:
        """Keep of the columns at hand what taking them back will want to know, and forget what nobody can take back."""
        assert self.past is not None
        self.columns.append((shown, ids))
        while sum(x.shape[1] for x, _ in self.columns[1:]) >= self.past.held + shown.shape[1]:
            del self.columns[0]

    def store(self, state: LigerState | MemoryState, tokens: int) -> None:
        # First, so that whoever is interrupted in between has not ended.
        self.seen += tokens
        self.state = state
        self.is_initialized = True
        if self.pending is not None:
            (self.account, self.whole), self.pending = self.pending, None

    def lazy_initialization(self, key_states, value_states) -> NoReturn:
        raise RuntimeError("a Liger layer keeps a state, not keys and values: it is filled by its own attention")

    def update(self, key_states, value_states, *args, **kwargs) -> NoReturn:
        self.lazy_initialization(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self._forget()

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back; transformers asks before it guesses ahead."""
        return self.past is not None

    def activate_past_recording(self) -> None:
        """Hold what is needed to take tokens back from now on; transformers asks for it where it guesses ahead."""
        if self.past is None:
            self.past = Past(AT_LEAST, growing=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns; a number above 0 is how many columns are to be left.

        ValueError for more than are held; RuntimeError for a cache that was not made for it.
        """
        if self.past is None:
            raise RuntimeError("crop: expected a cache of make_cache(config, rollback=...), got one that cannot forget")
        # transformers gives a tensor at times.
        remove = int(tokens_to_remove)
        tokens = -remove if remove <= 0 else max(self.seen - remove, 0)
        if self.past.take_back(tokens):
            self.state = self.past.base
        if self.account is not None and tokens:
            self._take_off(tokens)
        self.seen -= tokens
        self.ended = min(self.ended, self.seen)

    def _take_off(self, tokens: int) -> None:
        """The last columns off the account."""
        left, first = tokens, self.seen - tokens
        while left:
            shown, ids = self.columns.pop()
            n = min(left, shown.shape[1])
            cut = shown.shape[1] - n
            own = shown[:, cut:], None if ids is None else ids[:, cut:]
            assert self.account is not None
            self.account = self.account.add(first + left - n, *own, taken=False)
            if cut:
                self.columns.append((shown[:, :cut], None if ids is None else ids[:, :cut]))
            left -= n

    def _map(self, function) -> None:
        if self.past is not None:
            self.past.map(function)
            self.columns = [(function(x), None if y is None else function(y)) for x, y in self.columns]
        if self.state is not None:
            self.state = self.state.map(function)
        if self.account is not None:
            self.account = self.account.map(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """The layer moves its state to its own device when it reads it."""

    def nbytes(self) -> int:
        return (0 if self.state is None else self.state.nbytes()) + (0 if self.past is None else self.past.nbytes())
