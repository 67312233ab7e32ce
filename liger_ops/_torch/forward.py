"""The additive recurrence where nothing records: in place, chunks outermost, so that a scan steps through one block.

Shapes: as in `additive`, except that chunks come first: [N,B,H,C,...].
"""

import itertools

import torch
import torch.nn.functional as F

from liger_ops._torch.decay import FACTORABLE, factor, margin, running, unit


def _by_chunk(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B,T,H,...] -> a view [N,B,H,C,...] if T is a multiple of C, of a zero-padded copy otherwise."""
    short = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short)) if short else x
    x = x.unflatten(1, (-1, size))
    return x.permute(1, 0, 3, 2, *range(4, x.ndim))


def _packed(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _matrices(x: torch.Tensor) -> torch.Tensor:
    """[N,B,H,...] -> one batch of matrices; query heads of a key head count as rows."""
    return (x.flatten(3, 4) if x.ndim == 6 else x).flatten(0, 2)


def _cut(a: torch.Tensor, rows: int) -> torch.Tensor:
    """a [...,C*rows,C] in place, zero where a key comes after its query, whatever was there: infinite, not a number."""
    C, bits = a.shape[-1], torch.int64 if a.dtype == torch.float64 else torch.int32
    seen = -torch.ones(C, C, dtype=bits, device=a.device).tril()
    a.flatten(-2).view(bits).bitwise_and_(seen.unsqueeze(1).expand(-1, rows, -1).flatten())
    return a


def _states(k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """k [N,B,H,C,K] decayed to the end of its chunk, keep [N,B,H,1 or K,1] -> states around chunks [N+1,B,H,K,V]."""
    states = k.new_empty(len(k) + 1, *state.shape)
    states[0] = state
    torch.bmm(_matrices(k).transpose(1, 2), _matrices(v), out=states[1:].flatten(0, 2))
    each = states.unbind()
    if keep is None:
        for before, after in itertools.pairwise(each):
            after += before
    else:
        for (before, after), kept in zip(itertools.pairwise(each), keep.unbind(), strict=True):
            after.addcmul_(kept, before)
    return states


def _per_head(q, k, g):
    """Scores, and the queries, keys and factors that `_states` and the state before a chunk want."""
    G, q, k = q.shape[4], _packed(q), _packed(k)
    a = torch.bmm(_matrices(q), _matrices(k).transpose(1, 2))
    if g is None:
        return _cut(a, G), q, k, None
    sums = running(g)
    last = sums[..., -1:]
    log = a.new_empty(*sums.shape, sums.shape[-1])
    # Above the diagonal, where the difference is no decay, nothing that could overflow.
    torch.sub(sums.unsqueeze(4), sums.unsqueeze(3), out=log).clamp_(max=0.0)
    weights = _cut(factor(log, q.dtype), 1)
    a.view(-1, *q.shape[3:5], a.shape[-1]).mul_(weights.flatten(0, 2).unsqueeze(2))
    k *= factor(last - sums, k.dtype).unsqueeze(-1)
    q *= factor(sums, q.dtype)[..., None, None]
    return a, q, k, factor(last, k.dtype).unsqueeze(-1)


def _per_channel(q, k, g):
    """As `_per_head`; None where decays and their inverses may not multiply apart."""
    sums = _packed(g).cumsum(3, dtype=torch.float64)
    lowest = sums[:, :, :, -1].amin().item()
    if lowest < FACTORABLE:
        return None
    half = margin(lowest)
    of_q, of_k = unit(q, half), unit(k, half)
    start = sums.exp_()
    keep = start[:, :, :, -1].to(q.dtype, copy=True).unsqueeze(-1)
    fall = (start if half == 1.0 else start.mul_(half)).to(q.dtype)
    q = torch.mul(q, (fall if of_q == 1.0 else fall / of_q).unsqueeze(4), out=q.new_empty(q.shape))
    k = torch.div(k, fall if of_k == 1.0 else fall * of_k, out=k.new_empty(k.shape))
    a = _cut(torch.bmm(_matrices(q), _matrices(k).transpose(1, 2)), q.shape[4])
    if half != 1.0:
        a, q, fall = a.mul_(of_q * of_k), q.div_(half / of_q), fall.mul_(of_k)
    k *= fall[:, :, :, -1:]
    return a, q, k, keep


def forward(chunk, scale, state, out, q, k, v, g) -> torch.Tensor | None:
    """Fills out [B,T,HQ,V] and returns the state after the last token; None, and nothing done, for strong decays."""
    (_, T, H, _), C = k.shape, min(chunk, k.shape[1])
    q, k, v, g = (x if x is None else _by_chunk(x, C) for x in (q.unflatten(2, (H, -1)), k, v, g))
    found = _per_channel(q, k, g) if g is not None and g.ndim == 5 else _per_head(q, k, g)
    if found is None:
        return None
    a, q, k, keep = found
    v = _packed(v)
    states = _states(k, v, keep, state)
    o = torch.bmm(a, _matrices(v)).baddbmm_(_matrices(q), _matrices(states[:-1]))
    o, out = o.view(*q.shape[:5], -1).permute(1, 0, 3, 2, 4, 5), out.unflatten(2, (H, -1))
    whole = T // C
    torch.mul(o[:, :whole], scale, out=out[:, : whole * C].unflatten(1, (whole, C)))
    if T % C:
        torch.mul(o[:, whole, : T % C], scale, out=out[:, whole * C :])
    # A copy, so that the states of all chunks may go.
    return states[-1].clone()
