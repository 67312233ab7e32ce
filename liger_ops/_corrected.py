"""Which backend runs the delta rule.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

import torch

from liger_ops._packed import default_chunk
from liger_ops._torch import delta
from liger_ops._torch.layout import full_precision


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last dimension, in float32 (float64 for float64)."""
    x = x if x.dtype == torch.float64 else x.float()
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@full_precision
def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    chunk: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], beta [B,T,H] -> o [B,T,HQ,V] in the dtype of v, the last state [N,H,K,V].

    Log decays g [B,T,H] or [B,T,H,K], or None; cu_seqlens [N+1] packs sequences into batch 1.
    """
    return delta.recurrence(q, k, v, beta, g, scale, state, default_chunk(g, chunk), cu_seqlens)
