"""Which backend runs a recurrence, additive or with the delta rule; on a GPU it is one opaque op.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

import importlib.util

import torch

from liger_ops import _checks
from liger_ops._torch import additive, delta
from liger_ops._torch.layout import full_precision

# A per-channel gate costs an exponential per row, column and channel of a chunk, the others one per row and column.
CHUNK_PER_CHANNEL = 16
CHUNK = 32
# Tokens that are not worth a matrix product, and the widest key that one program holds a state of.
_FEW, WIDEST = 4, 256
# Looked up here: torch.compile cannot trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def on_triton(q: torch.Tensor) -> bool:
    """Whether kernels serve these tensors: on a GPU, float64 aside."""
    return q.is_cuda and q.dtype != torch.float64 and _HAS_TRITON


def normalized(o: torch.Tensor) -> torch.Tensor:
    """o [...,V+1] -> [...,V], divided by the last column except where that is zero: nothing was seen there."""
    total = o[..., -1:]
    return o[..., :-1] / total.masked_fill(total == 0, 1.0)


def default_chunk(g: torch.Tensor | None, chunk: int | None = None) -> int:
    per_channel = CHUNK_PER_CHANNEL if g is not None and g.ndim == 4 else CHUNK
    return per_channel if chunk is None else chunk


@torch.library.custom_op("liger_ops::packed", mutates_args=())
def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    gv: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    chunk: int | None,
    unit: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """unit: as if q and k had length 1."""
    if not unit:
        return _forward(q, k, v, g, gv, beta, state, cu_seqlens, scale, chunk)
    long_q, long_k = length(q), length(k)
    beta = _strength(beta, long_k)
    o, last = _forward(q, k, v * long_k, g, gv, beta, state, cu_seqlens, scale, chunk)
    return torch.div(o, long_q, out=torch.empty_like(o, dtype=v.dtype)), last


def _strength(beta: torch.Tensor, long_k: torch.Tensor) -> torch.Tensor:
    """That of keys longer than 1 which does what beta does to those of length 1.

    A key rounded to length 1 in halves is longer or shorter, which strengths near 2 let grow. So keys stay as they are:
    what belongs to their length goes to values and strengths, that of queries to the output, all in float32.
    """
    return beta.float() / long_k.squeeze(-1).square()


def length(x: torch.Tensor) -> torch.Tensor:
    """sqrt(|x|^2 + 1e-6) over the last dimension [...,1], in float32 or float64."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind).square() + 1e-6).sqrt()


def _forward(q, k, v, g, gv, beta, state, cu_seqlens, scale, chunk) -> tuple[torch.Tensor, torch.Tensor]:
    both = g is not None and gv is not None
    if both or (gv is None and cu_seqlens is None and q.shape[1] <= _FEW and k.shape[-1] <= WIDEST):
        from liger_ops._triton.recurrent import forward

        last = torch.empty_like(state, memory_format=torch.contiguous_format)
        return forward(q, k, v, g, gv, state.contiguous(), last, None, scale, beta=beta), last
    if beta is not None:
        from liger_ops._triton.delta import forward

        return forward(q, k, v, beta, g, state, cu_seqlens, scale, chunk)
    if gv is not None:
        from liger_ops._triton.additive import values_forward

        return values_forward(q, k, v, gv, state, cu_seqlens, scale, chunk)
    from liger_ops._triton.additive import forward

    return forward(q, k, v, g, state, cu_seqlens, scale, chunk)


@_packed.register_fake
def _(q, k, v, g, gv, beta, state, cu_seqlens, scale, chunk, unit):
    return v.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("liger_ops::packed_backward", mutates_args=())
def _packed_backward(
    do: torch.Tensor,
    dstate: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    gv: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    chunk: int | None,
    unit: bool,
    gate: bool,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, beta if there is one, and state, and of the gate, g or gv, if wanted."""
    if beta is not None:
        *found, dgate, dfirst = _delta_backward(
            do, dstate, q, k, v, beta, g, state, cu_seqlens, scale, chunk, unit, gate
        )
        return [*found, dfirst] + ([dgate] if gate else [])
    from liger_ops._triton import additive as kernels

    run, given = (kernels.backward, g) if gv is None else (kernels.values_backward, gv)
    *found, dgate, dfirst = run(do, dstate, q, k, v, given, state, cu_seqlens, scale, chunk, gate)
    return [*found, dfirst] + ([dgate] if gate else [])


def _delta_backward(do, dstate, q, k, v, beta, g, state, cu_seqlens, scale, chunk, unit, gate):
    """The gradients of q, k, v, beta, g and the initial state; those of q and k are rounded only as a whole."""
    from liger_ops._triton.delta import backward

    shared = g, state, cu_seqlens, scale, chunk, gate
    if not unit:
        return backward(do, dstate, q, k, v, beta, *shared)
    long_q, long_k = length(q), length(k)
    strength = _strength(beta, long_k)
    args = do / long_q, dstate, q, k, v * long_k, strength
    dq, dk, dv, dstrength, dg, dfirst = backward(*args, *shared, torch.float32)
    # An output is linear in its query, so that q dq is what the query's length would have.
    dq = torch.addcmul(dq, q.float(), (q * dq).sum(-1, keepdim=True) / long_q.square(), value=-1)
    dlength = (dv * v).sum(-1, keepdim=True) - 2 * (dstrength * strength).unsqueeze(-1) / long_k
    dk = torch.addcmul(dk, k.float(), dlength / long_k)
    dbeta = dstrength / long_k.squeeze(-1).square()
    return dq.to(q.dtype), dk.to(k.dtype), (dv * long_k).to(v.dtype), dbeta.to(beta.dtype), dg, dfirst


@_packed_backward.register_fake
def _(do, dstate, q, k, v, g, gv, beta, state, cu_seqlens, scale, chunk, unit, gate):
    given = q, k, v, *(() if beta is None else (beta,)), state, *((g if gv is None else gv,) if gate else ())
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.chunk, ctx.unit = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, do, dstate):
    if torch.is_grad_enabled():
        raise RuntimeError("liger_ops::packed_backward: expected one differentiation, got create_graph=True")
    gate = any(ctx.needs_input_grad[3:5])
    held = ctx.saved_tensors
    dq, dk, dv, *found = _packed_backward(do, dstate, *held, ctx.scale, ctx.chunk, ctx.unit, gate)
    dbeta = None if held[5] is None else found.pop(0)
    dfirst, *dg = found
    gates = [dg[0] if need else None for need in ctx.needs_input_grad[3:5]]
    return dq, dk, dv, *gates, dbeta, dfirst, None, None, None, None


_packed.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("liger_ops::pooled_step", mutates_args=("pool",))
def pooled_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    gv: torch.Tensor | None,
    beta: torch.Tensor | None,
    pool: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    before: bool,
) -> torch.Tensor:
    """One token on a pool [S,H,K,V] in float32, changed in place: q [B,HQ,K], slots [B] -> o [B,HQ,V] like v."""
    if on_triton(q) and pool.is_contiguous() and k.shape[-1] <= WIDEST:
        from liger_ops._triton.recurrent import forward

        q, k, v, g, gv, beta = (x if x is None else x.unsqueeze(1) for x in (q, k, v, g, gv, beta))
        return forward(q, k, v, g, gv, pool, pool, slots, scale, before, beta).squeeze(1)
    live = slots >= 0
    rows = slots.long().clamp(min=0)
    q, k, written, g, gv, beta = (x if x is None else x.float() for x in (q, k, v, g, gv, beta))
    old = pool[rows] if len(pool) else pool.new_zeros(len(slots), *pool.shape[1:])
    o, state = _step(q, k, written, g, gv, old, before) if beta is None else _erase(q, k, written, beta, g, old)
    pool[rows[live]] = state[live]
    return (o * scale).to(v.dtype)


_step, _erase = full_precision(additive.step), full_precision(delta.step)


@pooled_step.register_fake
def _(q, k, v, g, gv, beta, pool, slots, scale, before):
    return v.new_empty(*q.shape[:2], v.shape[-1])


@full_precision
def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    chunk: int | None = None,
    gv: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    unit: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V] -> o [B,T,HQ,V] in the dtype of v, and the last state [N,H,K,V].

    Log decays g [B,T,H] or [B,T,H,K] and gv [B,T,H,V], or None; cu_seqlens [N+1] packs sequences into batch 1. With
    beta [B,T,H], and then without gv, the delta rule; unit: for q and k of length 1, which kernels take as they are.
    """
    (B, T, H, K), V = k.shape, v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Decays of keys and values at once have no chunked form there: token by token, or in PyTorch.
    by_token = cu_seqlens is None and K <= WIDEST and not torch.is_grad_enabled()
    kernels = on_triton(q) and (g is None or gv is None or by_token) and (beta is None or K <= WIDEST)
    if kernels and state is None:
        state = q.new_zeros(N, H, K, V, dtype=torch.float32)
    if not (kernels and T and B):
        if unit:
            q, k = q / length(q), k / length(k)
        return additive.recurrence(q, k, v, g, scale, state, default_chunk(g, chunk), gv, cu_seqlens, beta)
    _checks.refuse_tangents("packed", (q, k, v, g, gv, beta, state))
    return _packed(q, k, v, g, gv, beta, state.float(), cu_seqlens, scale, chunk, unit)
