"""The additive recurrence with a gate per key channel or per head: the gate is data, and its rank selects what runs.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

import torch

from liger_ops import _checks, errors
from liger_ops._inputs import RecurrenceInputs
from liger_ops._keywords import keywords
from liger_ops._norms import normalized
from liger_ops._sequences import run_in_order


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    rank: int,
    g: torch.Tensor | None,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    normalize: bool = False,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check, spread a fixed decay over time, append the normaliser's column, and run every sequence."""
    _checks.check_qkv(q, k, v)
    _checks.check_decay(g, k, (rank,))
    _checks.check_decay(g_gamma, k, (1,), "g_gamma")
    _checks.check_decay(gv, v, (4,), "gv")
    errors.check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], cu_seqlens_cpu, max_seqlen)
    if g_gamma is not None:
        fixed = g_gamma.expand(k.shape[:3])
        g = fixed if g is None else g + fixed
    dtype = q.dtype
    if normalize:
        # Sums of halves overflow, and round before the division.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        v = v.float() if v.dtype != torch.float64 else v
        if gv is not None:
            errors.fail("normalize", "False with gv, which has no decay for the normaliser", True)
    _checks.check_chunk_size(chunk_size)
    scale, state = _checks.as_scale(scale, q.shape[-1]), _checks.keys_first(initial_state, state_v_first)
    x = RecurrenceInputs(q, k, v, g, gv, None, state, cu_seqlens, scale, chunk_size)
    _checks.check_state(state, x.sequences, k, v.shape[-1])
    o, state = run_in_order(x, reverse)
    if normalize:
        o = normalized(o).to(dtype)
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2).contiguous() if state_v_first else state


@keywords()
def chunk_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    gk: torch.Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention with a decay per key channel (arXiv 2312.06635, eq. 3).

    h_t = diag(exp(g_t)) h_{t-1} + k_t v_t^T, o_t = scale q_t h_t.

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H; the state is kept per key/value head.
        k, v: [B,T,H,K] keys and [B,T,H,V] values, in the dtype of q.
        g: [B,T,H,K] log decay per step, <= 0; -inf forgets everything. gk is another name for it.
        scale: factor on q, a number; None means K ** -0.5.
        initial_state: [N,H,K,V] (V + 1 with normalize), or None for zeros.
        output_final_state: also return the state after the last token.
        state_v_first: states are [N,H,V,K].
        cu_seqlens: [N+1] bounds of sequences packed along time, batch 1.
        cu_seqlens_cpu: the same on the host, which spares a synchronisation.
        normalize: divide o_t by the same recurrence over values of 1, except where that is 0; its column rides last in
            the state.
        chunk_size: about how many tokens one matrix product handles; changes speed only.
        max_seqlen: length of the longest sequence; with it a GPU's cu_seqlens are neither checked nor waited for.

    Every op of this kind also takes what flash-linear-attention's callers pass: transpose_state_layout, its former name
    for state_v_first; disable_recompute and chunk_indices, which have no effect; and cp_context, which is None.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the final state in float32 (float64 for float64) or None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
        TypeError: names an unknown keyword and lists the known ones.
    """
    g = _checks.either("g", g, "gk", gk)
    return _run(
        q,
        k,
        v,
        rank=4,
        g=g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        normalize=normalize,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


@keywords()
def fused_chunk_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    gk: torch.Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_gla` by another name, where states want state_v_first said.

    Layers of flash-linear-attention call it without, and hand its state to ops that they tell the opposite.
    """
    if state_v_first is None and (initial_state is not None or output_final_state):
        errors.fail("state_v_first", "True or False where a state comes or goes", None)
    return chunk_gla(
        q,
        k,
        v,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=bool(state_v_first),
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        gk=gk,
        normalize=normalize,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


@keywords()
def fused_recurrent_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    g: torch.Tensor | None = None,
    normalize: bool = False,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_gla` for few tokens: h_t = exp(gk_t) h_{t-1} exp(gv_t) + k_t v_t^T.

    gk [B,T,H,K] decays key channels, gv [B,T,H,V] value channels; either may be None, and g is another name for gk.
    reverse runs time backwards. Everything else, errors included, as in `chunk_gla`.
    """
    gk = _checks.either("gk", gk, "g", g)
    return _run(
        q,
        k,
        v,
        rank=4,
        g=gk,
        gv=gv,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        normalize=normalize,
        max_seqlen=max_seqlen,
    )


@keywords()
def chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention with one decay per head (Mamba-2, arXiv 2405.21060; gated retention, arXiv 2405.05254).

    g [B,T,H] is a log decay per step, g_gamma [H] a fixed one; they add up, and with neither nothing is forgotten.
    Everything else, errors included, as in `chunk_gla`.
    """
    return _run(
        q,
        k,
        v,
        rank=3,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        normalize=normalize,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


@keywords()
def fused_recurrent_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_simple_gla` for few tokens; reverse runs time backwards."""
    return _run(
        q,
        k,
        v,
        rank=3,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        normalize=normalize,
        max_seqlen=max_seqlen,
    )
