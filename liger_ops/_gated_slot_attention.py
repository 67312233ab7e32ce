"""Gated slot attention: one recurrence writes keys into slots, a softmax picks slots, another reads values from them.

LightNet's keys are such slots' weights: a running softmax over time.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, M slots,
N sequences.
"""

import torch
import torch.nn.functional as F

from liger_ops import _checks, errors
from liger_ops._backend import recurrence
from liger_ops._gated_linear_attention import chunk_gla
from liger_ops._inputs import RecurrenceInputs, work_dtype
from liger_ops._keywords import keywords
from liger_ops._sequences import in_order

SlotState = tuple[torch.Tensor, torch.Tensor]
LightNetState = tuple[torch.Tensor | None, torch.Tensor | None]


@keywords()
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
    errors.check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], cu_seqlens_cpu, max_seqlen)
    N, (H, K), M = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k.shape[2:], s.shape[-1]
    first = None, None
    if initial_state is not None:
        first = _checks.check_parts(initial_state, dict(hk=(N, H, K, M), hv=(N, H, M, v.shape[-1])), k)
    _checks.check_chunk_size(chunk_size)
    if type(checkpoint_level) is not int or checkpoint_level not in (0, 1, 2):
        errors.fail("checkpoint_level", "0, 1 or 2", errors.shown(checkpoint_level))
    scale, work = _checks.as_scale(scale, q.shape[-1]), work_dtype(q)

    def core(q, k, v, s, g, state, cu_seqlens):
        if g is None:
            s, g, _ = _running_softmax(s.to(work), s.new_full((N, 1, H, M), -torch.inf, dtype=work), cu_seqlens)
        s = s.to(work)
        x = RecurrenceInputs(q.to(work), k.to(work), s, gv=g, state=state[0], cu_seqlens=cu_seqlens, scale=scale)
        scores, hk = recurrence(x._replace(chunk=chunk_size))
        x = RecurrenceInputs(scores.softmax(-1), s, v.to(work), g, state=state[1], cu_seqlens=cu_seqlens)
        o, hv = recurrence(x._replace(chunk=chunk_size))
        return o, (hk, hv)

    tensors = dict(q=q, k=k, v=v, s=s, g=g)
    o, (hk, hv) = in_order(core, tensors, first, cu_seqlens, reverse)
    return o.to(q.dtype), (hk, hv) if output_final_state else (None, None)


def _running_softmax(
    s: torch.Tensor, before: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(s_t - z_t) with z_t = log(exp(z_0) + sum_{u<=t} exp(s_u)), the log decay z_{t-1} - z_t, and the last z.

    s [B,T,H,M]; z_0 is before [N,1,H,M], and where that is -inf nothing is there to decay at first.
    """
    if not s.shape[1]:
        return s, s, before
    if cu_seqlens is not None:
        # It starts anew with every sequence: one by one.
        parts = zip(s.split(cu_seqlens.diff().tolist(), 1), before.split(1), strict=True)
        weights, g, last = zip(*(_running_softmax(*part, None) for part in parts), strict=True)
        return torch.cat(weights, 1), torch.cat(g, 1), torch.cat(last)
    # Finite, because the gradient of a sum of -inf alone is NaN.
    z = torch.cat([before.clamp(min=torch.finfo(s.dtype).min), s], 1).logcumsumexp(1)
    # A trace holds what has T - 1 rows for another case where that is 1: nothing here has.
    nothing = torch.cat([before == -torch.inf, torch.zeros_like(s, dtype=torch.bool)], 1)[:, :-1]
    g = -F.softplus(s - z[:, :-1]).masked_fill(nothing, 0.0)
    return (s - z[:, 1:]).exp(), g, z[:, -1:]


@keywords()
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
    return chunk_gsa(
        q,
        k,
        v,
        s,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        max_seqlen=max_seqlen,
    )


@keywords()
def chunk_lightnet(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: LightNetState | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, LightNetState]:
    """LightNet (arXiv 2405.21022): each channel of the key is a running softmax over time.

    z_t = log(exp(z_{t-1}) + exp(k_t)), h_t = diag(exp(z_{t-1} - z_t)) h_{t-1} + exp(k_t - z_t) v_t^T and
    o_t = scale q_t h_t.

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H.
        k, v: [B,T,H,K] logarithms of keys and [B,T,H,V] values, in the dtype of q.
        scale, output_final_state, state_v_first, cu_seqlens, chunk_size, max_seqlen: as in `chunk_gla`.
        initial_state: h [N,H,K,V] and z [N,1,H,K]; either may be None. Without z, the first token decays nothing.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the pair of final states, or of None, in float32 (float64 for float64).

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    _checks.check_qkv(q, k, v)
    errors.check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], None, max_seqlen)
    N, (H, K) = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k.shape[2:]
    work = work_dtype(q)
    _checks.check_logs("k", k)
    if initial_state is None:
        initial_state = None, None
    elif not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
        errors.fail("initial_state", "(h, z), either of them None or a tensor", type(initial_state).__name__)
    h, z = initial_state
    if z is None:
        z = k.new_full((N, 1, H, K), -torch.inf, dtype=work)
    (z,) = _checks.check_parts((z,), dict(z=(N, 1, H, K)), k)
    bounds = cu_seqlens if cu_seqlens is None else cu_seqlens.to(k.device)
    weights, g, z = _running_softmax(k.to(work), z.to(work), bounds)
    o, h = chunk_gla(
        q.to(work),
        weights,
        v.to(work),
        g,
        scale=scale,
        initial_state=h,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=bounds,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )
    return o.to(q.dtype), (h, z) if output_final_state else (None, None)


@keywords()
def fused_recurrent_lightnet(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: LightNetState | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, LightNetState]:
    """`chunk_lightnet` for few tokens."""
    flags = output_final_state, state_v_first, cu_seqlens
    return chunk_lightnet(q, k, v, scale, initial_state, *flags, max_seqlen=max_seqlen)
