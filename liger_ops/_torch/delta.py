"""Chunked delta rule: the additive recurrence over values that tokens of a chunk correct for each other, in segments.

Shapes: B batch, T time, HQ query heads, H key/value heads, G query heads per key/value head, K key width, V value
width, N chunks of C tokens.

With u_t = beta_t (v_t - k_t diag(exp(g_t)) h_{t-1}) the state is h_t = diag(exp(g_t)) h_{t-1} + k_t u_t^T: additive in
u. Within a chunk u_i needs u_j of earlier rows only, (I + A) u = beta (v - k h), A_ij = beta_i k_i decay_ij k_j, j < i
(arXiv 2406.06484, section 3.2, and 2412.06464, appendix A).
"""

from functools import partial

import torch

from liger_ops._torch.additive import read, score_pairs, scores
from liger_ops._torch.decay import Decay, make_decay
from liger_ops._torch.layout import full_precision, head_major, pack, unpack
from liger_ops._torch.segments import Plan, define

# Chunks of a segment: its states stay in a core's cache, and its dispatch costs little beside it.
_CHUNKS = 64


def _corrected(
    k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B,H,N,C,K], v [B,H,N,C,V], beta [B,H,N,C] -> u for an empty state [B,H,N,C,V], and what a state takes away
    from it, [B,H,N,C,K].

    In float64: at beta = 2 nothing fades, and among parallel keys every product of two rounds alike, step after step.
    """
    dtype, weight = k.dtype, beta.double().unsqueeze(-1)
    k, decay = k.double(), make_decay(g if g is None else g.double())
    a = score_pairs(k.unsqueeze(4), k, decay).squeeze(4).tril(-1) * weight
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    inverse = torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True) * weight.transpose(-1, -2)
    return (inverse @ v.double()).to(dtype), (inverse @ (k if decay is None else k * decay.start)).to(dtype)


def _through(
    k: torch.Tensor, u: torch.Tensor, taken: torch.Tensor, decay: Decay | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunk by chunk: the corrected values [B,H,N,C,V], the states before chunks [B,H,N,K,V], and the last one."""
    k = (k if decay is None else k * decay.end).transpose(-1, -2)
    heads, state = state.shape[:2], state.flatten(0, 1)
    keep = [None] * k.shape[2] if decay is None else decay.total.flatten(0, 1).unsqueeze(-1).unbind(1)
    values, before = [], []
    for u_n, taken_n, k_n, keep_n in zip(*(x.flatten(0, 1).unbind(1) for x in (u, taken, k)), keep, strict=True):
        before.append(state)
        values.append(torch.baddbmm(u_n, taken_n, state, alpha=-1))
        state = torch.baddbmm(state if keep_n is None else keep_n * state, k_n, values[-1])
    values, before = (torch.stack(x, 1).unflatten(0, heads) for x in (values, before))
    return values, before, state.unflatten(0, heads)


def _segment(chunk, scale, rows, state, out, q, k, v, beta, g):
    """One segment: q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], beta [B,T,H], g per head or per channel, state [B,H,K,V]."""
    T, H = q.shape[1], k.shape[2]
    C = min(chunk, T)
    N, short = -(-T // C), -T % C
    k, v, beta, g = (None if x is None else head_major(x, short).unflatten(2, (N, C)) for x in (k, v, beta, g))
    decay = make_decay(g)
    u, taken = _corrected(k, v, beta, g)
    u, before, state = _through(k, u, taken, decay, state)
    a, q = scores(pack(q, H, C), k, decay, scale)
    o = unpack(read(a, u, q, before, None), T)
    return o.flatten(2, 3) if out is None else out.unflatten(2, (H, -1)).copy_(o), state


def _plan(q, k, v, beta, g, state, cu_seqlens, scale, chunk):
    body, inputs = partial(_segment, chunk, scale), [q, k, v, beta, g]
    return Plan(body, _CHUNKS * chunk, v.shape[-1], state, inputs, [0] * len(inputs), cu_seqlens)


_delta = define(
    "delta",
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor state, Tensor? cu_seqlens, float scale, int chunk",
    _plan,
)


@full_precision
def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    chunk: int,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], beta [B,T,H] -> o [B,T,HQ,V], state [N,H,K,V], N batch or sequences.

    Log decays g [B,T,H] or [B,T,H,K], or None. Computes in float32 (float64 for float64 inputs) and returns o in the
    dtype of v.
    """
    dtype, (B, T, H, K), V = v.dtype, k.shape, v.shape[-1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, beta, g = (None if x is None else x.to(work) for x in (q, k, v, beta, g))
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    state = q.new_zeros(N, H, K, V) if state is None else state.to(work)
    if T == 0 or B == 0:
        return q.new_zeros(B, T, q.shape[2], V).to(dtype), state.clone()
    if T == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        o, state = step(q[:, 0] * scale, k[:, 0], v[:, 0], beta[:, 0], g if g is None else g[:, 0], state)
        o = o.unsqueeze(1)
    else:
        o, state, _ = _delta(q, k, v, beta, g, state, cu_seqlens, scale, chunk)
    return o.to(dtype), state


def step(q, k, v, beta, g, state):
    """One token: q [B,HQ,K], k [B,H,K], v [B,H,V], beta [B,H], g like beta or k or None, state [B,H,K,V]."""
    if g is not None:
        state = state * (g.unsqueeze(-1) if g.ndim == 3 else g[..., None, None]).exp()
    k = k.unsqueeze(-2)
    u = beta[..., None, None] * (v.unsqueeze(-2) - k @ state)
    state = state + k.transpose(-1, -2) * u
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2), state
