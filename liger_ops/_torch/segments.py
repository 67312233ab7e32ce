"""Long sequences in segments: memory linear in T, and a backward that recomputes one segment at a time.

Shapes: B batch, T time, HQ query heads, U output columns.
"""

from collections.abc import Callable

import torch

from liger_ops._torch.layout import full_precision

# body(rows, state, out, *inputs) -> (o, state): fills out [B,rows,HQ,U] if given, otherwise returns a new o.
Body = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def segmented(
    body: Body,
    step: int,
    width: int,
    state: torch.Tensor,
    inputs: list[torch.Tensor | None],
    reach: list[int | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B,T,HQ,width] and the final state of a body that handles `step` rows at a time and hands its state on.

    The first input is q [B,T,HQ,K] with T >= 1. A segment gets rows [start, stop + reach) of dimension 1 of each
    input, or all of an input whose reach is None.
    """
    return _Segmented.apply(body, step, width, reach, state, *inputs)


def _segments(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _share(x: torch.Tensor | None, rows: slice, reach: int | None) -> torch.Tensor | None:
    return x if x is None or reach is None else x[:, rows.start : rows.stop + reach]


class _Segmented(torch.autograd.Function):
    @staticmethod
    def forward(ctx, body, step, width, reach, state, *inputs):
        q, starts = inputs[0], []
        o = q.new_empty(*q.shape[:3], width)
        for rows in _segments(q.shape[1], step):
            starts.append(state)
            shares = [_share(x, rows, r) for x, r in zip(inputs, reach, strict=True)]
            state = body(rows, state, o[:, rows], *shares)[1]
        ctx.body, ctx.step, ctx.reach = body, step, reach
        ctx.save_for_backward(*inputs, *starts)
        # Copied where nothing was entered: an input must not come back as an output.
        return o, state.clone() if state is starts[0] else state

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx, do, dstate):
        # Read once: gradient checkpointing recomputes what it holds at every access.
        saved, count = ctx.saved_tensors, len(ctx.reach)
        inputs, starts = saved[:count], saved[count:]
        grads = [
            torch.zeros_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad[5:], strict=True)
        ]
        for rows, start in reversed(list(zip(_segments(do.shape[1], ctx.step), starts, strict=True))):
            shares = [_share(x, rows, r) for x, r in zip(inputs, ctx.reach, strict=True)]
            shares = [x if x is None else x.detach() for x in shares]
            wanted = [x.requires_grad_() for x, grad in zip(shares, grads, strict=True) if grad is not None]
            start = start.detach().requires_grad_()
            with torch.enable_grad():
                o, state = ctx.body(rows, start, None, *shares)
            found = torch.autograd.grad((o, state), [*wanted, start], (do[:, rows], dstate), allow_unused=True)
            *found, dstate = found
            kept = [_share(grad, rows, r) for grad, r in zip(grads, ctx.reach, strict=True) if grad is not None]
            for grad, new in zip(kept, found, strict=True):
                if new is not None:
                    grad += new
        return None, None, None, None, dstate, *grads
