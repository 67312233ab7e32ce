"""The recurrence on kernels: opaque ops of torch.library, forwards, backwards, and one token on a pool of states.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

import torch

from liger_ops import _devices
from liger_ops._inputs import SCHEMA, Gradients, RecurrenceInputs
from liger_ops._norms import length
from liger_ops._torch.layout import full_precision
from liger_ops._torch.recurrence import one_token
from liger_ops.limits import FEW_TOKENS, WIDEST_KEY


@torch.library.custom_op("liger_ops::recurrence_kernels", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
def recurrence_kernels(*inputs):
    """o [B,T,HQ,V] like v and the last state [N,H,K,V]: of `RecurrenceInputs`, field by field."""
    x = RecurrenceInputs(*inputs)
    if not x.unit:
        return _forward(x)
    long_q, long_k = length(x.q), length(x.k)
    o, last = _forward(x._replace(v=x.v * long_k, beta=_strength(x.beta, long_k)))
    return torch.div(o, long_q, out=torch.empty_like(o, dtype=x.v.dtype)), last


def _strength(beta: torch.Tensor | None, long_k: torch.Tensor) -> torch.Tensor:
    """That of keys longer than 1 which does what beta does to those of length 1.

    A key rounded to length 1 in halves is longer or shorter, which strengths near 2 let grow. So keys stay as they are:
    what belongs to their length goes to values and strengths, that of queries to the output, all in float32.
    """
    assert beta is not None
    return beta.float() / long_k.squeeze(-1).square()


def _forward(x: RecurrenceInputs) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.state is not None
    both = x.g is not None and x.gv is not None
    few = x.gv is None and x.cu_seqlens is None and x.q.shape[1] <= FEW_TOKENS and x.k.shape[-1] <= WIDEST_KEY
    if both or few:
        from liger_ops._triton import recurrent

        last = torch.empty_like(x.state, memory_format=torch.contiguous_format)
        return recurrent.forward(x._replace(state=x.state.contiguous()), last), last
    if x.beta is not None:
        from liger_ops._triton import delta

        return delta.forward(x)
    from liger_ops._triton import additive

    return additive.forward(x) if x.gv is None else additive.value_gated_forward(x)


@recurrence_kernels.register_fake
def _(*inputs):
    x = RecurrenceInputs(*inputs)
    assert x.state is not None
    last = torch.empty_like(x.state, memory_format=torch.contiguous_format)
    return x.v.new_empty(*x.q.shape[:3], x.v.shape[-1]), last


def _wanted(x: RecurrenceInputs, gate: bool) -> list[str]:
    """The names of the gradients that the backward returns: of the gates only if told."""
    return [n for n in Gradients._fields if getattr(x, n) is not None and (gate or n not in ("g", "gv"))]


@torch.library.custom_op(
    "liger_ops::recurrence_kernels_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor dstate, bool gate, {SCHEMA}) -> Tensor[]",
)
def _backward(do, dstate, gate, *inputs):
    """The gradients that are `_wanted`."""
    x = RecurrenceInputs(*inputs)
    if x.beta is not None:
        found = _delta_backward(x, do, dstate, gate)
    else:
        from liger_ops._triton import additive

        run = additive.backward if x.gv is None else additive.value_gated_backward
        found = run(x, do, dstate, gate)
    return [getattr(found, n) for n in _wanted(x, gate)]


def _delta_backward(x: RecurrenceInputs, do: torch.Tensor, dstate: torch.Tensor, gate: bool) -> Gradients:
    """Those of q and k are rounded only as a whole."""
    from liger_ops._triton import delta

    if not x.unit:
        return delta.backward(x, do, dstate, gate)
    long_q, long_k = length(x.q), length(x.k)
    strength = _strength(x.beta, long_k)
    found = delta.backward(x._replace(v=x.v * long_k, beta=strength), do / long_q, dstate, gate, torch.float32)
    dq, dk, dv, dbeta = found.q, found.k, found.v, found.beta
    assert x.beta is not None and dq is not None and dk is not None and dv is not None and dbeta is not None
    # An output is linear in its query, so that q dq is what the query's length would have.
    dq = torch.addcmul(dq, x.q.float(), (x.q * dq).sum(-1, keepdim=True) / long_q.square(), value=-1)
    dlength = (dv * x.v).sum(-1, keepdim=True) - 2 * (dbeta * strength).unsqueeze(-1) / long_k
    dk = torch.addcmul(dk, x.k.float(), dlength / long_k)
    dbeta = dbeta / long_k.squeeze(-1).square()
    dv = (dv * long_k).to(x.v.dtype)
    return found._replace(q=dq.to(x.q.dtype), k=dk.to(x.k.dtype), v=dv, beta=dbeta.to(x.beta.dtype))


@_backward.register_fake
def _(do, dstate, gate, *inputs):
    x = RecurrenceInputs(*inputs)
    return [torch.empty_like(getattr(x, n), memory_format=torch.contiguous_format) for n in _wanted(x, gate)]


def _setup(ctx, inputs, output):
    x = RecurrenceInputs(*inputs)
    ctx.numbers = dict(scale=x.scale, chunk=x.chunk, unit=x.unit)
    ctx.save_for_backward(*x[: -len(ctx.numbers)])


def _differentiate(ctx, do, dstate):
    if torch.is_grad_enabled():
        message = "liger_ops::recurrence_kernels_backward: expected one differentiation, got create_graph=True"
        raise RuntimeError(message)
    x = RecurrenceInputs(*ctx.saved_tensors, **ctx.numbers)
    needs = dict(zip(RecurrenceInputs._fields, ctx.needs_input_grad, strict=True))
    gate = needs["g"] or needs["gv"]
    found = dict(zip(_wanted(x, gate), _backward(do, dstate, gate, *x), strict=True))
    return tuple(found.get(n) for n in RecurrenceInputs._fields)


recurrence_kernels.register_autograd(_differentiate, setup_context=_setup)


# `state` is the pool [S,H,K,V] in float32, addressed by slots [B].
_POOLED = (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? gv, Tensor? beta, Tensor(a!) state, Tensor slots, float scale, "
    "bool before) -> Tensor"
)


@torch.library.custom_op("liger_ops::pooled_step", mutates_args=("state",), schema=_POOLED)
def _pooled_step(*inputs):
    *tensors, pool, slots, scale, before = inputs
    x = RecurrenceInputs(*tensors, scale=scale)
    if _devices.on_triton(x.q) and pool.is_contiguous() and x.k.shape[-1] <= WIDEST_KEY:
        from liger_ops._triton import recurrent

        x = x.in_time(lambda y: y.unsqueeze(1))._replace(state=pool)
        return recurrent.forward(x, pool, slots, before).squeeze(1)
    live, rows = slots >= 0, slots.long().clamp(min=0)
    old = pool[rows] if len(pool) else pool.new_zeros(len(slots), *pool.shape[1:])
    o, new = full_precision(one_token)(x.in_time(torch.Tensor.float)._replace(state=old), before)
    pool[rows[live]] = new[live]
    return o.to(x.v.dtype)


@_pooled_step.register_fake
def _(q, k, v, *_):
    return v.new_empty(*q.shape[:2], v.shape[-1])


def pooled_step(x: RecurrenceInputs, slots: torch.Tensor, before: bool = False) -> torch.Tensor:
    """One token without its dimension of time, q [B,HQ,K]: o [B,HQ,V] like v, the pool x.state changed in place.

    slots [B] are rows of the pool; before: what is read is the state without the token.
    """
    return _pooled_step(*x[: len(Gradients._fields)], slots, x.scale, before)
