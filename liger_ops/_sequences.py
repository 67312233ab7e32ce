"""Sequences packed along time, one after the other: the only arithmetic on cu_seqlens.

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


def over_sequences(
    core: Callable[..., tuple[torch.Tensor, State]],
    tensors: Sequence[torch.Tensor | None],
    state: State,
    bounds: list[int] | None,
    reverse: bool = False,
) -> tuple[torch.Tensor, State]:
    """core(*tensors [B,t,...], state) -> (o [B,t,...], state), on each sequence between `bounds`; None is no packing.

    reverse runs every sequence from its last token to its first.
    """

    def run(part, held):
        if not reverse:
            return core(*part, held)
        o, held = core(*(x if x is None else x.flip(1) for x in part), held)
        return o.flip(1), held

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
