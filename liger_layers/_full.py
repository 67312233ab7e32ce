"""Softmax attention over everything, for layers that keep it and for those that stand for it.

Shapes: B batch, T queries, S columns, HQ query heads, H key/value heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    span: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Exact causal softmax of rotated q [B,T,HQ,D], the last T of S columns, over k and v [B,S,H,D]: o [B,T,HQ,D].

    Of those before a query that mask [B,S] shows, the last `span` (None: all). Without a mask S is T.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    T, S, seen = q.shape[2], k.shape[2], None
    if mask is not None or (span is not None and span < T) or softcap is not None:
        key = torch.arange(S, device=q.device)
        query = torch.arange(S - T, S, device=q.device)[:, None]
        seen = key <= query if span is None else (key <= query) & (key > query - span)
        # Padding sees itself: a row that sees nothing would be NaN.
        seen = seen[None] if mask is None else seen & mask[:, None] | (key == query)
        seen = seen[:, None]
    if softcap is not None:
        return _bounded(q, k, v, seen, scale, softcap).transpose(1, 2)
    # Without a mask where none is needed, which kernels take to be quick.
    options: dict[str, Any] = dict(attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _bounded(q, k, v, seen, scale: float | None, softcap: float) -> torch.Tensor:
    """Softmax attention [B,HQ,T,D] whose scores s are bounded to softcap tanh(s / softcap)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * (scores / softcap).tanh()).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
