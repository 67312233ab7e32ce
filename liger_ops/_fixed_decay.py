"""Retention and Lightning Attention: the additive recurrence with a decay that each head has from its place.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

import torch

from liger_ops import _checks, errors
from liger_ops._gated_linear_attention import chunk_simple_gla, fused_recurrent_simple_gla
from liger_ops._keywords import another_name, keywords


def _retention_decay(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """log(1 - 2^(-5 - h)) (RetNet, arXiv 2307.08621, eq. 8)."""
    _checks.check_qkv(q, k, v)
    heads = torch.arange(k.shape[2], device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))
    return torch.log1p(-torch.exp2(-5.0 - heads))


@keywords()
def chunk_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    state_v_first: bool = False,
    cu_seqlens_cpu: torch.Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retention: head h decays by 1 - 2^(-5 - h) per step (RetNet, arXiv 2307.08621). Options of `chunk_simple_gla`."""
    decay = _retention_decay(q, k, v)
    return chunk_simple_gla(
        q,
        k,
        v,
        None,
        decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        normalize=normalize,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


fused_chunk_retention = another_name(chunk_retention, "fused_chunk_retention")


@keywords()
def parallel_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, None]:
    """`chunk_retention` without states; returns (o, None), because scores of all pairs are not formed."""
    if output_attentions is not False:
        errors.fail("output_attentions", "False (scores of all pairs are not formed)", errors.shown(output_attentions))
    o, _ = chunk_retention(q, k, v, scale, cu_seqlens=cu_seqlens, chunk_size=chunk_size, max_seqlen=max_seqlen)
    return o, None


@keywords()
def fused_recurrent_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    """`chunk_retention` for few tokens; options of `fused_recurrent_simple_gla`."""
    decay = _retention_decay(q, k, v)
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        None,
        decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        normalize=normalize,
        max_seqlen=max_seqlen,
    )


def _lightning_decay(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_idx: int, num_layers: int
) -> torch.Tensor:
    """-(8 / H) (1 - layer / layers) h (Lightning Attention-2, arXiv 2401.04658)."""
    _checks.check_qkv(q, k, v)
    errors.check_positive("num_layers", num_layers)
    errors.check_positive("layer_idx", layer_idx, 0)
    if layer_idx > num_layers:
        errors.fail("layer_idx", f"at most num_layers = {num_layers}", layer_idx)
    heads = torch.arange(k.shape[2], device=k.device, dtype=torch.float32)
    return -(8 / len(heads)) * (1 - layer_idx / num_layers) * heads


@keywords()
def chunk_lightning_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    state_v_first: bool = False,
    cu_seqlens_cpu: torch.Tensor | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fixed decays that depend on head and layer (arXiv 2401.04658). Options of `chunk_simple_gla`."""
    decay = _lightning_decay(q, k, v, layer_idx, num_layers)
    return chunk_simple_gla(
        q,
        k,
        v,
        None,
        decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        normalize=normalize,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


@keywords()
def fused_recurrent_lightning_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    state_v_first: bool = False,
    normalize: bool = False,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_lightning_attn` for few tokens; options of `fused_recurrent_simple_gla`."""
    decay = _lightning_decay(q, k, v, layer_idx, num_layers)
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        None,
        decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        normalize=normalize,
        max_seqlen=max_seqlen,
    )
