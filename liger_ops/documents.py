"""Documents one behind the other, seen as rows: no token of one knows of another.

Shapes: B batch, T time, P = B T places, D documents, N documents of a group, L the longest of them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from liger_ops.errors import check_cu_seqlens, fail

# Of documents side by side, how many times as long as the shortest the longest may be.
_UNEVEN = 2


class Documents(NamedTuple):
    """Bounds [D+1] of documents among the places of [B,T], and how they lie side by side in groups of like lengths.

    mask [1,P] marks real tokens, None where all are. groups hold for each row [N,L] the places of a document's tokens,
    its last one again where it has no more: it sees them all, and nobody reads what it sees. back [P] finds a place in
    what the groups have in a row.
    """

    bounds: torch.Tensor
    mask: torch.Tensor | None
    groups: tuple[torch.Tensor, ...]
    back: torch.Tensor

    @classmethod
    def of(cls, bounds: torch.Tensor, mask: torch.Tensor | None = None) -> "Documents":
        """bounds [D+1] rise from 0 to B T; mask [B,T] is true at tokens."""
        bounds, places = bounds.long(), int(bounds[-1])
        shown = torch.arange(places, device=bounds.device)
        if mask is not None:
            mask = mask.reshape(1, -1)
            shown = shown[mask[0]]
        starts = torch.searchsorted(shown, bounds)
        lengths = starts.diff()
        order = sorted((n, i) for i, n in enumerate(lengths.tolist()) if n)[::-1]
        back, groups, before = bounds.new_zeros(places), [], 0
        while order:
            longest = order[0][0]
            here = [i for n, i in order if _UNEVEN * n > longest]
            order = order[len(here) :]
            own = torch.tensor(here, device=bounds.device)
            column = torch.arange(longest, device=bounds.device)
            real = column < lengths[own, None]
            rows = shown[starts[own, None] + torch.minimum(column, lengths[own, None] - 1)]
            back[rows[real]] = before + real.flatten().nonzero().squeeze(1)
            groups.append(rows)
            before += rows.numel()
        return cls(bounds, mask, tuple(groups), back)

    def apart(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x [B,T,...] -> [N,L,...] of every group."""
        x = x.flatten(0, 1)
        return [x.index_select(0, rows.flatten()).unflatten(0, rows.shape) for rows in self.groups]

    def together(self, parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """[N,L,...] of every group -> [B,T,...] like x [B,T,...]; padding holds nothing meant."""
        if not parts:
            return torch.zeros_like(like)
        o = torch.cat([x.flatten(0, 1) for x in parts]).index_select(0, self.back)
        return o.unflatten(0, like.shape[:2])

    @property
    def positions(self) -> torch.Tensor:
        """Of every place how many tokens of its document stand before it: [1,P]."""
        shown = torch.ones_like(self.back) if self.mask is None else self.mask[0].long()
        before = torch.cat([shown.new_zeros(1), shown.cumsum(0)])
        place = torch.arange(len(shown), device=shown.device)
        first = self.bounds[torch.searchsorted(self.bounds, place, right=True) - 1]
        return (before[:-1] - before[first])[None]


def read_documents(
    cu_seqlens: torch.Tensor, x: torch.Tensor, refused: Mapping[str, object], mask: torch.Tensor | None = None
) -> Documents:
    """Documents of x [1,T,...] bounded by cu_seqlens [D+1]; mask [1,T] or None.

    ValueError for other bounds, for other batches, and for what is refused by name, where it is not None.
    """
    if torch.compiler.is_compiling():
        fail("cu_seqlens", "None in a compiled graph, whose shapes lengths would decide about", "bounds")
    check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    for name, given in refused.items():
        if given is not None:
            fail(name, "none beside cu_seqlens", type(given).__name__)
    return Documents.of(cu_seqlens.to(x.device), mask)
