"""Sequences packed along time: all arithmetic on cu_seqlens but the kernels' own table of chunks.

Shapes: B batch, T time, H heads, N sequences.
"""

from collections.abc import Callable, Sequence

import torch

# A state is a tensor [N,...] or a tuple of them.
State = torch.Tensor | tuple[torch.Tensor, ...] | None


def _turned(state: State) -> State:
    if isinstance(state, tuple):
        return tuple(x.flip(0) for x in state)
    return state if state is None else state.flip(0)


def in_order(
    core: Callable[..., tuple[torch.Tensor, State]],
    tensors: Sequence[torch.Tensor | None],
    state: State,
    cu_seqlens: torch.Tensor | None,
    reverse: bool = False,
) -> tuple[torch.Tensor, State]:
    """core(*tensors [B,T,...], state, cu_seqlens) -> (o [B,T,...], state); reverse runs every sequence from its end."""
    cu_seqlens = cu_seqlens if cu_seqlens is None else cu_seqlens.to(tensors[0].device)
    if not reverse:
        return core(*tensors, state, cu_seqlens)
    tensors = [x if x is None else x.flip(1) for x in tensors]
    if cu_seqlens is None:
        o, state = core(*tensors, state, None)
        return o.flip(1), state
    o, state = core(*tensors, _turned(state), (cu_seqlens[-1] - cu_seqlens).flip(0))
    return o.flip(1), _turned(state)


def after_one(o: torch.Tensor, first: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """o [B,T,H,V] one token later, and first [N,H,V] where a sequence begins."""
    # A trace holds what has T - 1 rows for another case where that is 1: nothing here has.
    if cu_seqlens is None:
        return torch.cat([first.unsqueeze(1), o], 1)[:, :-1]
    # Empty sequences begin on a row that is cut off again.
    begin = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[:-1], o.shape[1]).long()
    later = torch.cat([o[:, :1], o], 1)
    return later.index_copy(1, begin, first.unsqueeze(0))[:, :-1]
