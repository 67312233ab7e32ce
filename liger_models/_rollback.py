"""Tokens taken back from a constant-size cache: a state from before them, and what the layer was given since.

Shapes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from liger_layers import LigerState, MemoryState
from liger_ops.errors import fail

State = LigerState | MemoryState | None
# What a layer makes of what it is given and a state: y [B,N,hidden] and the state after.
Attend = Callable[["Given", State], tuple[torch.Tensor, Any]]
# Tokens that transformers may take back where it does not say how many it will try; a call of more may be taken back
# as a whole, but for the first.
AT_LEAST = 64


class Given(NamedTuple):
    """Inputs of a layer: x [B,N,hidden], cos and sin [B or 1,N,D] or None, mask [B,N] or None where all are tokens."""

    x: torch.Tensor
    tables: tuple[torch.Tensor, ...] | None
    mask: torch.Tensor | None

    @property
    def tokens(self) -> int:
        return self.x.shape[1]

    def cut(self, start: int, stop: int) -> Given:
        """Copies of the tokens from start to stop: a view would keep all alive."""
        return self.map(lambda x: x[:, start:stop].clone())

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Given:
        tables = None if self.tables is None else tuple(map(function, self.tables))
        return Given(function(self.x), tables, None if self.mask is None else function(self.mask))

    def before(self, later: Given) -> Given:
        """These tokens, then later ones."""
        tables, mask, both = None, None, (self, later)
        if self.tables is not None and later.tables is not None:
            rows = max(len(t) for given in both for t in (given.tables or ()))
            pairs = zip(self.tables, later.tables, strict=True)
            tables = tuple(torch.cat([t.expand(rows, -1, -1) for t in pair], 1) for pair in pairs)
        if self.mask is not None or later.mask is not None:
            masks = [torch.ones_like(g.x[..., 0], dtype=torch.bool) if g.mask is None else g.mask for g in both]
            mask = torch.cat(masks, 1)
        return Given(torch.cat([self.x, later.x], 1), tables, mask)


class Past:
    """What takes a layer back: its state `base` of some tokens ago, what it was `given` since, and a state on the way.

    At least `limit` tokens can be taken back, and fewer than four times as many are held. With `growing` also all since
    somebody took back some, and said so.
    """

    def __init__(self, limit: int, growing: bool = False):
        self.limit, self.growing, self.since = limit, growing, 0
        self.base: State = None
        self.given: Given | None = None
        self.middle: tuple[State, int] | None = None
        # Whether the layer's state is the base, and what was given since has to be given again.
        self.again = False

    @property
    def held(self) -> int:
        """How many tokens can be taken back."""
        return 0 if self.given is None else self.given.tokens

    def take_back(self, tokens: int) -> bool:
        """Forget the last tokens; whether the layer's state is the base from now on."""
        self.since = 0
        if not tokens:
            return False
        if tokens > self.held or self.given is None:
            fail("crop", f"at most {self.held} tokens to take back (make_cache(rollback=...))", tokens)
        left = self.held - tokens
        self.given = self.given.cut(0, left) if left else None
        if self.middle is not None and self.middle[1] > left:
            self.middle = None
        self.again = left > 0
        return True

    def run(self, attend: Attend, given: Given, state: State, first: bool) -> tuple[torch.Tensor, Any]:
        """What attend(given, state) is, behind what has to be given again; first: nothing was given before."""
        T = given.tokens
        whole = self.given.before(given) if self.again and self.given is not None else given
        self.since += 0 if first else T
        limit = max(self.limit, self.since) if self.growing else self.limit
        if whole.tokens > limit:
            cut = whole.tokens - limit
            y, self.base = attend(whole.cut(0, cut), state)
            self.given, self.middle = whole.cut(cut, whole.tokens), None
            last, after = attend(self.given, self.base)
            y = torch.cat([y, last], 1)
        else:
            y, after = attend(whole, state)
            if self.again or self.given is None:
                self.base, self.given, self.middle = state, whole.cut(0, whole.tokens), None
            else:
                self.given = self.given.before(given)
            self._advance(after, limit)
        self.again = False
        return y[:, y.shape[1] - T :], after

    def _advance(self, after: State, limit: int) -> None:
        """Let the state on the way be the base, once enough tokens were given behind it."""
        assert self.given is not None
        if self.middle is not None and self.held - self.middle[1] >= limit:
            self.base, seen = self.middle
            self.given, self.middle = self.given.cut(seen, self.held), None
        if self.middle is None and self.held >= limit:
            self.middle = after, self.held

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As `map` of a state, of all that is held."""
        self.base = None if self.base is None else self.base.map(function)
        if self.given is not None:
            rows = len(self.given.x)
            # Tables may be one for all rows.
            self.given = self.given.map(lambda x: function(x if len(x) == rows else x.expand(rows, -1, -1)))
        if self.middle is not None and self.middle[0] is not None:
            self.middle = self.middle[0].map(function), self.middle[1]

    def nbytes(self) -> int:
        states = [x for x in (self.base, None if self.middle is None else self.middle[0]) if x is not None]
        parts = [] if self.given is None else [self.given.x, *(self.given.tables or ())]
        return sum(x.nbytes() for x in states) + sum(x.nbytes for x in parts)
