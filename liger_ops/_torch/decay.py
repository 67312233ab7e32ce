"""Running sums of log decays within chunks, and the factors that they amount to.

Shapes: B batch, H key/value heads, N chunks of C tokens, K channels. Sums are float64, where a difference of two is as
good as a sum of the gates between them; what leaves float64 is a factor <= 1, except in chunks whose sums are no less
than FACTORABLE: there decays and their inverses from the chunk's start multiply apart. In `forward`, halves of chunks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from liger_ops.limits import FACTORABLE, HALF_EXPONENT

_HALF = 2.0**HALF_EXPONENT
# Its exponential is zero in float64, and so much less would leave no digit of the gates beside it.
_NOTHING = -750.0
# Times the smallest normal number: what is below makes denormal products, which are many times slower.
_FAINT = 2.0**4


def running(g: torch.Tensor) -> torch.Tensor:
    """Sums of log decays g [B,H,N,C,...] through each row of its chunk, in float64, as their gradients are."""
    return g.clamp(min=_NOTHING).double().cumsum(3)


def remaining(g: torch.Tensor) -> torch.Tensor:
    """Sums of log decays g [B,H,N,C,...] from behind each row to the end of its chunk, in float64.

    Not a difference of running sums: its gradient would be one of ones, where rows after it are padding or few.
    """
    later = F.pad(g.clamp(min=_NOTHING).double()[:, :, :, 1:], (0, 0) * (g.ndim - 4) + (0, 1))
    return later.flip(3).cumsum(3).flip(3)


def factor(log: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp(log) in dtype; zero where hardly anything of it is left."""
    return F.threshold(log.exp().to(dtype), _FAINT * torch.finfo(dtype).tiny, 0.0)


def between(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sums [B,H,N,C,...] -> decays over rows j < l <= i, [B,H,N,C(i),C(j),...]; 1 where i <= j."""
    C = sums.shape[3]
    later = torch.ones(C, C, dtype=torch.bool, device=sums.device).tril(-1)
    later = later.view(C, C, *[1] * (sums.ndim - 4))
    # The exponential in dtype: a logarithm rounded to it is as good as the gates were.
    log = (sums.unsqueeze(4) - sums.unsqueeze(3)).to(dtype)
    return factor(torch.where(later, log, 0.0), dtype)


class Apart(NamedTuple):
    """Factors that multiply operands apart: fall, half times the decay from the start, and rise, its inverse."""

    fall: torch.Tensor
    rise: torch.Tensor
    half: float


class Decay(NamedTuple):
    """Running sums [B,H,N,C,1 or K] and what they amount to: factors from the chunk's start to a row and from a row
    to its end, both like the sums, and over the whole chunk, [B,H,N,1 or K].

    Of one channel also those of a chunk's pairs [B,H,N,C,C], and, if wanted, carry [B*H,N+1,N+1]: what chunk n adds is
    worth before chunk i, and what was there at first in its first column. apart is None where decays may not.
    """

    sums: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    total: torch.Tensor
    apart: Apart | None = None
    pairs: torch.Tensor | None = None
    carry: torch.Tensor | None = None


def carried(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`Decay.carry` of what whole chunks decay by, total [B,H,N]."""
    return between(running(F.pad(total, (1, 0)).unsqueeze(2)), dtype).squeeze(2).tril().flatten(0, 1)


def margin(lowest: float) -> float:
    """How much of the smallest factor, exp(lowest), its inverse takes over: a power of two."""
    return 1.0 if lowest >= FACTORABLE / 2 else _HALF


def unit(x: torch.Tensor, half: float) -> float:
    """What x is divided by beside factors that need a margin: a power of two near its largest.

    Neither rounds anything, so that no bit depends on what decays or operands are elsewhere.
    """
    if half == 1.0:
        return 1.0
    largest = x.detach().abs().amax().item()
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -40), 40)) if math.isfinite(largest) else 1.0


def make_decay(g: torch.Tensor | None, carry: bool = False) -> Decay | None:
    """g [B,H,N,C] or [B,H,N,C,K]."""
    if g is None:
        return None
    per_head, g = g.ndim == 4, g if g.ndim == 5 else g.unsqueeze(-1)
    sums = running(g)
    last = sums[:, :, :, -1:]
    # Only a gradient minds the difference.
    end = factor(remaining(g) if torch.is_grad_enabled() else last - sums, g.dtype)
    lowest = last.detach().amin().item()
    pairs = chunks = None
    if sums.shape[-1] == 1:
        pairs = between(sums.squeeze(-1), g.dtype).tril()
        chunks = carried(last[:, :, :, 0, 0], g.dtype) if carry else None
    if per_head or lowest < FACTORABLE:
        near = factor(sums, g.dtype)
        return Decay(sums, near, end, near[:, :, :, -1], None, pairs, chunks)
    start = sums.exp()
    near, half = start.to(g.dtype), margin(lowest)
    # In float64, where no gradient times half overflows.
    fall = near if half == 1.0 else (start * half).to(g.dtype)
    apart = Apart(fall, (start * half).reciprocal().to(g.dtype), half)
    return Decay(sums, near, end, near[:, :, :, -1], apart, pairs, chunks)
