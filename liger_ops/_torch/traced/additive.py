"""The additive recurrence on chunks, in operations that autograd records: scores, what enters a state, what is read.

Shapes: B batch, H key/value heads, G query heads per key/value head, K key width, V value width, N chunks of C tokens.
"""

import torch

from liger_ops._torch.decay import Decay, between, carried, unit


def _factored(own: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Scores whose lower triangle a [B,H,N,C*G,C] is a factored product and whose diagonal own [B,H,N,C,G] is not.

    Row i never decays its own key: factors would round it and spoil the gate's gradient.
    """
    C = own.shape[3]
    strict = torch.ones(C, C, dtype=torch.bool, device=a.device).tril(-1).unsqueeze(1)
    eye = torch.eye(C, dtype=a.dtype, device=a.device).unsqueeze(1)
    return torch.where(strict, a.view(*own.shape, C), own.unsqueeze(-1) * eye)


def decayed_products(q: torch.Tensor, k: torch.Tensor, decay: Decay | None) -> torch.Tensor:
    """q [B,H,N,C,G,K], k [B,H,N,C,K] -> decayed causal scores [B,H,N,C,G,C]."""
    C = q.shape[3]
    causal = torch.ones(C, C, dtype=q.dtype, device=q.device).tril()
    if decay is None or decay.pairs is not None:
        weights = (causal if decay is None or decay.pairs is None else decay.pairs).unsqueeze(-2)
        a = (q.flatten(3, 4) @ k.transpose(-1, -2)).view(*q.shape[:5], -1)
        return a * weights if torch.is_grad_enabled() else a.mul_(weights)
    if decay.apart is not None:
        fall, rise, half = decay.apart
        of_q, of_k = unit(q, half), unit(k, half)
        a = (q * (fall / of_q).unsqueeze(4)).flatten(3, 4) @ (k * (rise / of_k)).transpose(-1, -2)
        return _factored((q * k.unsqueeze(4)).sum(-1), a * (of_q * of_k))
    decayed = between(decay.sums, q.dtype) * k.unsqueeze(3)
    return torch.einsum("bhncgk,bhncjk->bhncgj", q, decayed) * causal.unsqueeze(1)


def decayed_scores(
    q: torch.Tensor, k: torch.Tensor, decay: Decay | None, gain: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,N,C,G,K], which it may change, k [B,H,N,C,K], gain a number or [H,1,1,G,1], a factor on q.

    Returns the decayed causal scores [B,H,N,C,G,C] and the queries as the state before the chunk sees them.
    """
    records = torch.is_grad_enabled()
    if decay is None or records or decay.apart is None:
        a, start = decayed_products(q, k, decay), gain if decay is None else decay.start.unsqueeze(4) * gain
        # Nothing else reads either.
        return (a * gain, q * start) if records else (a.mul_(gain), q.mul_(start))
    # The same to a rounding, with one pass over the queries.
    fall, rise, half = decay.apart
    of_q, of_k = unit(q, half), unit(k, half)
    q.mul_((fall / of_q).unsqueeze(4) * gain)
    a = (q.flatten(3, 4) @ (k * (rise / of_k)).transpose(-1, -2)).view(*q.shape[:5], -1)
    if half != 1.0:
        a, q = a.mul_(of_q * of_k), q.div_(half / of_q)
    # What lies above the diagonal may be infinite.
    C = q.shape[3]
    above = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    return a.masked_fill_(above.unsqueeze(1), 0.0), q


def products(x: torch.Tensor) -> torch.Tensor:
    """[B,H,N,C,G,D] or [B,H,N,K,V] -> one batch of matrices [B*H*N,C*G,D] or [B*H*N,K,V]."""
    return (x.flatten(3, 4) if x.ndim == 6 else x).flatten(0, 2)


def read(a: torch.Tensor, v: torch.Tensor, q: torch.Tensor, before: torch.Tensor, decay: Decay | None) -> torch.Tensor:
    """Scores a [B,H,N,C,G,C] over v [B,H,N,C,V], which decays by value channel, plus q over the state before."""
    if decay is None:
        o = torch.bmm(products(a), products(v)).baddbmm_(products(q), products(before))
        return o.view(*q.shape[:5], -1)
    start = decay.start.unsqueeze(4)
    o = (q.flatten(3, 4) @ before).view(*q.shape[:5], -1) * start
    if decay.apart is None:
        return o + torch.einsum("bhncgj,bhncjv,bhnjv->bhncgv", a, between(decay.sums, v.dtype), v)
    own = a.diagonal(dim1=3, dim2=5).transpose(-1, -2)
    strict = a * torch.ones(a.shape[3], a.shape[3], dtype=a.dtype, device=a.device).tril(-1).unsqueeze(1)
    fall, rise, half = decay.apart
    of_v = unit(v, half)
    earlier = (strict.flatten(3, 4) @ (v * (rise / of_v))).view_as(o)
    return o + earlier * (fall * of_v).unsqueeze(4) + own.unsqueeze(-1) * v.unsqueeze(4)


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
        keep = added.new_ones(()) if decay is None else decay.total.unsqueeze(-1)
        keep = keep if decay_v is None else keep * decay_v.total.unsqueeze(-2)
        return _one_by_one(added, keep, state)
    weights = None if decay is None else decay.carry
    weights = carried(added.new_zeros(B, H, N), added.dtype) if weights is None else weights
    state, added = state.reshape(B * H, 1, K * V), added.view(B * H, N, K * V)
    before, after = (
        (weights[:, rows, :1] * state).baddbmm_(weights[:, rows, 1:], added).view(B, H, -1, K, V)
        for rows in (slice(0, N), slice(N, N + 1))
    )
    return before, after.squeeze(2)
