"""The window of a layer: the last tokens and the first ones, which stay exact.

Shapes: B batch, T time, S columns at hand, HQ query heads, H key/value heads, D head width, W window, P sinks.
"""

from typing import NamedTuple

import torch

from liger_layers._padding import Ranks, close_ranks
from liger_layers._state import LigerState, Origin
from liger_ops import sliding_window_attention
from liger_ops.errors import check_factor, check_window


class Columns(NamedTuple):
    """What queries may look at: those kept from before, then the new ones; and where padding went, if there was any."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    visible: torch.Tensor
    raw: torch.Tensor | None
    ranks: Ranks | None


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

    def shapes(self, batch: int, heads: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of what a state keeps for it."""
        slots = self.sinks + self.size
        near = (batch, slots, heads, width)
        return dict(k=near, v=near, visible=(batch, slots))

    def gather(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        state: LigerState,
        raw: torch.Tensor | None = None,
    ) -> Columns:
        """Rotated q [B,T,HQ,D] and k [B,T,H,D], v [B,T,H,D] and unrotated keys, behind those that the state keeps.

        Tokens close ranks over padding, so that the window counts tokens.
        """
        visible = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
        visible = torch.cat([state.visible, visible], 1)
        k, v = torch.cat([state.k, k], 1), torch.cat([state.v, v], 1)
        raw = None if raw is None else torch.cat([state.raw, raw], 1)
        if mask is None:
            return Columns(q, k, v, visible, raw, None)
        ranks = close_ranks(mask, self.size)
        k, v, visible = (ranks.columns(x, self.sinks) for x in (k, v, visible))
        return Columns(ranks.queries(q), k, v, visible, None if raw is None else ranks.columns(raw), ranks)

    def attend(self, at: Columns) -> torch.Tensor:
        """Exact softmax over the window and the sinks alone: o [B,T,HQ,D], behind padding as the queries are."""
        near = dict(visible=at.visible, softcap=self.softcap)
        return sliding_window_attention(at.q, at.k, at.v, self.size, self.sinks, self.scale, **near)

    def keep(self, at: Columns) -> dict[str, torch.Tensor]:
        """The first P visible columns of each row and the last W; a sink still inside the window shows once."""
        S, P, visible = at.visible.shape[1], self.sinks, at.visible
        columns = torch.arange(S, device=visible.device)
        tail = slice(S - self.size, S)
        if not P:
            # Copies: a view would keep the whole prompt alive.
            return dict(k=at.k[:, tail].clone(), v=at.v[:, tail].clone(), visible=visible[:, tail].clone())
        first = torch.where(visible, columns, S).topk(P, dim=1, largest=False, sorted=True).values
        last = first.masked_fill(first == S, -1).amax(1, keepdim=True)
        index = first.clamp(max=S - 1)[:, :, None, None].expand(-1, -1, *at.k.shape[2:])
        k, v = (torch.cat([x.gather(1, index), x[:, tail]], 1) for x in (at.k, at.v))
        return dict(k=k, v=v, visible=torch.cat([first < S, visible[:, tail] & (columns[tail] > last)], 1))
