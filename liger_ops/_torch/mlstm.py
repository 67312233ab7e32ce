"""Chunked mLSTM: the additive recurrence in units that follow the largest exponential input gate so far.

Shapes: as in `additive`; U = V + 1, the last value column 1: the normaliser. The state [B,H,K+1,U] holds exp(-m) times
the sums in its first K rows and m, the logarithm of its unit, in the last.
"""

from functools import partial

import torch

from liger_ops._torch.additive import between, products, running
from liger_ops._torch.layout import full_precision, head_major, head_major_ones, pack, unpack
from liger_ops._torch.segments import Plan, define, whole_chunks

# A unit below exp(-80) would overflow in the floor of the denominator, exp(-m), and buys nothing.
_SMALLEST = -80.0


def _segment(chunk, scale, rows, state, out, q, k, v, i, f):
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], input and forget gates i, f [B,T,H] as logarithms."""
    (B, T), H = q.shape[:2], k.shape[2]
    C = min(chunk, T)
    N, short = -(-T // C), -T % C
    k, f = (head_major(x, short).unflatten(2, (N, C)) for x in (k, f))
    v = head_major_ones(v, short).unflatten(2, (N, C))
    # Padding enters with weight exp(-inf).
    i = torch.cat([i, i.new_full((B, short, H), -torch.inf)], 1).transpose(1, 2).unflatten(2, (N, C))
    held, unit = state[:, :, :-1], state[:, :, -1, 0].detach()

    sums = running(f)
    start, total = sums.to(f.dtype), sums[:, :, :, -1].to(f.dtype)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    log = (between(sums, f.dtype) + i.unsqueeze(3)).masked_fill(~causal, -torch.inf)
    leaving = log[..., -1, :]
    units = [unit]
    for kept, largest in zip(total.detach().unbind(2), leaving.detach().amax(-1).unbind(2), strict=True):
        units.append(torch.maximum(kept + units[-1], largest).clamp(min=_SMALLEST))
    units = torch.stack(units, 2)

    weighed = k * (leaving - units[:, :, 1:, None]).exp().unsqueeze(-1)
    added = weighed.transpose(-1, -2) @ v
    keep = (total + units[:, :, :-1] - units[:, :, 1:]).exp()[..., None, None]
    states = [held]
    for n in range(N):
        states.append(torch.addcmul(added[:, :, n], keep[:, :, n], states[-1]))

    carried = start + units[:, :, :-1, None]
    top = torch.maximum(log.detach().amax(-1), carried.detach()).clamp(min=_SMALLEST).unsqueeze(-1)
    q = pack(q, H, C) * scale
    a = (q.flatten(3, 4) @ k.transpose(-1, -2)).view(*q.shape[:5], C) * (log - top).exp().unsqueeze(4)
    read = q * (carried.unsqueeze(-1) - top).exp().unsqueeze(4)
    o = torch.bmm(products(a), products(v)).baddbmm_(products(read), products(torch.stack(states[:-1], 2)))
    o = o.view(*q.shape[:5], -1)
    floor = torch.maximum(o[..., -1:].abs(), (-top).exp().unsqueeze(4))
    o = unpack(o[..., :-1] / floor, T)
    last = units[:, :, -1:, None].expand(-1, -1, 1, v.shape[-1])
    return o.flatten(2, 3) if out is None else out.unflatten(2, (H, -1)).copy_(o), torch.cat([states[-1], last], 2)


def _plan(q, k, v, i, f, state, scale, chunk):
    return Plan(partial(_segment, chunk, scale), whole_chunks(chunk), v.shape[-1], state, [q, k, v, i, f], [0] * 5)


_mlstm = define(
    "mlstm", "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor state, float scale, int chunk", _plan
)


@full_precision
def mlstm(q, k, v, i, f, scale, state, chunk):
    """Arguments as `_segment`, state [B,H,K+1,U]; returns o [B,T,HQ,V] and the state, in the dtype of q."""
    if not q.shape[0] * q.shape[1]:
        return v.new_zeros(*q.shape[:3], v.shape[-1]), state
    return _mlstm(q, k, v, i, f, state, scale, chunk)[:2]
