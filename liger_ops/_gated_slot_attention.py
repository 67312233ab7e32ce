"""Gated slot attention: one recurrence writes keys into slots, a softmax picks slots, another reads values from them.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, M slots,
N sequences.
"""

import torch
import torch.nn.functional as F

from liger_ops import _checks
from liger_ops._packed import recurrence
from liger_ops._sequences import in_order

SlotState = tuple[torch.Tensor, torch.Tensor]


def chunk_gsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: SlotState | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, SlotState | tuple[None, None]]:
    """Gated slot attention (arXiv 2409.07146, eq. 10): two passes of gated linear attention around a softmax.

    hk_t = hk_{t-1} diag(exp(g_t)) + k_t s_t^T, p_t = softmax(scale q_t hk_t),
    hv_t = diag(exp(g_t)) hv_{t-1} + s_t v_t^T, o_t = p_t hv_t.

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H.
        k, v: [B,T,H,K] keys and [B,T,H,V] values, in the dtype of q.
        s: [B,T,H,M] what a token writes into each slot, in the dtype of q.
        g: [B,T,H,M] log decay of each slot, <= 0. None: each slot keeps a running softmax of s over
            time (ABC, arXiv 2110.02488).
        scale, cu_seqlens, cu_seqlens_cpu, chunk_size, max_seqlen: as in `chunk_gla`. checkpoint_level is accepted and
            has no effect: the backward always recomputes.
        initial_state: hk [N,H,K,M] and hv [N,H,M,V].
        output_final_state: also return both states after the last token.
        reverse: run time backwards.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the pair of final states or of None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    _checks.check_qkv(q, k, v)
    _checks.check_like("s", s, k, "H, M")
    _checks.check_decay(g, s, (4,))
    _checks.check_cu_seqlens(cu_seqlens, *q.shape[:2], cu_seqlens_cpu, max_seqlen)
    N, (H, K), M = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k.shape[2:], s.shape[-1]
    if initial_state is not None:
        shapes = dict(hk=(N, H, K, M), hv=(N, H, M, v.shape[-1]))
        initial_state = _checks.check_parts(initial_state, shapes, k)
    _checks.check_chunk_size(chunk_size)
    scale = _checks.as_scale(scale, q.shape[-1])
    work = torch.float64 if q.dtype == torch.float64 else torch.float32

    def core(q, k, v, s, g, state, cu_seqlens):
        hk, hv = (None, None) if state is None else state
        s, g = (s.to(work), g) if g is not None else _running_softmax(s.to(work), cu_seqlens)
        shared = dict(chunk=chunk_size, cu_seqlens=cu_seqlens)
        scores, hk = recurrence(q.to(work), k.to(work), s, None, scale, hk, gv=g, **shared)
        o, hv = recurrence(scores.softmax(-1), s, v.to(work), g, 1.0, hv, **shared)
        return o, (hk, hv)

    o, state = in_order(core, (q, k, v, s, g), initial_state, cu_seqlens, reverse)
    return o.to(q.dtype), state if output_final_state else (None, None)


def _running_softmax(s: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(s_t - z_t) with z_t = log sum_{u<=t} exp(s_u), and the log decay z_{t-1} - z_t, never above 0."""
    if not s.shape[1]:
        return s, s
    if cu_seqlens is not None:
        # It starts anew with every sequence: one by one.
        parts = s.split(cu_seqlens.diff().tolist(), 1)
        return tuple(torch.cat(x, 1) for x in zip(*(_running_softmax(x, None) for x in parts), strict=True))
    z = s.logcumsumexp(1)
    # The first token lets nothing go.
    before = torch.cat([torch.full_like(z[:, :1], torch.inf), z], 1)[:, :-1]
    return (s - z).exp(), -F.softplus(s - before)


def fused_recurrent_gsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: SlotState | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, SlotState | tuple[None, None]]:
    """`chunk_gsa` for few tokens; reverse runs time backwards."""
    options = dict(cu_seqlens=cu_seqlens, reverse=reverse, max_seqlen=max_seqlen)
    return chunk_gsa(q, k, v, s, g, scale, initial_state, output_final_state, **options)
