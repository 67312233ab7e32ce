"""Chunked recurrence h_t = exp(g_t) h_{t-1} + k_t v_t^T, or with the delta rule's values, in segments.

Shapes: B batch, T time, HQ query heads, H key/value heads, G query heads per key/value head, K key width, V value
width, N chunks of C tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F

from liger_ops._torch import chunks, delta
from liger_ops._torch.backward import backward
from liger_ops._torch.decay import Decay, between, make_decay, running, unit
from liger_ops._torch.forward import forward
from liger_ops._torch.layout import full_precision, head_major, pack, side_by_side, unpack
from liger_ops._torch.scores import scores
from liger_ops._torch.segments import Plan, define

# Chunks of a segment: its states stay in a core's cache, and its dispatch costs little beside it.
_CHUNKS = 64
# Packed sequences up to this length run side by side, longer ones one by one.
_SHORT = 512


def products(x: torch.Tensor) -> torch.Tensor:
    """[B,H,N,C,G,D] or [B,H,N,K,V] -> one batch of matrices [B*H*N,C*G,D] or [B*H*N,K,V]."""
    return (x.flatten(3, 4) if x.ndim == 6 else x).flatten(0, 2)


def _read(a: torch.Tensor, v: torch.Tensor, q: torch.Tensor, before: torch.Tensor, decay: Decay | None) -> torch.Tensor:
    """Scores a [B,H,N,C,G,C] over v [B,H,N,C,V], which decays by value channel, plus q over the state before."""
    if decay is None:
        o = torch.bmm(products(a), products(v)).baddbmm_(products(q), products(before))
        return o.view(*q.shape[:5], -1)
    start = decay.start.unsqueeze(4)
    o = (q.flatten(3, 4) @ before).view(*q.shape[:5], -1) * start
    if decay.rise is None:
        return o + torch.einsum("bhncgj,bhncjv,bhnjv->bhncgv", a, between(decay.sums, v.dtype), v)
    own = a.diagonal(dim1=3, dim2=5).transpose(-1, -2)
    strict = a * torch.ones(a.shape[3], a.shape[3], dtype=a.dtype, device=a.device).tril(-1).unsqueeze(1)
    of_v = unit(v, decay.half)
    earlier = (strict.flatten(3, 4) @ (v * (decay.rise / of_v))).view_as(o)
    return o + earlier * (decay.fall * of_v).unsqueeze(4) + own.unsqueeze(-1) * v.unsqueeze(4)


def _one_by_one(added: torch.Tensor, keep: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each chunk adds [B,H,N,K,V] and keeps [B,H,N,K,1 or V] -> the states before them, and after the last."""
    if torch.is_grad_enabled():
        states = [state]
        for new, kept in zip(added.unbind(2), keep.unbind(2), strict=True):
            states.append(torch.addcmul(new, kept, states[-1]))
        return torch.stack(states[:-1], 2), states[-1]
    states = torch.empty_like(added)
    before = states.unbind(2)
    before[0].copy_(state)
    after = [*before[1:], torch.empty_like(state)]
    for old, new, kept, out in zip(before, added.unbind(2), keep.unbind(2), after, strict=True):
        torch.addcmul(new, kept, old, out=out)
    return states, after[-1]


def enter(
    k: torch.Tensor, v: torch.Tensor, decay: Decay | None, state: torch.Tensor, decay_v: Decay | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B,H,N,C,K], v [B,H,N,C,V], state [B,H,K,V] -> the state before each chunk [B,H,N,K,V], and after the last."""
    k = k if decay is None else k * decay.end
    added = k.transpose(-1, -2) @ (v if decay_v is None else v * decay_v.end)
    B, H, N, K, V = added.shape
    if decay_v is not None or (decay is not None and decay.total.shape[-1] > 1):
        keep = 1.0 if decay is None else decay.total.unsqueeze(-1)
        keep = keep if decay_v is None else keep * decay_v.total.unsqueeze(-2)
        return _one_by_one(added, keep, state)
    total = added.new_zeros(B, H, N) if decay is None else decay.sums[:, :, :, -1, 0]
    weights = between(running(F.pad(total, (1, 0)).unsqueeze(2)), added.dtype).squeeze(2).tril().flatten(0, 1)
    state, added = state.reshape(B * H, 1, K * V), added.view(B * H, N, K * V)
    before, after = (
        (weights[:, rows, :1] * state).baddbmm_(weights[:, rows, 1:], added).view(B, H, -1, K, V)
        for rows in (slice(0, N), slice(N, N + 1))
    )
    return before, after.squeeze(2)


def _segment(chunk, scale, rows, state, out, q, k, v, g, gv, beta):
    """One segment: q [B,T,HQ,K], k [B,T,H,K], v, gv [B,T,H,V], g like k or beta [B,T,H], state [B,H,K,V]."""
    if out is not None and gv is None and beta is None:
        last = forward(chunk, scale, state, out, q, k, v, g)
        if last is not None:
            return out, last
    T, H = q.shape[1], k.shape[2]
    C = chunks.rows(chunk, T)
    N, short = -(-T // C), -T % C
    k, v, g, gv, beta = (None if x is None else head_major(x, short).unflatten(2, (N, C)) for x in (k, v, g, gv, beta))
    decay, decay_v = make_decay(g), make_decay(gv)
    if beta is None:
        before, state = enter(k, v, decay, state, decay_v)
    else:
        v, before, state = delta.enter(k, v, beta, g, decay, state)
    a, q = scores(pack(q, H, C), k, decay, scale)
    o = unpack(_read(a, v, q, before, decay_v), T)
    return o.flatten(2, 3) if out is None else out.unflatten(2, (H, -1)).copy_(o), state


def _reverse(chunk, scale, state, do, dlast, grads, q, k, v, g, gv, beta):
    return backward(chunk, scale, state, do, dlast, grads[:4], q, k, v, g) if gv is None and beta is None else None


def _plan(q, k, v, g, gv, beta, state, cu_seqlens, scale, chunk):
    body, reverse, inputs = partial(_segment, chunk, scale), partial(_reverse, chunk, scale), [q, k, v, g, gv, beta]
    return Plan(body, _CHUNKS * chunk, v.shape[-1], state, inputs, [(0, 0)] * len(inputs), cu_seqlens, reverse)


_recurrence = define(
    "recurrence",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? gv, Tensor? beta, Tensor state, Tensor? cu_seqlens, float scale, "
    "int chunk",
    _plan,
)


@full_precision
def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    chunk: int,
    gv: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V] -> o [B,T,HQ,V], state [N,H,K,V], N the batch or packed sequences.

    Log decays g [B,T,H] or [B,T,H,K] and gv [B,T,H,V], or None; with beta [B,T,H], and then without gv, the delta rule.
    Computes in float32 (float64 for float64 inputs) and returns o in the dtype of v.
    """
    # Neither traced nor fake: where the values of cu_seqlens can be seen.
    seen = type(cu_seqlens) is torch.Tensor and not torch.compiler.is_compiling()
    if seen and (found := side_by_side((q, k, v, g, gv, beta), cu_seqlens, _SHORT)):
        # A zero key writes nothing, a zero log decay keeps everything: a row's end changes no state.
        (q, k, v, g, gv, beta), place = found
        o, state = recurrence(q, k, v, g, scale, state, chunk, gv, None, beta)
        return o.flatten(0, 1).index_select(0, place).unsqueeze(0), state
    dtype, (B, T, H, K), V = v.dtype, k.shape, v.shape[-1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, g, gv, beta = (None if x is None else x.to(work) for x in (q, k, v, g, gv, beta))
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_zeros(N, H, K, V) if state is None else state.to(work)
    if T == 0 or B == 0:
        # Nothing, but of all inputs: a loss of it has gradients.
        nothing = sum(x.sum() for x in (q, k, v, g, gv, beta) if x is not None)
        return (q.new_zeros(B, T, q.shape[2], V) + nothing).to(dtype), state.clone()
    if T == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        q, k, v, g, gv, beta = (None if x is None else x[:, 0] for x in (q * scale, k, v, g, gv, beta))
        o, state = step(q, k, v, g, gv, state) if beta is None else delta.step(q, k, v, beta, g, state)
        o = o.unsqueeze(1)
    else:
        short = -V % chunks.ALIGNED if K * V % chunks.ALIGNED else 0
        v, gv, state = (F.pad(x, (0, short)) if short and x is not None else x for x in (v, gv, state))
        o, state, _ = _recurrence(q, k, v, g, gv, beta, state, cu_seqlens, scale, chunk)
        if short:
            # Copies: a view would keep the padding alive.
            o, state = (x[..., :V].clone(memory_format=torch.contiguous_format) for x in (o, state))
    return o.to(dtype), state


def step(q, k, v, g, gv, state, before=False):
    """One token: q [B,HQ,K], k [B,H,K], v [B,H,V], g and gv likewise or None, state [B,H,K,V], read before or after."""
    old = state
    if g is not None:
        state = state * (g.unsqueeze(-1) if g.ndim == 3 else g[..., None, None]).exp()
    if gv is not None:
        state = state * gv.unsqueeze(-2).exp()
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unflatten(1, (k.shape[1], -1)) @ (old if before else state)).flatten(1, 2), state
