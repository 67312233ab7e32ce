"""RWKV-6: a token reads the state before it, and itself through a bonus.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

import torch

from liger_ops import _checks, errors
from liger_ops._backend import recurrence
from liger_ops._inputs import RecurrenceInputs, work_dtype
from liger_ops._keywords import keywords
from liger_ops._sequences import after_one, in_order
from liger_ops._torch.layout import full_precision


@keywords()
def chunk_rwkv6(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RWKV-6 (arXiv 2404.05892, eq. 19): what a token reads is the state before it, and itself through u.

    o_t = scale r_t (h_{t-1} + diag(u) k_t v_t^T), h_t = diag(exp(w_t)) h_{t-1} + k_t v_t^T.

    Args:
        r: [B,T,HQ,K] receptances, HQ a multiple of H.
        k, v: [B,T,H,K] keys and [B,T,H,V] values, in the dtype of r.
        w: [B,T,H,K] log decay per step, <= 0.
        u: [HQ,K] bonus of the current token.
        scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, chunk_size, max_seqlen: as in `chunk_gla`.
        reverse: run time backwards.

    Returns:
        o [B,T,HQ,V] in the dtype of r, and the final state [N,H,K,V] or None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    _checks.check_qkv(r, k, v, query="r")
    errors.check_tensor("w", w)
    _checks.check_decay(w, k, (4,), "w")
    _checks.check_bonus(u, r)
    errors.check_cu_seqlens(cu_seqlens, r.shape[0], r.shape[1], cu_seqlens_cpu, max_seqlen)
    _checks.check_state(initial_state, r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k, v.shape[-1])
    _checks.check_chunk_size(chunk_size)
    scale = _checks.as_scale(scale, r.shape[-1])

    def core(r, k, v, w, state, cu_seqlens):
        """Token t - 1 asks token t's question of the inclusive recurrence; the first one asks the initial state."""
        asked = torch.cat([r, torch.zeros_like(r[:, :1])], 1)[:, 1:]
        x = RecurrenceInputs(asked, k, v, w, state=state, cu_seqlens=cu_seqlens, scale=scale, chunk=chunk_size)
        o, final = recurrence(x)
        if not r.shape[1]:
            return o, final
        begin = r[:, 0] if cu_seqlens is None else r[0, cu_seqlens[:-1].clamp(max=r.shape[1] - 1)]
        first = begin.new_zeros(*begin.shape[:2], v.shape[-1]) if state is None else _read(scale * begin, state)
        return after_one(o, first.to(o.dtype), cu_seqlens), final

    o, state = in_order(core, dict(r=r, k=k, v=v, w=w), initial_state, cu_seqlens, reverse)
    H = k.shape[2]
    work = work_dtype(r)
    bonus = ((r.to(work) * u.to(work)).unflatten(2, (H, -1)) * k.to(work).unsqueeze(3)).sum(-1, keepdim=True)
    own = (scale * bonus * v.to(work).unsqueeze(3)).flatten(2, 3)
    return (o.to(work) + own).to(r.dtype), state if output_final_state else None


@full_precision
def _read(q: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """q [N,HQ,K], state [N,H,K,V] -> [N,HQ,V], in float32 or float64."""
    work = work_dtype(q)
    return (q.to(work).unflatten(1, (state.shape[1], -1)) @ state.to(work)).flatten(1, 2)


@keywords()
def fused_recurrent_rwkv6(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_rwkv6` for few tokens; reverse runs time backwards."""
    return chunk_rwkv6(
        r,
        k,
        v,
        w,
        u,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        max_seqlen=max_seqlen,
    )
