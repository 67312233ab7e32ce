"""Causal sliding-window attention with attention sinks.

Shapes: B batch, T queries, S keys (the queries are the last T of them), HQ query heads, H key/value heads, D width.
"""

from typing import Literal, overload

import torch

from liger_ops import _backend, _checks, errors
from liger_ops._inputs import AttentionInputs
from liger_ops.documents import read_documents


@overload
def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    *,
    visible: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    *,
    visible: torch.Tensor | None = None,
    return_lse: Literal[True],
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@errors.lists_keywords
def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    *,
    visible: torch.Tensor | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the last `window` keys and the first `sinks` keys (StreamingLLM, arXiv 2309.17453).

    Token i sees tokens i - window + 1 .. i, itself included, and the sinks up to i, each once; cost grows with
    T * window. A row of queries that sees nothing (padding) yields finite numbers without meaning.

    Args:
        q: [B,T,HQ,D] queries, HQ a multiple of H.
        k, v: [B,S,H,D] keys and [B,S,H,V] values, S >= T; query t stands at key S - T + t.
        window: number of keys, at least 1.
        sinks: number of first keys that every later token sees, per row the first visible ones.
        scale: factor on the scores; None means D ** -0.5.
        visible: [B,S] bool, False hides a key (padding).
        return_lse: also return the log of the softmax denominator.
        softcap: bound > 0 of the scores s, which become softcap tanh(s / softcap); None bounds nothing.
        cu_seqlens: [N+1] bounds of documents packed along time, with batch 1 and S = T, each of which is as if it were
            alone; without visible.

    Returns:
        o [B,T,HQ,V] in the dtype of q; with return_lse also lse [B,T,HQ] in float32 (float64 for float64).

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    if cu_seqlens is not None:
        _checks.check_windowed(q, k, v, window, sinks, scale, softcap, visible)
        told = dict(window=window, sinks=sinks, scale=scale, softcap=softcap)
        return _packed(q, k, v, cu_seqlens, visible, return_lse, told)
    scale, softcap = _checks.check_windowed(q, k, v, window, sinks, scale, softcap, visible)
    o, lse = _backend.window(AttentionInputs(q, k, v, window, sinks, scale, softcap, visible), return_lse)
    return o if lse is None or not return_lse else (o, lse)


def _packed(q, k, v, cu_seqlens, visible, return_lse, told) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What `sliding_window_attention` returns, of documents one behind the other."""
    documents = read_documents(cu_seqlens, q, dict(visible=visible))
    if k.shape[1] != q.shape[1]:
        errors.fail("k", f"the {q.shape[1]} tokens of q beside cu_seqlens", k.shape[1])
    parts = []
    for rows in zip(*(documents.apart(x) for x in (q, k, v)), strict=True):
        parts.append(sliding_window_attention(*rows, **told, return_lse=True))
    fine = torch.promote_types(q.dtype, torch.float32)
    o = documents.together([o for o, _ in parts], q.new_zeros(*q.shape[:3], v.shape[-1]))
    lse = documents.together([lse for _, lse in parts], q.new_zeros(q.shape[:3], dtype=fine))
    return (o, lse) if return_lse else o
