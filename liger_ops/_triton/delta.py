"""The delta rule on chunks: the additive recurrence over values that rows of a chunk correct, forwards and backwards.

Shapes: B batch, T time, S = B * T tokens, N sequences, H key/value heads, HQ = G * H query heads, K key width,
V value width, C rows of a chunk.

A key that reads the state before its token asks like one more query head of its group. In that reading the gradients
are those of the additive recurrence: what the last head of a group gets goes to its key.
"""

from typing import NamedTuple

import torch
from triton import cdiv

from liger_ops._inputs import Gradients, RecurrenceInputs
from liger_ops._triton import corrections
from liger_ops._triton.additive import Call, channel_scores, differentiate, prepare, read, values_gradient
from liger_ops._triton.launch import LAUNCHER, Launcher, block
from liger_ops.limits import WIDEST_KEY


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


class _States(NamedTuple):
    """h [chunks,H,K,V] at the bounds of chunks, errors e (if kept) and corrected values u [S,H,V], the last state."""

    h: torch.Tensor
    e: torch.Tensor
    u: torch.Tensor
    last: torch.Tensor


def _inverse(x: Call, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores a, per channel, and m, both [S,H,C] in float32, or float64 for float32 keys."""
    H, kind, C = x.sizes["H"], torch.float64 if x.k.dtype == torch.float32 else torch.float32, x.constants["C"]
    m = x.k.new_empty(len(x.k), H, C, dtype=kind)
    a = channel_scores(x._replace(q=x.k), kind)
    g = x.k if x.g is None else x.g
    x.launch(corrections.inverse_kernel, (x.count, H), beta=beta, g=g, a=a, m=m)
    return a, m


def _mixed(x: Call, m, rows, beta, sign=1.0, transposed=False, decayed=False) -> torch.Tensor:
    """sign m rows [S,H,D] in float32, or sign m^T beta rows; decayed to the chunk's start, or its end."""
    _, H, D = rows.shape
    y = torch.empty_like(rows, dtype=torch.float32)
    decayed = decayed and x.constants["GATED"]
    constants = dict(TRANSPOSED=transposed, DECAYED=decayed, PER_CHANNEL=x.per_channel and decayed)
    given = dict(m=m, x=rows, beta=beta, y=y, sign=sign, K=D, V=D)
    x.launch(corrections.mixed_kernel, lambda c: (x.count, cdiv(D, c.BK), H), **given, **constants)
    return y


def _states(x: Call, rows, taken, beta, first, do=None, scale=1.0, keep=True) -> _States:
    """With do backwards in time; the corrected values mean nothing then."""
    H, K, V = (x.sizes[n] for n in ("H", "K", "V"))
    kept = torch.bfloat16 if x.k.dtype == torch.bfloat16 else torch.float32
    h = x.k.new_empty(x.count, H, K, V, dtype=kept)
    u, last = torch.empty_like(rows), torch.empty_like(first)
    e = torch.empty_like(rows) if keep and do is None else u
    given = dict(x=rows, y=taken, beta=beta, do=x.q if do is None else do, first=first, h=h, e=e, u=u, last=last)
    constants = dict(REVERSE=do is not None, KEEP=keep, WIDTH=block(K, WIDEST_KEY))
    x.launch(
        corrections.corrected_states_kernel,
        lambda c: (len(first) * H, cdiv(V, c.BV)),
        **given,
        **constants,
        sequences=x.chunks.sequences,
        scale=scale,
    )
    return _States(h, e, u, last)


def _forward(x: Call, beta, state, keep: bool) -> _Held:
    a, m = _inverse(x, beta)
    rows, taken = _mixed(x, m, x.v, beta), _mixed(x, m, x.k, beta, decayed=True)
    return _Held(a, m, *_states(x, rows, taken, beta, state, keep=keep))


def _prepare(x: RecurrenceInputs, launcher: Launcher) -> tuple[Call, torch.Tensor]:
    # Longer chunks cost more to invert than they save.
    call = prepare(x._replace(chunk=32 if x.chunk is None else min(x.chunk, 32)), launcher)
    # Corrected values change sign from row to row where keys are alike: bfloat16 gets as many digits as float16.
    finer = launcher.precision(torch.float16 if x.q.dtype == torch.bfloat16 else x.q.dtype)
    return call._replace(constants=call.constants | dict(PRECISION=finer)), x.beta.float().contiguous().flatten(0, 1)


def forward(x: RecurrenceInputs, launcher: Launcher = LAUNCHER) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B,T,HQ,V] like v, and the last state [N,H,K,V]."""
    call, beta = _prepare(x, launcher)
    held = _forward(call, beta, x.state.contiguous(), keep=False)
    o = x.v.new_empty(*x.q.shape[:3], x.v.shape[-1])
    read(call._replace(v=held.u), held.h, o)
    return o, held.last


def backward(
    x: RecurrenceInputs,
    do: torch.Tensor,
    dstate: torch.Tensor,
    gate: bool,
    kind: torch.dtype | None = None,
    launcher: Launcher = LAUNCHER,
) -> Gradients:
    """Of q, k (both in dtype kind, or as they are), v, beta and the initial state, and of g if it is wanted."""
    call, beta = _prepare(x, launcher)
    H, G = call.sizes["H"], call.sizes["G"]
    do = do.contiguous().flatten(0, 1)
    held = _forward(call, beta, x.state.contiguous(), keep=True)
    call = call._replace(v=held.u)
    a = channel_scores(call)
    own = _mixed(call, held.m, values_gradient(call, a, held.h, do, alone=True), beta, -1.0, transposed=True)
    taken = _mixed(call, held.m, call.k, beta, transposed=True, decayed=True)
    back = _states(call, own, taken, beta, dstate.contiguous(), do, x.scale)
    dh, dv = back.h, back.e

    asked = torch.cat([call.q.unflatten(1, (H, G)), call.k.unsqueeze(2)], 2).flatten(1, 2)
    # The errors' gradients cancel where keys are alike, and reach further than float16.
    told = torch.cat([do.float().unflatten(1, (H, G)), dv.unsqueeze(2)], 2).flatten(1, 2)
    both = call._replace(q=asked, constants=call.constants | dict(STRICT=True))
    dq, dk, dg = differentiate(both, held.h, dh, told, gate, kind)
    dq = dq.unflatten(1, (H, G + 1))[:, :, :G].reshape(x.q.shape)
    if call.per_channel:
        a = torch.cat([a.unflatten(1, (H, G)), held.a.to(a.dtype).unsqueeze(2)], 2).flatten(1, 2)
    dbeta = (values_gradient(both, a, dh, told) * held.e).sum(-1)
    return Gradients(
        q=dq,
        k=dk.view(x.k.shape),
        v=dv.neg().to(x.v.dtype).view(x.v.shape),
        g=None if dg is None else dg.view(x.g.shape).to(x.g.dtype),
        beta=dbeta.to(x.beta.dtype).view(x.beta.shape),
        state=back.last,
    )
