"""Sequences packed along time: all arithmetic on cu_seqlens but the kernels' own table of chunks.

Shapes: B batch, T time, H heads, N sequences.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

from liger_ops._backend import recurrence
from liger_ops._inputs import IN_TIME, RecurrenceInputs

# A state is a tensor [N,...], or a tuple of them, or None.
State = TypeVar("State")


def _turned(state: State) -> State:
    return tree_map(lambda x: x if x is None else x.flip(0), state)


def in_order(
    core: Callable[..., tuple[torch.Tensor, State]],
    tensors: Mapping[str, torch.Tensor | None],
    state: Any,
    cu_seqlens: torch.Tensor | None,
    reverse: bool = False,
) -> tuple[torch.Tensor, State]:
    """core(**tensors [B,T,...], state=, cu_seqlens=) -> (o, state); reverse runs every sequence from its end."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(next(x for x in tensors.values() if x is not None).device)
    if not reverse:
        return core(**tensors, state=state, cu_seqlens=cu_seqlens)
    tensors = {n: x if x is None else x.flip(1) for n, x in tensors.items()}
    if cu_seqlens is None:
        o, state = core(**tensors, state=state, cu_seqlens=None)
        return o.flip(1), state
    o, state = core(**tensors, state=_turned(state), cu_seqlens=(cu_seqlens[-1] - cu_seqlens).flip(0))
    return o.flip(1), _turned(state)


def run_in_order(x: RecurrenceInputs, reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrence`, of every sequence from its end if reverse."""
    if x.cu_seqlens is not None:
        x = x._replace(cu_seqlens=x.cu_seqlens.to(x.q.device))
    if not reverse:
        return recurrence(x)
    tensors = {n: getattr(x, n) for n in IN_TIME}
    return in_order(lambda **given: recurrence(x._replace(**given)), tensors, x.state, x.cu_seqlens, True)


def after_one(o: torch.Tensor, first: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """o [B,T,H,V] one token later, and first [N,H,V] where a sequence begins."""
    # A trace holds what has T - 1 rows for another case where that is 1: nothing here has.
    if cu_seqlens is None:
        return torch.cat([first.unsqueeze(1), o], 1)[:, :-1]
    # Empty sequences begin on a row that is cut off again.
    begin = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[:-1], o.shape[1]).long()
    later = torch.cat([o[:, :1], o], 1)
    return later.index_copy(1, begin, first.unsqueeze(0))[:, :-1]
