"""The additive recurrence on chunks, in operations that autograd records: what enters a state, and what is read.

Shapes: B batch, H key/value heads, G query heads per key/value head, K key width, V value width, N chunks of C tokens.
"""

import torch
import torch.nn.functional as F

from liger_ops._torch.decay import Decay, between, running, unit


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
    total = added.new_zeros(B, H, N) if decay is None else decay.sums[:, :, :, -1, 0]
    weights = between(running(F.pad(total, (1, 0)).unsqueeze(2)), added.dtype).squeeze(2).tril().flatten(0, 1)
    state, added = state.reshape(B * H, 1, K * V), added.view(B * H, N, K * V)
    before, after = (
        (weights[:, rows, :1] * state).baddbmm_(weights[:, rows, 1:], added).view(B, H, -1, K, V)
        for rows in (slice(0, N), slice(N, N + 1))
    )
    return before, after.squeeze(2)
