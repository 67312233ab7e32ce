"""Scores of queries and keys of a chunk under the decays between them.

Shapes: B batch, H key/value heads, G query heads per key/value head, K key width, N chunks of C tokens.
"""

import torch

from liger_ops._torch.decay import Decay, between, unit


def _times(x: torch.Tensor, y: torch.Tensor | float) -> torch.Tensor:
    """x * y for an x that nothing else reads: in place unless autograd records."""
    return x * y if torch.is_grad_enabled() else x.mul_(y)


def _factored(own: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Scores whose lower triangle a [B,H,N,C*G,C] is a factored product and whose diagonal own [B,H,N,C,G] is not.

    Row i never decays its own key: factors would round it and spoil the gate's gradient.
    """
    C = own.shape[3]
    strict = torch.ones(C, C, dtype=torch.bool, device=a.device).tril(-1).unsqueeze(1)
    eye = torch.eye(C, dtype=a.dtype, device=a.device).unsqueeze(1)
    return torch.where(strict, a.view(*own.shape, C), own.unsqueeze(-1) * eye)


def _causal(q: torch.Tensor) -> torch.Tensor:
    return torch.ones(q.shape[3], q.shape[3], dtype=q.dtype, device=q.device).tril()


def decayed_products(q: torch.Tensor, k: torch.Tensor, decay: Decay | None) -> torch.Tensor:
    """q [B,H,N,C,G,K], k [B,H,N,C,K] -> decayed causal scores [B,H,N,C,G,C]."""
    causal = _causal(q)
    if decay is None or decay.sums.shape[-1] == 1:
        weights = causal if decay is None else between(decay.sums.squeeze(-1), q.dtype).tril()
        return _times((q.flatten(3, 4) @ k.transpose(-1, -2)).view(*q.shape[:5], -1), weights.unsqueeze(-2))
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
    if decay is None or torch.is_grad_enabled() or decay.apart is None:
        a = _times(decayed_products(q, k, decay), gain)
        return a, _times(q, gain if decay is None else decay.start.unsqueeze(4) * gain)
    # The same to a rounding, with one pass over the queries.
    fall, rise, half = decay.apart
    of_q, of_k = unit(q, half), unit(k, half)
    q.mul_((fall / of_q).unsqueeze(4) * gain)
    a = (q.flatten(3, 4) @ (k * (rise / of_k)).transpose(-1, -2)).view(*q.shape[:5], -1)
    if half != 1.0:
        a, q = a.mul_(of_q * of_k), q.div_(half / of_q)
    # What lies above the diagonal may be infinite.
    return a.masked_fill_(_causal(q).unsqueeze(1) == 0, 0.0), q
