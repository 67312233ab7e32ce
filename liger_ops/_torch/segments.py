"""Long sequences in segments, as torch.library ops: memory linear in T, a backward that recomputes, nothing to trace.

Shapes: B batch, T time, HQ query heads, U output columns, N sequences packed along time.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from liger_ops import _checks
from liger_ops._torch.layout import full_precision

_LIBRARY = torch.library.Library("liger_ops", "FRAGMENT")
# By the names that the op's schema gives them.
Tensors = dict[str, torch.Tensor | None]
# body(rows, state, out, **inputs) -> (o, state): fills out [B,rows,HQ,U] if given, otherwise returns a new o.
Body = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# reverse(state, do, dlast, grads, **inputs) -> the gradient of state: fills those of grads that are not None, or
# returns None and leaves them to autograd. Only for plans without reach: rows that two segments share would add up.
Reverse = Callable[..., torch.Tensor | None]


# What of an input a segment gets; `Plan` says more.
Reach = tuple[int, int] | Callable[[slice], slice] | None


class Segment(NamedTuple):
    """Rows of one sequence, its place among the states, and whether they are its first and its last."""

    rows: slice
    place: slice
    first: bool
    last: bool


class Plan(NamedTuple):
    """How an op runs: `body` handles `step` rows at a time and hands its state on, from `state` to the final one.

    A segment gets rows [start + first, stop + last) of dimension 1 of each input, zeros where there are none, (0, 0)
    where nothing is said; all of an input whose reach is not (first, last) but None; and what a function of its rows
    says where dimension 1 is not time. One of them is q [B,T,HQ,K] with T >= 1; o is [B,T,HQ,width]. cu_seqlens [N+1]
    parts batch 1 into sequences, each with a state of its own.

    A trace makes plans whose sizes it does not know: what makes one branches on none of them.
    """

    body: Body
    step: int
    width: int
    q: torch.Tensor
    state: torch.Tensor
    inputs: Tensors
    reach: dict[str, Reach]
    cu_seqlens: torch.Tensor | None = None
    reverse: Reverse | None = None

    @property
    def most(self) -> int:
        """No fewer than there are segments; as many without cu_seqlens."""
        sequences = 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return -(-self.q.shape[1] // self.step) + sequences

    @property
    def start(self) -> torch.Tensor:
        """Shaped like the state that a segment starts from."""
        return self.state if self.cu_seqlens is None else self.state[:1]

    def segments(self) -> list[Segment]:
        bounds = [0, self.q.shape[1]] if self.cu_seqlens is None else self.cu_seqlens.tolist()
        return [
            Segment(
                slice(start, min(start + self.step, end)),
                slice(None) if self.cu_seqlens is None else slice(n, n + 1),
                start == begin,
                start + self.step >= end,
            )
            for n, (begin, end) in enumerate(itertools.pairwise(bounds))
            for start in range(begin, end, self.step)
        ]

    def views(self, rows: slice, tensors: Tensors) -> Tensors:
        """What a segment gets of tensors like the inputs, without the zeros."""
        found = dict(tensors)
        for name, x in tensors.items():
            reach = self.reach.get(name, (0, 0))
            if x is not None and reach is not None:
                own = isinstance(reach, tuple)
                found[name] = x[:, max(rows.start + reach[0], 0) : rows.stop + reach[1]] if own else x[:, reach(rows)]
        return found

    def shares(self, rows: slice) -> Tensors:
        """What a segment gets of the inputs."""
        found = self.views(rows, self.inputs)
        for name, reach in self.reach.items():
            x, short = found[name], max(-rows.start - reach[0], 0) if isinstance(reach, tuple) else 0
            if x is not None and short:
                found[name] = F.pad(x, (0, 0) * (x.ndim - 2) + (short, 0))
        return found


def _forward(plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, the final state, and the states that segments start from."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(plan.q.device.type):
        with torch.no_grad(), torch.autocast(plan.q.device.type, enabled=False):
            return _forward(plan)
    q, segments, final = plan.q, plan.segments(), plan.state.clone(memory_format=torch.contiguous_format)
    o = q.new_empty(*q.shape[:3], plan.width)
    starts = final.new_zeros(plan.most, *plan.start.shape)
    state = plan.state
    for start, segment in zip(starts, segments, strict=False):
        state = plan.state[segment.place] if segment.first else state
        start.copy_(state)
        state = plan.body(segment.rows, state, o[:, segment.rows], **plan.shares(segment.rows))[1]
        if segment.last:
            final[segment.place] = state
    return o, final, starts.flatten()


def _differentiate(
    plan: Plan, rows: slice, start: torch.Tensor, do: torch.Tensor, later: torch.Tensor, grads: Tensors
) -> torch.Tensor:
    """Adds one segment's gradients to `grads`, through autograd, and returns that of the state it starts from."""
    shares = {n: x if x is None else x.detach() for n, x in plan.shares(rows).items()}
    wanted = {n: x.requires_grad_() for n, x in shares.items() if x is not None and grads[n] is not None}
    start = start.detach().requires_grad_()
    with torch.enable_grad():
        o, state = plan.body(rows, start, None, **shares)
    *found, first = torch.autograd.grad((o, state), [*wanted.values(), start], (do, later), allow_unused=True)
    for name, new in zip(wanted, found, strict=True):
        grad = grads[name]
        if new is not None and grad is not None:
            # Behind the zeros, if the share began with some.
            grad += new.narrow(1, new.shape[1] - grad.shape[1], grad.shape[1])
    return first


def _backward(
    dstate: torch.Tensor, starts: torch.Tensor, do: torch.Tensor, plan: Plan, wanted: Collection[str]
) -> Tensors:
    """Gradients of the inputs that are wanted, and of the state, a segment at a time from the last one."""
    grads = {n: torch.zeros_like(x) if n in wanted and x is not None else None for n, x in plan.inputs.items()}
    dfirst, later = dstate.clone(memory_format=torch.contiguous_format), dstate
    starts = starts.view(plan.most, *plan.start.shape)
    # More starts than segments only where sequences are packed.
    for start, (rows, place, first, last) in reversed(list(zip(starts, plan.segments(), strict=False))):
        behind, views = dstate[place] if last else later, plan.views(rows, grads)
        found = None
        if plan.reverse is not None:
            found = plan.reverse(start, do[:, rows], behind, views, **plan.shares(rows))
        later = _differentiate(plan, rows, start, do[:, rows], behind, views) if found is None else found
        if first:
            dfirst[place] = later
    return grads | dict(state=dfirst)


def define(name: str, schema: str, make_plan: Callable[..., Plan]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The op liger_ops::name that runs make_plan(**arguments), with fake and backward, as a function of keywords.

    The op returns o, the final state, and the state that each segment starts from, which only the backward wants: flat,
    since a trace holds a length of 1 for a case of its own; the function o and the final state.

    The schema's tensors, `state` and `cu_seqlens` aside, are the plan's inputs.
    """
    arguments = schema.split(", ")
    names = [argument.split()[1] for argument in arguments]
    tensors = [n for n, argument in zip(names, arguments, strict=True) if argument.startswith("Tensor")]
    inputs = [n for n in tensors if n not in ("state", "cu_seqlens")]
    _LIBRARY.define(f"{name}({schema}) -> (Tensor, Tensor, Tensor)")
    _LIBRARY.define(f"{name}_backward(Tensor do, Tensor dstate, Tensor starts, bool[] needs, {schema}) -> Tensor[]")
    op, backward_op = getattr(torch.ops.liger_ops, name), getattr(torch.ops.liger_ops, f"{name}_backward")

    def plan(args: tuple) -> Plan:
        return make_plan(**dict(zip(names, args, strict=True)))

    def wanted(needs: Sequence[bool]) -> list[str]:
        """Inputs that have a gradient, the state always."""
        return [n for n, need in zip(names, needs, strict=True) if need and n in inputs] + ["state"]

    def forward(*args):
        return _forward(plan(args))

    def fake(*args):
        p = plan(args)
        state = torch.empty_like(p.state, memory_format=torch.contiguous_format)
        return p.q.new_empty(*p.q.shape[:3], p.width), state, state.new_empty(p.most * p.start.numel())

    def backward(do, dstate, starts, needs, *args):
        found = full_precision(_backward)(dstate, starts, do, plan(args), wanted(needs))
        return [found[n] for n in wanted(needs)]

    def backward_fake(do, dstate, starts, needs, *args):
        given = dict(zip(names, args, strict=True)) | dict(state=dstate)
        return [torch.empty_like(given[n]) for n in wanted(needs)]

    for suffix, run, pretend in (("", forward, fake), ("_backward", backward, backward_fake)):
        torch.library.impl(_LIBRARY, f"{name}{suffix}", "CompositeExplicitAutograd")(run)
        torch.library.register_fake(f"liger_ops::{name}{suffix}", pretend, lib=_LIBRARY)

    def setup(ctx, inputs, output):
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs), output[2])

    def differentiate(ctx, do, dstate, _):
        # Read once: gradient checkpointing recomputes what it holds at every access.
        *held, starts = ctx.saved_tensors
        args = [x if x is not None else other for x, other in zip(held, ctx.others, strict=True)]
        needs = [bool(x) for x in ctx.needs_input_grad]
        found = dict(zip(wanted(needs), backward_op(do, dstate, starts, needs, *args), strict=True))
        return tuple(found[n] if need else None for n, need in zip(names, needs, strict=True))

    def once(keyset, *args):
        """The backward differentiates inside, so that autograd must stay reachable below it: no guard here."""
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            raise RuntimeError(f"liger_ops::{name}_backward: expected one differentiation, got create_graph=True")
        return backward_op.default.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def public(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        args = [given[n] for n in names]
        # As it asks itself: without tangents, which is nearly always, no call is worth making.
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            _checks.refuse_tangents(name, args)
        o, state, _ = op(*args)
        return o, state

    torch.library.register_autograd(f"liger_ops::{name}", differentiate, setup_context=setup, lib=_LIBRARY)
    _LIBRARY.impl(f"{name}_backward", once, "Autograd", with_keyset=True)
    return public
