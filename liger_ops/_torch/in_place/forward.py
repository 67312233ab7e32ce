"""The additive recurrence where nothing records, in place.

Shapes: as in `chunks`; log decays g [B,N,C,H] or [B,N,C,H,K].
"""

from typing import NamedTuple

import torch

from liger_ops._inputs import RecurrenceInputs
from liger_ops._torch.decay import factor, margin, running, unit
from liger_ops._torch.in_place.chunks import causal_products, chunks, fill, matrices, outermost, packed, rows, states
from liger_ops.limits import FACTORABLE


class Fall(NamedTuple):
    """Decays of a chunk up to its rows [N,B,H,C,K]: from its start, times half, and from about its middle.

    `late`, None unless some chunk is too strong for the first, is a power of two of it, so that both round alike: times
    half from the middle on, where it serves queries; earlier rows, which only keys want, need none of it.
    """

    fall: torch.Tensor
    half: float
    late: torch.Tensor | None


class Factored(NamedTuple):
    """Causal scores a, and what they are products of: queries times fall / of_q, keys over fall * of_k."""

    a: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    of_q: float
    of_k: float


def make_fall(g: torch.Tensor, dtype: torch.dtype) -> Fall | None:
    """None where decays and their inverses may not multiply apart, from the middle of a chunk either."""
    # In the layout of g: its chunks sum faster than a copy's.
    sums = g.cumsum(2, dtype=torch.float64)
    last, middle = sums[:, :, -1], sums.shape[2] // 2
    lowest = last.amin().item()
    strong = not lowest >= FACTORABLE
    if strong:
        first = sums[:, :, middle - 1]
        if not torch.minimum(first, last - first).amin().item() >= FACTORABLE:
            return None
    half = margin(lowest)
    start = sums.exp_() if half == 1.0 else sums.exp_().mul_(half)
    late = None
    if strong:
        there = start[:, :, middle - 1, None]
        # Exact: the mantissa over the number is a power of two.
        late = start * (half * torch.frexp(there).mantissa / there)
        late[:, :, :middle] /= half
        late = outermost(late.to(dtype))
    return Fall(outermost(start.to(dtype)), half, late)


def factored(q: torch.Tensor, k: torch.Tensor, fall: torch.Tensor, half: float, early: int = 0) -> Factored:
    """early: the first so many rows of fall lack the margin."""
    of_q, of_k = unit(q, half), unit(k, half)
    q = torch.mul(q, (fall if of_q == 1.0 else fall / of_q).unsqueeze(3), out=q.new_empty(q.shape))
    k = torch.div(k, fall if of_k == 1.0 else fall * of_k, out=k.new_empty(k.shape))
    a = causal_products(q, k)
    if half != 1.0:
        a[..., :early] /= half
        a *= of_q * of_k
    return Factored(a, q, k, of_q, of_k)


def weights(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Running sums [N,B,H,C] -> decays between rows and earlier ones [N,B,H,C,C]; above the diagonal, anything <= 1."""
    log = torch.empty(*sums.shape, sums.shape[-1], dtype=dtype, device=sums.device)
    # Above the diagonal, where the difference is no decay, nothing that could overflow.
    return factor(torch.sub(sums.unsqueeze(4), sums.unsqueeze(3), out=log).clamp_(max=0.0), dtype)


def _per_head(q, k, g):
    """Scores, and the queries, keys and factors that `states` and the state before a chunk want."""
    q, k = packed(q), packed(k)
    a = causal_products(q, k)
    if g is None:
        return a, q, k, None
    sums = running(outermost(g))
    last = sums[..., -1:]
    a *= weights(sums, a.dtype).unsqueeze(3)
    k *= factor(last - sums, k.dtype).unsqueeze(-1)
    q *= factor(sums, q.dtype)[:, :, :, None, :, None]
    return a, q, k, factor(last, k.dtype).unsqueeze(-1)


def _from_middle(q, k, late, half):
    """Scores of the later half of the rows of strong chunks, and all keys at the end."""
    middle = late.shape[3] // 2
    a, _, k, _, of_k = factored(q, k, late, half, middle)
    k *= late[:, :, :, -1:] * of_k
    k[:, :, :, :middle] /= half
    return a[:, :, :, :, middle:], k


def _per_channel(q, k, g):
    """As `_per_head`; None for strong decays."""
    found = make_fall(g, q.dtype)
    if found is None:
        return None
    fall, half, late = found
    a, q_start, k_end, of_q, of_k = factored(q, k, fall, half)
    q_start = q_start if half == 1.0 else q_start.div_(half / of_q)
    last = fall[:, :, :, -1:]
    if late is None:
        k_end *= last if half == 1.0 else last * of_k
    else:
        a[:, :, :, :, fall.shape[3] // 2 :], k_end = _from_middle(q, k, late, half)
    return a, q_start, k_end, (last if half == 1.0 else last / half).transpose(3, 4)


def forward(x: RecurrenceInputs, chunk: int, out: torch.Tensor) -> torch.Tensor | None:
    """Fills out [B,T,HQ,V] and returns the state after the last token; None, and nothing done, for strong decays."""
    assert x.state is not None
    T, H = x.k.shape[1:3]
    # Two chunks at once, each with decays of its own, have half as many states.
    C = rows(2 * chunk if x.per_channel else chunk, T)
    q, k, v = (outermost(chunks(y, C)) for y in (x.q.unflatten(2, (H, -1)), x.k, x.v))
    g = None if x.g is None else chunks(x.g, C)
    found = (_per_channel if x.per_channel else _per_head)(q, k, g)
    if found is None:
        return None
    a, q, k, keep = found
    v = packed(v)
    around = states(k, v, keep, x.state)
    o = torch.bmm(matrices(a), matrices(v)).baddbmm_(matrices(q), matrices(around[:-1]))
    fill(out.unflatten(2, (H, -1)), o.view(*q.shape[:5], -1), x.scale)
    # A copy, so that the states of all chunks may go.
    return around[-1].clone()
