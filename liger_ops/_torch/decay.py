"""Running sums of log decays within chunks, and the factors that they amount to.

Shapes: B batch, H key/value heads, N chunks of C tokens, K channels. Sums are float64, where a difference of two is as
good as a sum of the gates between them; what leaves float64 is a factor <= 1, except in chunks whose sums are no less
than FACTORABLE: there decays and their inverses from the chunk's start multiply apart.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

FACTORABLE = -80.0
# About half of it in powers of two, which round nothing, moves from one factor to the other where decays come near it,
# so that neither underflows beside an operand.
HALF = 2.0**57
# Larger operands beside such decays would leave no room for the gradients that multiply them.
LARGEST = 1e3
# Its exponential is zero in float64, and so much less would leave no digit of the gates beside it.
NOTHING = -750.0
_DENORMAL_BESIDE_OTHERS = 2.0**26


def running(g: torch.Tensor) -> torch.Tensor:
    """Sums of log decays g [B,H,N,C,...] through each row of its chunk, in float64."""
    return g.clamp(min=NOTHING).cumsum(3, dtype=torch.float64)


def factor(log: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp(log) in dtype; zero where products with it would be denormal, and many times slower."""
    return F.threshold(log.exp().to(dtype), _DENORMAL_BESIDE_OTHERS * torch.finfo(dtype).tiny, 0.0)


def between(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sums [B,H,N,C,...] -> decays over rows j < l <= i, [B,H,N,C(i),C(j),...]; 1 where i <= j."""
    C = sums.shape[3]
    later = torch.ones(C, C, dtype=torch.bool, device=sums.device).tril(-1)
    later = later.view(C, C, *[1] * (sums.ndim - 4))
    # The exponential in dtype: a logarithm rounded to it is as good as the gates were.
    return factor(torch.where(later, sums.unsqueeze(4) - sums.unsqueeze(3), 0.0).to(dtype), dtype)


class Decay(NamedTuple):
    """Running sums [B,H,N,C,1 or K] and what they amount to: factors from the chunk's start to a row and from a row
    to its end, both like the sums, and over the whole chunk, [B,H,N,1 or K].

    start * half and rise, its inverse, may multiply operands apart; None where they may not.
    """

    sums: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    total: torch.Tensor
    rise: torch.Tensor | None = None
    half: float = 1.0

    def apart(self, *operands: torch.Tensor) -> bool:
        """Whether start * half and rise may multiply these operands."""
        if self.rise is None or self.half == 1.0:
            return self.rise is not None
        return max(x.detach().abs().amax().item() for x in operands) <= LARGEST


def make_decay(g: torch.Tensor | None) -> Decay | None:
    """g [B,H,N,C] or [B,H,N,C,K]."""
    if g is None:
        return None
    sums = running(g if g.ndim == 5 else g.unsqueeze(-1))
    last = sums[:, :, :, -1:]
    lowest = last.detach().amin().item()
    if g.ndim == 4 or lowest < FACTORABLE:
        near = factor(sums, g.dtype)
        # The last row's is exactly 1: a difference of it and itself would leave its gradient in the gate's.
        end = factor(F.pad(last - sums[:, :, :, :-1], (0, 0, 0, 1)), g.dtype)
        return Decay(sums, near, end, near[:, :, :, -1])
    start = sums.exp()
    near, rise = start.to(g.dtype), start.reciprocal()
    end = (start[:, :, :, -1:] * rise).to(g.dtype)
    half = 1.0 if lowest >= FACTORABLE / 2 else HALF
    return Decay(sums, near, end, near[:, :, :, -1], (rise if half == 1.0 else rise / half).to(g.dtype), half)
