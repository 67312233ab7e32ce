"""Chunked additive recurrence h_t = exp(g_t) h_{t-1} + k_t v_t^T, in segments.

Shapes: B batch, T time, HQ query heads, H key/value heads, G query heads per key/value head, K key width, V value
width, N chunks of C tokens. Every exponent is a sum of log decays, never a difference of two such sums; the one
exception is a gate per channel whose chunks sum to no less than _FACTORABLE, anchored at their own first row.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from liger_ops._torch.layout import head_major, pack, unpack
from liger_ops._torch.segments import segmented

_SEGMENT = 1024
_FACTORABLE = -80.0


def _between(g: torch.Tensor) -> torch.Tensor:
    """g [B,H,N,C,...] -> running sums over rows j < l <= i, [B,H,N,C(i),C(j),...]; zero where i <= j."""
    C = g.shape[3]
    later = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    later = later.view(C, C, *[1] * (g.ndim - 4))
    return torch.where(later, g.unsqueeze(4), 0.0).cumsum(3)


class Decay(NamedTuple):
    """Log decays g [B,H,N,C] or [B,H,N,C,K], and what they amount to.

    start and end [B,H,N,C,1 or K] are factors from the chunk's start to a row and from a row to its end, total
    [B,H,N,1 or K] the logarithm over the whole chunk, lowest the smallest of these as a number.
    """

    g: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    total: torch.Tensor
    lowest: float


def make_decay(g: torch.Tensor | None) -> Decay | None:
    if g is None:
        return None
    wide = g if g.ndim == 5 else g.unsqueeze(-1)
    start, end = wide.cumsum(3), wide.flip(3).cumsum(3).flip(3)
    end = torch.cat([end[:, :, :, 1:], torch.zeros_like(end[:, :, :, :1])], 3)
    total = start[:, :, :, -1]
    return Decay(g, start.exp(), end.exp(), total, total.detach().amin().item())


def _times(x: torch.Tensor, y: torch.Tensor | float) -> torch.Tensor:
    """x * y for an x that nothing else reads: in place unless autograd records."""
    return x * y if torch.is_grad_enabled() else x.mul_(y)


def _scores(q: torch.Tensor, k: torch.Tensor, decay: Decay | None) -> torch.Tensor:
    """q [B,H,N,C,G,K], k [B,H,N,C,K] -> decayed causal scores [B,H,N,C,G,C]."""
    causal = torch.ones(q.shape[3], q.shape[3], dtype=q.dtype, device=q.device).tril()
    if decay is None or decay.g.ndim == 4:
        weights = causal if decay is None else _between(decay.g).exp().tril()
        return _times((q.flatten(3, 4) @ k.transpose(-1, -2)).view(*q.shape[:5], -1), weights.unsqueeze(-2))
    g = decay.g
    if decay.lowest >= _FACTORABLE:
        # Row i never decays its own key, so the diagonal stays out of the factored product and its gradient.
        a = (q * decay.start.unsqueeze(4)).flatten(3, 4) @ (k * (-g.cumsum(3)).exp()).transpose(-1, -2)
        own = (q * k.unsqueeze(4)).sum(-1)
        eye = torch.eye(len(causal), dtype=q.dtype, device=q.device).unsqueeze(1)
        return torch.where(causal.tril(-1).bool().unsqueeze(1), a.view(*q.shape[:5], -1), own.unsqueeze(-1) * eye)
    decayed = _between(g).exp() * k.unsqueeze(3)
    return torch.einsum("bhncgk,bhncjk->bhncgj", q, decayed) * causal.unsqueeze(1)


def scores(
    q: torch.Tensor, k: torch.Tensor, decay: Decay | None, gain: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,N,C,G,K], which it may change, k [B,H,N,C,K], gain a number or [H,1,1,G,1], a factor on q.

    Returns the decayed causal scores [B,H,N,C,G,C] and the queries as the state before the chunk sees them.
    """
    a = _times(_scores(q, k, decay), gain)
    return a, _times(q, gain if decay is None else decay.start.unsqueeze(4) * gain)


def products(x: torch.Tensor) -> torch.Tensor:
    """[B,H,N,C,G,D] or [B,H,N,K,V] -> one batch of matrices [B*H*N,C*G,D] or [B*H*N,K,V]."""
    return (x.flatten(3, 4) if x.ndim == 6 else x).flatten(0, 2)


def enter(
    k: torch.Tensor, v: torch.Tensor, decay: Decay | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B,H,N,C,K], v [B,H,N,C,V], state [B,H,K,V] -> the state before each chunk [B,H,N,K,V], and after the last."""
    added = (k if decay is None else k * decay.end).transpose(-1, -2) @ v
    (B, H, N, K, V), total = added.shape, None if decay is None else decay.total
    if total is not None and total.shape[-1] > 1:
        states = [state]
        for new, keep in zip(added.unbind(2), total.exp().unsqueeze(-1).unbind(2), strict=True):
            states.append(torch.addcmul(new, keep, states[-1]))
        return torch.stack(states[:-1], 2), states[-1]
    total = added.new_zeros(B, H, 1) if total is None else total.squeeze(-1)
    total = F.pad(total.expand(-1, -1, N), (1, 0)).unsqueeze(2)
    weights = _between(total).squeeze(2).exp().tril().flatten(0, 1)
    state, added = state.reshape(B * H, 1, K * V), added.view(B * H, N, K * V)
    before, after = (
        (weights[:, rows, :1] * state).baddbmm_(weights[:, rows, 1:], added).view(B, H, -1, K, V)
        for rows in (slice(0, N), slice(N, N + 1))
    )
    return before, after.squeeze(2)


def _segment(chunk, scale, rows, state, out, q, k, v, g):
    """One segment: q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], g per head or per channel, state [B,H,K,V]."""
    T, H = q.shape[1], k.shape[2]
    C = min(chunk, T)
    N, short = -(-T // C), -T % C
    k, v, g = (None if x is None else head_major(x, short).unflatten(2, (N, C)) for x in (k, v, g))
    decay = make_decay(g)
    before, state = enter(k, v, decay, state)
    a, q = scores(pack(q, H, C), k, decay, scale)
    o = torch.bmm(products(a), products(v)).baddbmm_(products(q), products(before))
    o = unpack(o.view(*q.shape[:5], -1), T)
    return o.flatten(2, 3) if out is None else out.unflatten(2, (H, -1)).copy_(o), state


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], g [B,T,H], [B,T,H,K] or None -> o [B,T,HQ,V], state [B,H,K,V].

    Computes in float32 (float64 for float64 inputs) and returns o in the dtype of q.
    """
    dtype, (B, T, H, K), V = q.dtype, k.shape, v.shape[-1]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(work), k.to(work), v.to(work)
    g = None if g is None else g.to(work)
    state = q.new_zeros(B, H, K, V) if state is None else state.to(work)
    if T == 0:
        return q.new_zeros(B, 0, q.shape[2], V).to(dtype), state
    if T == 1 and not torch.is_grad_enabled():
        o, state = _step(q[:, 0] * scale, k[:, 0], v[:, 0], None if g is None else g[:, 0], state)
    else:
        step = max(_SEGMENT // chunk, 1) * chunk
        o, state = segmented(partial(_segment, chunk, scale), step, V, state, [q, k, v, g], [0, 0, 0, 0])
    return o.to(dtype), state


def _step(q, k, v, g, state):
    """One token: q [B,HQ,K], k [B,H,K], v [B,H,V], state [B,H,K,V]."""
    if g is not None:
        state = state * (g.unsqueeze(-1) if g.ndim == 3 else g[..., None, None]).exp()
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2).unsqueeze(1), state
