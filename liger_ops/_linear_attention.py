"""Linear attention without decay, and HGRN2, whose key follows from its gate: two readings of the same recurrence.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

import torch

from liger_ops import _checks, errors
from liger_ops._gated_linear_attention import chunk_gla, fused_recurrent_gla, fused_recurrent_simple_gla
from liger_ops._keywords import another_name, keywords

# With normalize, the state is a pair: h [N,H,K,V] and z [N,1,H,K], the sum of the keys.
LinearState = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


@keywords()
def chunk_linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: LinearState = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    *,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, LinearState]:
    """Linear attention without decay (arXiv 2006.16236, eq. 16-20), divided by q_t sum_s k_s if normalize.

    With normalize, states are pairs (h [N,H,K,V], z [N,1,H,K]). Everything else, errors included, as in `chunk_gla`.
    """
    return fused_recurrent_linear_attn(
        q,
        k,
        v,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        normalize=normalize,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )


fused_chunk_linear_attn = another_name(chunk_linear_attn, "fused_chunk_linear_attn")


@keywords()
def fused_recurrent_linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: LinearState = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, LinearState]:
    """`chunk_linear_attn` for few tokens; reverse runs time backwards."""
    if isinstance(initial_state, torch.Tensor | None) and not (normalize and initial_state is not None):
        state = initial_state
    elif not normalize:
        errors.fail("initial_state", "a tensor without normalize", type(initial_state).__name__)
    else:
        _checks.check_qkv(q, k, v)
        N, (H, K) = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k.shape[2:]
        h, z = _checks.check_parts(initial_state, dict(h=(N, H, K, v.shape[-1]), z=(N, 1, H, K)), k)
        state = torch.cat([h, z.squeeze(1).unsqueeze(-1)], -1)
    o, state = fused_recurrent_simple_gla(
        q,
        k,
        v,
        scale=scale,
        initial_state=state,
        output_final_state=output_final_state,
        reverse=reverse,
        cu_seqlens=cu_seqlens,
        normalize=normalize,
        max_seqlen=max_seqlen,
    )
    if normalize and state is not None:
        state = state[..., :-1].contiguous(), state[..., -1].unsqueeze(1).contiguous()
    return o, state


@keywords()
def chunk_hgrn2(
    q: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    cu_seqlens_cpu: torch.Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """HGRN2 (arXiv 2404.07904, eq. 5): the key is what the gate lets go, 1 - exp(g).

    q [B,T,HQ,K], v [B,T,H,V] and log forget gate g [B,T,H,K] <= 0. Options, returns and errors as in `chunk_gla`.
    """
    return chunk_gla(
        q,
        _key(q, g, v),
        v,
        g,
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
def fused_recurrent_hgrn2(
    q: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
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
    """`chunk_hgrn2` for few tokens; reverse runs time backwards."""
    return fused_recurrent_gla(
        q,
        _key(q, g, v),
        v,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        normalize=normalize,
        max_seqlen=max_seqlen,
    )


def _key(q: torch.Tensor, g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    errors.check_tensor("q", q)
    errors.check_tensor("g", g)
    _checks.check_qkv(q, g.to(q.dtype) if g.is_floating_point() else g, v, key="g")
    # Exact near g = 0, where 1 - exp(g) is not.
    return (-torch.expm1(g)).to(v.dtype)
