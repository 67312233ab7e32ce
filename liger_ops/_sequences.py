"""Sequences packed along time: all arithmetic on cu_seqlens but the kernels' own table of chunks.

Shapes: B batch, T time, H heads, N sequences.
"""

import itertools
from collections.abc import Callable, Sequence

import torch

# A state is a tensor [N,...] or a tuple of them.
State = torch.Tensor | tuple[torch.Tensor, ...] | None


def _rows(state: State, n: int) -> State:
    if isinstance(state, tuple):
        return tuple(x[n : n + 1] for x in state)
    return state if state is None else state[n : n + 1]


def _join(states: list[State]) -> State:
    if isinstance(states[0], tuple):
        return tuple(torch.cat(x) for x in zip(*states, strict=True))
    return torch.cat(states)


def _turned(state: State) -> State:
    if isinstance(state, tuple):
        return tuple(x.flip(0) for x in state)
    return state if state is None else state.flip(0)


def over_sequences(
    core: Callable[..., tuple[torch.Tensor, State]],
    tensors: Sequence[torch.Tensor | None],
    state: State,
    bounds: list[int] | None,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, State]:
    """core(*tensors [B,t,...], state) -> (o [B,t,...], state), on each sequence between `bounds`; None is no packing.

    reverse runs every sequence from its last token to its first. With cu_seqlens, which only a core that takes it as
    its last argument may be given, all sequences run at once and bounds are not read.
    """

    def run(part, held, *packing):
        if not reverse:
            return core(*part, held, *packing)
        o, held = core(*(x if x is None else x.flip(1) for x in part), held, *packing)
        return o.flip(1), held

    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(tensors[0].device)
        if not reverse:
            return run(tensors, state, cu_seqlens)
        o, state = run(tensors, _turned(state), (cu_seqlens[-1] - cu_seqlens).flip(0))
        return o, _turned(state)
    if bounds is None:
        return run(tensors, state)
    if len(bounds) == 1:
        # No sequence: an empty one gives the shapes.
        o, final = core(*tensors, None)
        return o, tuple(x[:0] for x in final) if isinstance(final, tuple) else final[:0]
    pieces = [
        run([x if x is None else x[:, a:b] for x in tensors], _rows(state, n))
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    outputs, states = zip(*pieces, strict=True)
    return torch.cat(outputs, 1), _join(list(states))


def after_one(o: torch.Tensor, first: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """o [B,T,H,V] one token later, and first [N,H,V] where a sequence begins."""
    if cu_seqlens is None:
        return torch.cat([first.unsqueeze(1), o[:, :-1]], 1)
    # Empty sequences begin on a row that is cut off again.
    begin = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[:-1], o.shape[1]).long()
    later = torch.cat([o[:, :1], o], 1)
    return later.index_copy(1, begin, first.unsqueeze(0))[:, :-1]
