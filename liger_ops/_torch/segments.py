"""Long sequences in segments, as torch.library ops: memory linear in T, a backward that recomputes, nothing to trace.

Shapes: B batch, T time, HQ query heads, U output columns, N sequences packed along time.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from liger_ops import _checks
from liger_ops._torch.layout import full_precision

_LIBRARY = torch.library.Library("liger_ops", "FRAGMENT")
# body(rows, state, out, *inputs) -> (o, state): fills out [B,rows,HQ,U] if given, otherwise returns a new o.
Body = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# reverse(state, do, dlast, grads, *inputs) -> the gradient of state: fills those of grads that are not None, or returns
# None and leaves them to autograd. Only for plans whose reach is (0, 0): rows that two segments share would add up.
Reverse = Callable[..., torch.Tensor | None]


class Segment(NamedTuple):
    """Rows of one sequence, its place among the states, and whether they are its first and its last."""

    rows: slice
    place: slice
    first: bool
    last: bool


class Plan(NamedTuple):
    """How an op runs: `body` handles `step` rows at a time and hands its state on, from `state` to the final one.

    The first of `inputs` is q [B,T,HQ,K] with T >= 1. A segment gets rows [start + first, stop + last) of dimension 1
    of each input, zeros where there are none, or all of an input whose reach is not (first, last) but None. o is
    [B,T,HQ,width]. cu_seqlens [N+1] parts batch 1 into sequences, each with a state of its own.

    A trace makes plans whose sizes it does not know: what makes one branches on none of them.
    """

    body: Body
    step: int
    width: int
    state: torch.Tensor
    inputs: list[torch.Tensor | None]
    reach: list[tuple[int, int] | None]
    cu_seqlens: torch.Tensor | None = None
    reverse: Reverse | None = None

    @property
    def most(self) -> int:
        """No fewer than there are segments; as many without cu_seqlens."""
        sequences = 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return -(-self.inputs[0].shape[1] // self.step) + sequences

    @property
    def start(self) -> torch.Tensor:
        """Shaped like the state that a segment starts from."""
        return self.state if self.cu_seqlens is None else self.state[:1]

    def segments(self) -> list[Segment]:
        packed = self.cu_seqlens is not None
        bounds = self.cu_seqlens.tolist() if packed else [0, self.inputs[0].shape[1]]
        return [
            Segment(
                slice(start, min(start + self.step, end)),
                slice(n, n + 1) if packed else slice(None),
                start == begin,
                start + self.step >= end,
            )
            for n, (begin, end) in enumerate(itertools.pairwise(bounds))
            for start in range(begin, end, self.step)
        ]

    def views(self, rows: slice, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What a segment gets of tensors like the inputs, without the zeros."""
        return [
            x if x is None or reach is None else x[:, max(rows.start + reach[0], 0) : rows.stop + reach[1]]
            for x, reach in zip(tensors, self.reach, strict=True)
        ]

    def shares(self, rows: slice) -> list[torch.Tensor | None]:
        """What a segment gets of the inputs."""
        missing = [0 if reach is None else max(-rows.start - reach[0], 0) for reach in self.reach]
        return [
            F.pad(x, (0, 0) * (x.ndim - 2) + (short, 0)) if x is not None and short else x
            for x, short in zip(self.views(rows, self.inputs), missing, strict=True)
        ]


@torch.no_grad()
def _forward(plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, the final state, and the states that segments start from."""
    q, segments, final = plan.inputs[0], plan.segments(), plan.state.clone(memory_format=torch.contiguous_format)
    o = q.new_empty(*q.shape[:3], plan.width)
    starts = final.new_zeros(plan.most, *plan.start.shape)
    state = plan.state
    for start, segment in zip(starts, segments, strict=False):
        state = plan.state[segment.place] if segment.first else state
        start.copy_(state)
        state = plan.body(segment.rows, state, o[:, segment.rows], *plan.shares(segment.rows))[1]
        if segment.last:
            final[segment.place] = state
    return o, final, starts.flatten()


def _differentiate(plan: Plan, rows: slice, start, do, later, grads, shares) -> torch.Tensor:
    """Adds one segment's gradients to `grads`, through autograd, and returns that of the state it starts from."""
    shares = [x if x is None else x.detach() for x in shares]
    wanted = [x.requires_grad_() for x, grad in zip(shares, grads, strict=True) if grad is not None]
    start = start.detach().requires_grad_()
    with torch.enable_grad():
        o, state = plan.body(rows, start, None, *shares)
    *found, first = torch.autograd.grad((o, state), [*wanted, start], (do, later), allow_unused=True)
    for grad, new in zip((x for x in grads if x is not None), found, strict=True):
        if new is not None:
            # Behind the zeros, if the share began with some.
            grad += new.narrow(1, new.shape[1] - grad.shape[1], grad.shape[1])
    return first


def _backward(
    plan: Plan, starts: torch.Tensor, do: torch.Tensor, dstate: torch.Tensor, needs: list[bool]
) -> list[torch.Tensor | None]:
    """Gradients of the inputs that `needs` names, and of the state, a segment at a time from the last one."""
    grads = [torch.zeros_like(x) if need else None for x, need in zip(plan.inputs, needs, strict=True)]
    dfirst, later = dstate.clone(memory_format=torch.contiguous_format), dstate
    starts = starts.view(plan.most, *plan.start.shape)
    # More starts than segments only where sequences are packed.
    for start, (rows, place, first, last) in reversed(list(zip(starts, plan.segments(), strict=False))):
        arguments = start, do[:, rows], dstate[place] if last else later, plan.views(rows, grads)
        shares = plan.shares(rows)
        later = None if plan.reverse is None else plan.reverse(*arguments, *shares)
        if later is None:
            later = _differentiate(plan, rows, *arguments, shares)
        if first:
            dfirst[place] = later
    return [*grads, dfirst]


def define(name: str, arguments: str, plan: Callable[..., Plan]) -> Callable[..., Any]:
    """The op liger_ops::name(arguments) that runs plan(*arguments), with fake and backward.

    Returns o, the final state, and the state that each segment starts from, which only the backward wants: flat, since
    a trace holds a length of 1 for a case of its own.

    arguments is a schema whose tensors, in order and without `state` and `cu_seqlens`, are the plan's inputs.
    """
    parts = arguments.split(", ")
    state = parts.index("Tensor state")
    others = state, parts.index("Tensor? cu_seqlens") if "Tensor? cu_seqlens" in parts else state
    tensors = [n for n, part in enumerate(parts) if part.startswith("Tensor") and n not in others]
    _LIBRARY.define(f"{name}({arguments}) -> (Tensor, Tensor, Tensor)")
    _LIBRARY.define(f"{name}_backward(Tensor do, Tensor dstate, Tensor starts, bool[] needs, {arguments}) -> Tensor[]")
    op, backward_op = getattr(torch.ops.liger_ops, name), getattr(torch.ops.liger_ops, f"{name}_backward")

    def forward(*args):
        return _forward(plan(*args))

    def fake(*args):
        p = plan(*args)
        q, state = p.inputs[0], torch.empty_like(p.state, memory_format=torch.contiguous_format)
        return q.new_empty(*q.shape[:3], p.width), state, state.new_empty(p.most * p.start.numel())

    def backward(do, dstate, starts, needs, *args):
        *grads, dstate = _backward(plan(*args), starts, do, dstate, [needs[n] for n in tensors])
        return [x for x in grads if x is not None] + [dstate]

    def backward_fake(do, dstate, starts, needs, *args):
        return [torch.empty_like(args[n]) for n in tensors if needs[n]] + [torch.empty_like(dstate)]

    for suffix, run, pretend in (("", forward, fake), ("_backward", backward, backward_fake)):
        torch.library.impl(_LIBRARY, f"{name}{suffix}", "CompositeExplicitAutograd")(full_precision(run))
        torch.library.register_fake(f"liger_ops::{name}{suffix}", pretend, lib=_LIBRARY)

    def setup(ctx, inputs, output):
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs), output[2])

    def differentiate(ctx, do, dstate, _):
        # Read once: gradient checkpointing recomputes what it holds at every access.
        *held, starts = ctx.saved_tensors
        args = [x if x is not None else other for x, other in zip(held, ctx.others, strict=True)]
        needs = [bool(x) for x in ctx.needs_input_grad]
        *found, last = backward_op(do, dstate, starts, needs, *args)
        grads = [None] * len(args)
        for n in tensors:
            if needs[n]:
                grads[n] = found.pop(0)
        grads[state] = last if needs[state] else None
        return tuple(grads)

    def once(keyset, *args):
        """The backward differentiates inside, so that autograd must stay reachable below it: no guard here."""
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            raise RuntimeError(f"liger_ops::{name}_backward: expected one differentiation, got create_graph=True")
        return backward_op.default.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def public(*args):
        _checks.refuse_tangents(name, args)
        return op(*args)

    torch.library.register_autograd(f"liger_ops::{name}", differentiate, setup_context=setup, lib=_LIBRARY)
    _LIBRARY.impl(f"{name}_backward", once, "Autograd", with_keyset=True)
    return public
