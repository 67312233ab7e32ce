"""Gradients of the additive recurrence, in place: what `forward` computes, again, and its transpose.

Shapes: as in `chunks`; do like o. With P_ij the share of the loss that runs from row j to a later row i, a log decay's
gradient is the sum of P_ij over all j before it and all i from it on: in its chunk, from the state before and to the
state behind.
"""

import torch
import torch.nn.functional as F

from liger_ops._inputs import Gradients, RecurrenceInputs
from liger_ops._torch.decay import factor, running
from liger_ops._torch.in_place.chunks import causal_products, chunks, fill, matrices, outermost, packed, rows, states
from liger_ops._torch.in_place.forward import factored, make_fall, weights


def _values(a, do, k, later):
    return torch.bmm(matrices(a).transpose(1, 2), matrices(do)).baddbmm_(matrices(k), matrices(later))


def _after(x: torch.Tensor) -> torch.Tensor:
    """Sums over each row of a chunk and those behind it, in float64: none a difference, in which small ones drown."""
    return x.flip(3).cumsum(3, dtype=torch.float64).flip(3)


def _before(x: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of a chunk before each, in float64."""
    return F.pad(x, (0, 0) * (x.ndim - 4) + (1, -1)).cumsum(3, dtype=torch.float64)


def _per_head(q, k, v, g, do, state, dlast, gate):
    """Gradients of q, k, v, g, if it is wanted, and of the state before."""
    q, k = packed(q), packed(k)
    a, read, end, keep, k_end = causal_products(q, k), do, None, None, k
    if g is not None:
        sums = running(outermost(g))
        last = sums[..., -1:]
        w = weights(sums, a.dtype).unsqueeze(3)
        a *= w
        end, keep = factor(last - sums, k.dtype).unsqueeze(-1), factor(last, k.dtype).unsqueeze(-1)
        k_end, read = k * end, do * factor(sums, do.dtype)[:, :, :, None, :, None]
    before = states(k_end, v, keep, state)[:-1]
    dstates = states(q, read, keep, dlast, reverse=True)
    later = dstates[1:]
    dv = _values(a, do, k_end, later)
    da = causal_products(do, v)
    dq = torch.bmm(matrices(read), matrices(before).transpose(1, 2))
    dk = torch.bmm(matrices(v), matrices(later).transpose(1, 2)).view(k.shape)
    dk = dk if end is None else dk.mul_(end)
    dg = None
    if gate and keep is not None:
        pairs = (da * a).sum(3)
        C = pairs.shape[-1]
        earlier = torch.ones(C, C, dtype=pairs.dtype, device=pairs.device).triu_(1)
        within = (pairs.flatten(0, 2) @ earlier).tril_().sum(1).view(sums.shape)
        dg = _after((q * dq.view(q.shape)).sum((3, 5))) + _before((k * dk).sum(-1)) + within
        dg += (keep * before * later).sum((3, 4)).unsqueeze(-1)
    da = da if g is None else da.mul_(w)
    dq.baddbmm_(matrices(da), matrices(k))
    dk.flatten(0, 2).baddbmm_(matrices(da).transpose(1, 2), matrices(q))
    return dq.view(q.shape), dk, dv, dg, dstates[0]


def _per_channel(q, k, v, g, do, state, dlast, gate):
    """As `_per_head`; None for strong decays.

    A row's own key stays out of what decays: factors would round it and spoil the gate's gradient.
    """
    found = make_fall(g, q.dtype)
    if found is None or found.late is not None:
        return None
    fall, half, _ = found
    a, q_fall, k_rise, of_q, of_k = factored(q, k, fall, half)
    da = causal_products(do, v)
    own = da.diagonal(dim1=4, dim2=5).unsqueeze(-1).clone()
    da = matrices(da.tril_(-1))
    # No bit depends on the powers of two, which keep small numbers from underflow until they are divided out.
    dq = torch.bmm(da, matrices(k_rise)).view(q.shape).mul_((fall * of_k).unsqueeze(3))
    dk = torch.bmm(da.transpose(1, 2), matrices(q_fall)).view(k.shape).div_(fall / of_q)
    q_start, start = q_fall.div_(half / of_q), fall / half
    last = start[:, :, :, -1:]
    keep, end = last.transpose(3, 4), last / start
    k_end = k * end
    before = states(k_end, v, keep, state)[:-1]
    dstates = states(q_start, do, keep, dlast, reverse=True)
    later = dstates[1:]
    dv = _values(a, do, k_end, later)
    dq.addcmul_(torch.bmm(matrices(do), matrices(before).transpose(1, 2)).view(q.shape), start.unsqueeze(3))
    dk_end = torch.bmm(matrices(v), matrices(later).transpose(1, 2)).view(k.shape).mul_(end)
    dg = None
    if gate:
        dg = _after((q * dq).sum(3) - k * dk) + _before(k * dk_end)
        dg += (keep * before * later).sum(4).unsqueeze(3)
    dq.addcmul_(own, k.unsqueeze(3))
    dk += dk_end
    dk += (own * q).sum(3)
    return dq, dk, dv, dg, dstates[0]


def backward(
    x: RecurrenceInputs, chunk: int, do: torch.Tensor, dlast: torch.Tensor, grads: Gradients
) -> torch.Tensor | None:
    """Fills those of grads, of q, k, v and g, that are not None, and returns the gradient of the state before.

    do [B,T,HQ,V], dlast [B,H,K,V]. None, and nothing done, for strong decays.
    """
    T, H = x.k.shape[1:3]
    C = rows(chunk, T)
    q, k, v, do = (outermost(chunks(y, C)) for y in (x.q.unflatten(2, (H, -1)), x.k, x.v, do.unflatten(2, (H, -1))))
    g = None if x.g is None else chunks(x.g, C)
    do = torch.mul(do, x.scale, out=do.new_empty(do.shape))
    run = _per_channel if x.per_channel else _per_head
    found = run(q, k, packed(v), g, do, x.state, dlast, grads.g is not None)
    if found is None:
        return None
    dq, dk, dv, dg, dstate = found
    if grads.q is not None:
        fill(grads.q.unflatten(2, (H, -1)), dq)
    for grad, new in ((grads.k, dk), (grads.v, dv.view(v.shape)), (grads.g, dg)):
        if grad is not None and new is not None:
            fill(grad, new)
    return dstate.clone()
