"""Tokens close ranks over padding, wherever it stands: a window counts tokens, not columns.

Shapes: B batch, T columns at hand, W window, P sinks.
"""

from typing import NamedTuple

import torch


class Ranks(NamedTuple):
    """An order of the W + T columns of a window and what follows it: padding first, then tokens as they came.

    order [B,W+T] is the column at each place, place [B,T] that of each column at hand, counted from W on.
    """

    order: torch.Tensor
    place: torch.Tensor

    def columns(self, x: torch.Tensor, sinks: int = 0) -> torch.Tensor:
        """x [B,P+W+T,...] in order; the P sinks before the window stay."""
        first = torch.arange(sinks, device=x.device).expand(len(x), sinks)
        return _take(x, torch.cat([first, self.order + sinks], 1))

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,...] in the order of the last T places; some of those belong to the window, and hold nothing meant."""
        T = x.shape[1]
        return _take(x, (self.order[:, self.order.shape[1] - T :] - self.order.shape[1] + T).clamp(min=0))

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,...] of the last T places -> of the columns at hand; those of padding hold nothing meant."""
        return _take(x, self.place)


def close_ranks(mask: torch.Tensor, window: int) -> Ranks:
    """The order for mask [B,T], true at tokens, behind a window whose own padding stands first already."""
    shown = torch.cat([mask.new_ones(len(mask), window), mask], 1)
    padding = (~shown).cumsum(1)
    place = torch.where(shown, padding[:, -1:] + shown.cumsum(1), padding) - 1
    columns = torch.arange(shown.shape[1], device=mask.device).expand_as(place)
    order = torch.empty_like(place).scatter(1, place, columns)
    return Ranks(order, (place[:, window:] - window).clamp(min=0))


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B,S,...] at index [B,N] of each row -> [B,N,...]."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
