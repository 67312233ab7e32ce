"""The window of a layer: the last tokens and the first ones, which stay exact.

Shapes: B batch, T time, S columns at hand, HQ query heads, H key/value heads, D head width, W window, P sinks.
"""

from typing import Any, NamedTuple

import torch

from liger_layers._padding import Ranks, close_ranks
from liger_layers._state import LigerState, Origin, Part
from liger_ops import sliding_window_attention
from liger_ops.errors import check_factor, check_window


class Columns(NamedTuple):
    """What queries may look at: those kept from before, then the new ones; and where padding went, if there was any.

    left is what waited for tokens to leave the window, [B,T,...] of those that do, each before the query at its place,
    by name: raw, their unrotated keys, and scores; and kept what a state remembers of all this.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    visible: torch.Tensor
    left: dict[str, torch.Tensor]
    ranks: Ranks | None
    kept: dict[str, Any]


class Window(NamedTuple):
    """How many of the last tokens and of the first stay exact, and how their scores are scaled and bounded."""

    size: int
    sinks: int
    scale: float | None = None
    softcap: float | None = None

    @property
    def origin(self) -> Origin:
        """What decides about a state."""
        return (("window", self.size), ("sinks", self.sinks))

    def check(self) -> None:
        check_window(self.size, self.sinks)
        check_factor("scale", self.scale, optional=True)
        check_factor("softcap", self.softcap, optional=True)

    def parts(self, heads: int, width: int) -> dict[str, Part]:
        """What a state keeps for it."""
        slots = self.sinks + self.size
        return dict(k=(slots, heads, width), v=(slots, heads, width), visible=(slots,))

    def gather(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        state: LigerState,
        **waiting: torch.Tensor,
    ) -> Columns:
        """Rotated q [B,T,HQ,D] and k [B,T,H,D], v [B,T,H,D], behind those that the state keeps, and so what is waiting.

        Tokens close ranks over padding, so that the window counts tokens. waiting: raw and scores [B,T,...], by the
        names that the state has for them.
        """
        # As the state was checked to be.
        assert state.k is not None and state.v is not None and state.visible is not None
        visible = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
        visible = torch.cat([state.visible, visible], 1)
        k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        waiting = {name: torch.cat([getattr(state, name), x], 1) for name, x in waiting.items()}
        ranks, T = None, q.shape[1]
        if mask is not None:
            ranks = close_ranks(mask, self.size)
            q = ranks.queries(q)
            k, v, visible = (ranks.columns(x, self.sinks) for x in (k, v, visible))
            waiting = {name: ranks.columns(x) for name, x in waiting.items()}
        kept = self._keep(k, v, visible) | {name: x[:, T:].clone() for name, x in waiting.items()}
        return Columns(q, k, v, visible, {name: x[:, :T] for name, x in waiting.items()}, ranks, kept)

    def attend(self, at: Columns) -> torch.Tensor:
        """Exact softmax over the window and the sinks alone: o [B,T,HQ,D], behind padding as the queries are."""
        return sliding_window_attention(
            at.q, at.k, at.v, self.size, self.sinks, self.scale, visible=at.visible, softcap=self.softcap
        )

    def _keep(self, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> dict[str, Any]:
        """The first P visible columns of each row and the last W; a sink still inside the window shows once."""
        S, P = visible.shape[1], self.sinks
        columns = torch.arange(S, device=visible.device)
        tail = slice(S - self.size, S)
        if not P:
            # Copies: a view would keep the whole prompt alive.
            return dict(k=k[:, tail].clone(), v=v[:, tail].clone(), visible=visible[:, tail].clone())
        first = torch.where(visible, columns, S).topk(P, dim=1, largest=False, sorted=True).values
        last = first.masked_fill(first == S, -1).amax(1, keepdim=True)
        index = first.clamp(max=S - 1)[:, :, None, None].expand(-1, -1, *k.shape[2:])
        k, v = (torch.cat([x.gather(1, index), x[:, tail]], 1) for x in (k, v))
        return dict(k=k, v=v, visible=torch.cat([first < S, visible[:, tail] & (columns[tail] > last)], 1))
