"""Gated linear attention, chunked: one recurrence whose gate is None, [H], [B,T,H] or [B,T,H,K].

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

import itertools

import torch

from liger_ops import _checks
from liger_ops._torch.additive import recurrence

# A per-channel gate costs an exponential per row, column and channel of a chunk, the others one per row and column.
_CHUNK_PER_CHANNEL = 16
_CHUNK = 32


def _chunk(q, k, v, g, ranks, scale, initial_state, output_final_state, normalize, cu_seqlens, chunk_size):
    _checks.check_qkv(q, k, v)
    _checks.check_decay(g, k, ranks)
    bounds = _checks.check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    sequences = q.shape[0] if cu_seqlens is None else len(bounds) - 1
    _checks.check_state(initial_state, sequences, k, v.shape[-1] + normalize)
    if chunk_size is None:
        chunk_size = _CHUNK_PER_CHANNEL if g is not None and g.ndim == 4 else _CHUNK
    _checks.check_positive("chunk_size", chunk_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if g is not None and g.ndim == 1:
        g = g.expand(k.shape[:3])
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)

    outputs, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows, part = (slice(None) if cu_seqlens is None else slice(n, n + 1)), slice(start, end)
        state = None if initial_state is None else initial_state[rows]
        gate = None if g is None else g[:, part]
        o, state = recurrence(q[:, part], k[:, part], v[:, part], gate, scale, state, chunk_size)
        outputs.append(o)
        states.append(state)
    o = torch.cat(outputs, 1) if outputs else v.new_zeros(*q.shape[:3], v.shape[-1])
    if normalize:
        o = o[..., :-1] / o[..., -1:]
    if not output_final_state:
        return o, None
    return o, torch.cat(states) if states else v.new_zeros(0, *k.shape[2:], v.shape[-1], dtype=torch.float32)


def chunk_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    *,
    normalize: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention with a decay per key channel (arXiv 2312.06635, eq. 3).

    h_t = diag(exp(g_t)) h_{t-1} + k_t v_t^T, o_t = scale q_t h_t.

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H; the state is kept per key/value head.
        k, v: [B,T,H,K] keys and [B,T,H,V] values, in the dtype of q.
        g: [B,T,H,K] log decay per step, <= 0; -inf forgets everything.
        scale: factor on q; None means K ** -0.5.
        initial_state: [N,H,K,V] (V + 1 with normalize), or None for zeros.
        output_final_state: also return the state after the last token.
        normalize: divide o_t by the same recurrence over values of 1; its column rides last in the state.
        cu_seqlens: [N+1] bounds of sequences packed along time, batch 1.
        chunk_size: tokens handled by one matrix product; changes speed only.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the final state [N,H,K,V] in float32 (float64 for float64) or None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    return _chunk(q, k, v, g, (4,), scale, initial_state, output_final_state, normalize, cu_seqlens, chunk_size)


def chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    *,
    normalize: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention with one decay per head: g [B,T,H] per step, or g_gamma [H] fixed (RetNet, Mamba-2).

    With neither, plain linear attention. Everything else, including errors, as in `chunk_gla`.
    """
    if g is not None and g_gamma is not None:
        _checks.fail("g_gamma", "None when g is given", tuple(g_gamma.shape))
    ranks, g = ((3,), g) if g is not None else ((1,), g_gamma)
    return _chunk(q, k, v, g, ranks, scale, initial_state, output_final_state, normalize, cu_seqlens, chunk_size)


def chunk_linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = False,
    *,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Linear attention without decay (arXiv 2006.16236, eq. 16-20). Everything else as in `chunk_gla`."""
    return _chunk(q, k, v, None, (), scale, initial_state, output_final_state, normalize, cu_seqlens, chunk_size)
