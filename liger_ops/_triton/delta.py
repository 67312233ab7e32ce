"""The delta rule on chunks: the additive recurrence over values that rows of a chunk correct, forwards and backwards.

Shapes: B batch, T time, S = B * T tokens, N sequences, H key/value heads, HQ = G * H query heads, K key width,
V value width, C rows of a chunk.

A key that reads the state before its token asks like one more query head of its group. In that reading the gradients
are those of the additive recurrence: what the last head of a group gets goes to its key.
"""

from typing import NamedTuple

import torch
from triton import cdiv

from liger_ops._triton import corrections
from liger_ops._triton.additive import Call, differentiate, prepare, read, scores, values_gradient
from liger_ops._triton.launch import block, launch, precision


class _Held(NamedTuple):
    """Scores a [S,H,C] of the keys among themselves, the inverse m [S,H,C], states h [chunks,H,K,V] before chunks,
    errors e (or, not kept, anything) and values u = beta e [S,H,V], last.
    """

    a: torch.Tensor
    m: torch.Tensor
    h: torch.Tensor
    e: torch.Tensor
    u: torch.Tensor
    last: torch.Tensor


def _inverse(x: Call, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores a, per channel, and m, both [S,H,C] in float32, or float64 for float32 keys."""
    H, _, K, V, _ = x.sizes
    kind, C = torch.float64 if x.k.dtype == torch.float32 else torch.float32, x.constants["C"]
    m = x.k.new_empty(len(x.k), H, C, dtype=kind)
    a = scores(x._replace(q=x.k), kind)
    args = x.k, beta, x.k if x.g is None else x.g, a, m, x.chunks.chunks, H, K
    launch(corrections.inverse_kernel, lambda _: (len(x.chunks.chunks), H), K, V, *args, **x.constants)
    return a, m


def _mixed(x: Call, m, rows, beta, sign=1.0, transposed=False, decayed=False) -> torch.Tensor:
    """sign m rows [S,H,D] in float32, or sign m^T beta rows; decayed to the chunk's start, or its end."""
    (_, H, D), KG = rows.shape, x.sizes[-1]
    y = torch.empty_like(rows, dtype=torch.float32)
    decayed = decayed and x.constants["GATED"]
    args = m, rows, beta, *x.decays[:2], y, x.chunks.chunks, sign, H, D, KG
    constants = {**x.constants, "TRANSPOSED": transposed, "DECAYED": decayed}
    constants["PER_CHANNEL"] = constants["PER_CHANNEL"] and decayed
    launch(corrections.mixed_kernel, lambda c: (len(x.chunks.chunks), cdiv(D, c.BK), H), D, D, *args, **constants)
    return y


def _states(x: Call, rows, taken, beta, first, do=None, scale=1.0, keep=True):
    """States at the bounds of chunks, errors (if to be kept) and corrected values, and the last state.

    With do backwards in time; the corrected values mean nothing then.
    """
    H, G, K, V, KG = x.sizes
    kept = torch.bfloat16 if x.k.dtype == torch.bfloat16 else torch.float32
    h = x.k.new_empty(len(x.chunks.chunks), H, K, V, dtype=kept)
    u, last = torch.empty_like(rows), torch.empty_like(first)
    e = torch.empty_like(rows) if keep and do is None else u
    args = x.k, rows, taken, beta, *x.decays[:2], x.q, x.q if do is None else do, first, h, e, u, last
    args = *args, x.chunks.sequences, scale, H, G, K, V, KG
    constants = {**x.constants, "REVERSE": do is not None, "KEEP": keep, "WIDTH": block(K, 256)}
    launch(corrections.corrected_states_kernel, lambda c: (len(first) * H, cdiv(V, c.BV)), K, V, *args, **constants)
    return h, e, u, last


def _forward(x: Call, beta, state, keep: bool) -> _Held:
    a, m = _inverse(x, beta)
    rows, taken = _mixed(x, m, x.v, beta), _mixed(x, m, x.k, beta, decayed=True)
    h, e, u, last = _states(x, rows, taken, beta, state, keep=keep)
    return _Held(a, m, h, e, u, last)


def _prepare(q, k, v, beta, g, cu_seqlens, chunk) -> tuple[Call, torch.Tensor]:
    # Longer chunks cost more to invert than they save.
    x = prepare(q, k, v, g, cu_seqlens, 32 if chunk is None else min(chunk, 32))
    # Corrected values change sign from row to row where keys are alike: bfloat16 gets as many digits as float16.
    finer = precision(torch.float16 if q.dtype == torch.bfloat16 else q.dtype)
    return x._replace(constants={**x.constants, "PRECISION": finer}), beta.float().contiguous().flatten(0, 1)


def forward(q, k, v, beta, g, state, cu_seqlens, scale, chunk):
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], beta [B,T,H], g like beta or k or None, state [N,H,K,V] -> o, last."""
    x, beta = _prepare(q, k, v, beta, g, cu_seqlens, chunk)
    held = _forward(x, beta, state.contiguous(), keep=False)
    o = v.new_empty(*q.shape[:3], v.shape[-1])
    read(x._replace(v=held.u), held.h, scale, o)
    return o, held.last


def backward(do, dstate, q, k, v, beta, g, state, cu_seqlens, scale, chunk, gate_gradient, kind=None):
    """The gradients of q, k (both in dtype kind, or as they are), v, beta, g (None unless gate_gradient) and state."""
    x, weights = _prepare(q, k, v, beta, g, cu_seqlens, chunk)
    H, G = x.sizes[:2]
    do = do.contiguous().flatten(0, 1)
    a_k, m, h, e, u, _ = _forward(x, weights, state.contiguous(), keep=True)
    x = x._replace(v=u)
    a = scores(x)
    own = _mixed(x, m, values_gradient(x, a, h, do, scale, alone=True), weights, -1.0, transposed=True)
    taken = _mixed(x, m, x.k, weights, transposed=True, decayed=True)
    dh, dv, _, dfirst = _states(x, own, taken, weights, dstate.contiguous(), do, scale)

    asked = torch.cat([x.q.unflatten(1, (H, G)), x.k.unsqueeze(2)], 2).flatten(1, 2)
    # The errors' gradients cancel where keys are alike, and reach further than float16.
    told = torch.cat([do.float().unflatten(1, (H, G)), dv.unsqueeze(2)], 2).flatten(1, 2)
    both = x._replace(q=asked, constants={**x.constants, "STRICT": True})
    dq, dk, dg = differentiate(both, h, dh, told, scale, gate_gradient, kind)
    dq = dq.unflatten(1, (H, G + 1))[:, :, :G].reshape(q.shape)
    if x.per_channel:
        a = torch.cat([a.unflatten(1, (H, G)), a_k.to(a.dtype).unsqueeze(2)], 2).flatten(1, 2)
    dbeta = (values_gradient(both, a, dh, told, scale) * e).sum(-1)
    dg = dg.view(g.shape).to(g.dtype) if gate_gradient else None
    return dq, dk.view(k.shape), dv.neg().to(v.dtype).view(v.shape), dbeta.to(beta.dtype).view(beta.shape), dg, dfirst
