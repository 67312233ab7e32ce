"""Chunked recurrence h_t = exp(g_t) h_{t-1} + k_t v_t^T, or with the delta rule's values, in segments.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N chunks of C tokens or packed
sequences.
"""

from functools import partial

import torch
import torch.nn.functional as F

from liger_ops import limits
from liger_ops._inputs import IN_TIME, SCHEMA, Gradients, RecurrenceInputs, work_dtype
from liger_ops._torch.decay import make_decay
from liger_ops._torch.in_place import chunks
from liger_ops._torch.in_place.backward import backward
from liger_ops._torch.in_place.forward import forward
from liger_ops._torch.layout import full_precision, head_major, pack, side_by_side, unpack
from liger_ops._torch.segments import Plan, Tensors, define
from liger_ops._torch.traced import additive, delta

# Chunks of a segment: its states stay in a core's cache, and its dispatch costs little beside it.
_CHUNKS = 64
# Packed sequences up to this length run side by side, longer ones one by one.
_SHORT = 512


def chunk_size(x: RecurrenceInputs) -> int:
    if x.chunk is not None:
        return x.chunk
    return limits.CHUNK_PER_CHANNEL if x.per_channel else limits.CHUNK


def _segment(
    whole: RecurrenceInputs, rows: slice, state: torch.Tensor, out: torch.Tensor | None, **shares: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares of one segment, from `state` [B,H,K,V] on."""
    x = whole._replace(state=state, **shares)
    if out is not None and x.gv is None and x.beta is None:
        last = forward(x, chunk_size(x), out)
        if last is not None:
            return out, last
    T, H = x.q.shape[1], x.k.shape[2]
    C = chunks.rows(chunk_size(x), T)
    N, short = -(-T // C), -T % C
    k, v = (head_major(y, short).unflatten(2, (N, C)) for y in (x.k, x.v))
    g, gv, beta = (None if y is None else head_major(y, short).unflatten(2, (N, C)) for y in (x.g, x.gv, x.beta))
    decay, decay_v = make_decay(g, carry=beta is None and gv is None), make_decay(gv)
    if beta is None:
        before, last = additive.enter(k, v, decay, state, decay_v)
    else:
        v, before, last = delta.enter(k, v, beta, g, decay, state)
    a, q = additive.decayed_scores(pack(x.q, H, C), k, decay, x.scale)
    o = unpack(additive.read(a, v, q, before, decay_v), T)
    return o.flatten(2, 3) if out is None else out.unflatten(2, (H, -1)).copy_(o), last


def _reverse(
    whole: RecurrenceInputs, state: torch.Tensor, do: torch.Tensor, dlast: torch.Tensor, grads: Tensors, **shares
) -> torch.Tensor | None:
    x = whole._replace(state=state, **shares)
    return backward(x, chunk_size(x), do, dlast, Gradients(**grads)) if x.gv is None and x.beta is None else None


def _plan(**given) -> Plan:
    x = RecurrenceInputs(**given)
    return Plan(
        body=partial(_segment, x),
        step=_CHUNKS * chunk_size(x),
        width=x.v.shape[-1],
        q=x.q,
        state=given["state"],
        inputs={n: given[n] for n in IN_TIME},
        reach={},
        cu_seqlens=x.cu_seqlens,
        reverse=partial(_reverse, x),
    )


_recurrence = define("recurrence", SCHEMA, _plan)


@full_precision
def recurrence(x: RecurrenceInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B,T,HQ,V] in the dtype of v, and the last state [N,H,K,V], in float32 (float64 for float64 inputs)."""
    found, bounds = None, x.cu_seqlens
    # Neither traced nor fake: where the values of cu_seqlens can be seen.
    if bounds is not None and type(bounds) is torch.Tensor and not torch.compiler.is_compiling():
        found = side_by_side(bounds, _SHORT)
    if found:
        # A zero key writes nothing, a zero log decay keeps everything: a row's end changes no state.
        rows, place = found
        o, state = recurrence(x.in_time(rows)._replace(cu_seqlens=None))
        return o.flatten(0, 1).index_select(0, place).unsqueeze(0), state
    dtype, (B, T, H, K), V = x.v.dtype, x.k.shape, x.v.shape[-1]
    work = work_dtype(x.q)
    state = x.q.new_zeros(x.sequences, H, K, V, dtype=work) if x.state is None else x.state.to(work)
    x = x._replace(state=state).in_time(lambda y: y.to(work))
    if T == 0 or B == 0:
        # Nothing, but of all inputs: a loss of it has gradients.
        nothing = sum(y.sum() for y in (x.q, x.k, x.v, x.g, x.gv, x.beta) if y is not None)
        return (x.q.new_zeros(B, T, x.q.shape[2], V) + nothing).to(dtype), state.clone()
    if T == 1 and x.cu_seqlens is None and not torch.is_grad_enabled():
        o, state = one_token(x.in_time(lambda y: y[:, 0]))
        o = o.unsqueeze(1)
    else:
        short = -V % chunks.ALIGNED if K * V % chunks.ALIGNED else 0
        if short:
            v, gv, state = (y if y is None else F.pad(y, (0, short)) for y in (x.v, x.gv, x.state))
            x = x._replace(v=v, gv=gv, state=state)
        o, state = _recurrence(**x._asdict())
        if short:
            # Copies: a view would keep the padding alive.
            o, state = (y[..., :V].clone(memory_format=torch.contiguous_format) for y in (o, state))
    return o.to(dtype), state


def one_token(x: RecurrenceInputs, before: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the dimension of time, q [B,HQ,K], g [B,H] or [B,H,K]; before: what is read is the state without it.

    Returns o [B,HQ,V] and the state [B,H,K,V].
    """
    assert x.state is not None
    old = state = x.state
    if x.g is not None:
        state = state * (x.g.unsqueeze(-1) if x.g.ndim == 3 else x.g[..., None, None]).exp()
    if x.gv is not None:
        state = state * x.gv.unsqueeze(-2).exp()
    written = x.v.unsqueeze(-2)
    if x.beta is not None:
        written = x.beta[..., None, None] * (written - x.k.unsqueeze(-2) @ state)
    state = state + x.k.unsqueeze(-1) * written
    q = (x.q * x.scale).unflatten(1, (x.k.shape[1], -1))
    return (q @ (old if before else state)).flatten(1, 2), state
