"""Gradients of the features and values that left the window, and of their gates.

Shapes: as in `joint_outputs`; dh [chunks,H,M,V] and dz [chunks,H,M] the gradients of the state behind a chunk.
"""

import triton
import triton.language as tl

from liger_ops._triton.joint_tiles import LOG2, MOST, key_features, load_rest, place, program, query_features
from liger_ops._triton.tiles import dot, load_pairs_turned, load_rows, store_rows


@triton.jit
def load_queries(q_log, mix, top, lse, i_row, i_q, HQ, M, o_r, o_k, m_r):
    """Features [C,BK] of a chunk's queries in units of all that each of them weighs."""
    o_row = (i_row + o_r) * HQ + i_q
    b_top = tl.load(top + o_row, mask=m_r, other=0.0)
    b_less = tl.load(mix + i_q) * tl.exp2(b_top - tl.load(lse + o_row, mask=m_r, other=0.0))
    b_log = load_rows(q_log, i_row, i_q, HQ, M, o_r, o_k, m_r)
    return query_features(b_log, b_top[:, None]) * tl.where(m_r, b_less, 0.0)[:, None]


@triton.jit
def load_factors(behind, e, i_row, i_h, H, o_r, n, C: tl.constexpr, GATED: tl.constexpr):
    """What is left of each row behind the chunk [C], and of row s at row t [C,C] of s and t."""
    if GATED:
        b_end = tl.load(behind + (i_row + o_r) * H + i_h, mask=o_r < n, other=0.0)
        b_e = load_pairs_turned(e, i_row, i_h, H, o_r, n, C)
    else:
        b_end = tl.where(o_r < n, 1.0, 0.0)
        b_e = tl.where((o_r[:, None] <= o_r[None, :]) & (o_r < n)[None, :], 1.0, 0.0)
    return b_end, b_e


@triton.jit
def far_keys_kernel(
    v,
    q_log,
    k_log,
    behind,
    e,
    h,
    z,
    dh,
    dz,
    rest,
    mix,
    top,
    lse,
    delta,
    do,
    dk_log,
    d_behind,
    straddle,
    B,
    T,
    S,
    W,
    H,
    G,
    M,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk_log [B,T,H,M] of a block of features. And a part for every such block of the gradient of the log of what each
    row leaves in the state [blocks,B,T,H], and of what is in the state both before and behind the chunk
    [blocks,chunks,H].
    """
    i_k, i_h, i_c = program(tl.cdiv(M, BK), H)
    HQ = H * G
    i_b, i_t, n = place(T, i_c, C)
    i_row, i_s = i_b * T + i_t, S - T - W + i_t
    o_r, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), tl.arange(0, BV)
    m_t = o_r < n
    m_r = m_t & load_rest(rest, i_b, i_s, S, o_r)
    low: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32

    b_end, b_e = load_factors(behind, e, i_row, i_h, H, o_r, n, C, GATED)
    b_v = load_rows(v, i_b * S + i_s, i_h, H, V, o_r, o_v, m_r)
    o_h = (i_c * H + i_h) * M * V + o_k[:, None] * V + o_v[None, :]
    m_h = (o_k < M)[:, None] & (o_v < V)[None, :]
    b_dh = tl.load(dh + o_h, mask=m_h, other=0.0)
    b_dz = tl.load(dz + (i_c * H + i_h) * M + o_k, mask=o_k < M, other=0.0)
    b_df = (dot(b_v, tl.trans(b_dh), PRECISION) + b_dz[None, :]) * b_end[:, None]
    b_log = load_rows(k_log, i_row, i_h, H, M, o_r, o_k, m_r).to(tl.float32)
    b_f = key_features(b_log, m_r[:, None] & (o_k < M)[None, :])
    if GATED:
        b_h = tl.load(h + o_h, mask=m_h, other=0.0)
        b_z = tl.load(z + (i_c * H + i_h) * M + o_k, mask=o_k < M, other=0.0)
        b_both = tl.sum(tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1) + b_z * b_dz, 0)
        i_first = i_k.to(tl.int64) * B
        tl.store(straddle + (i_first * tl.cdiv(T, C) + i_c) * H + i_h, b_both)
        tl.store(d_behind + (i_first * T + i_row + o_r) * H + i_h, tl.sum(b_df * b_f, 1), mask=m_t)
    for i_g in range(G):
        i_q = i_h * G + i_g
        b_qf = load_queries(q_log, mix, top, lse, i_row, i_q, HQ, M, o_r, o_k, m_t)
        b_do = load_rows(do, i_row, i_q, HQ, V, o_r, o_v, m_t)
        b_delta = tl.load(delta + (i_row + o_r) * HQ + i_q, mask=m_t, other=0.0)
        b_da = (dot(b_v, tl.trans(b_do), PRECISION) - b_delta[None, :]) * b_e
        b_df += dot(b_da.to(low), b_qf.to(low), PRECISION)
    b_df = tl.where(b_log * LOG2 <= MOST, b_df * b_f, 0.0)
    store_rows(dk_log, b_df, i_row, i_h, H, M, o_r, o_k, m_t)


@triton.jit
def far_values_kernel(
    v,
    q_log,
    k_log,
    behind,
    e,
    dh,
    rest,
    mix,
    top,
    lse,
    delta,
    do,
    dv,
    dg,
    T,
    S,
    W,
    H,
    G,
    M,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to dv [B,S,H,V] what comes of a chunk that left the window; dg [B,T,H] of pairs within the chunk."""
    _, i_h, i_c = program(1, H)
    HQ = H * G
    i_b, i_t, n = place(T, i_c, C)
    i_row, i_s = i_b * T + i_t, S - T - W + i_t
    o_r, o_v = tl.arange(0, C), tl.arange(0, BV)
    m_t = o_r < n
    m_r = m_t & load_rest(rest, i_b, i_s, S, o_r)
    low: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32

    b_end, b_e = load_factors(behind, e, i_row, i_h, H, o_r, n, C, GATED)
    b_dv = load_rows(dv, i_b * S + i_s, i_h, H, V, o_r, o_v, m_r).to(tl.float32)
    for i_k in range(tl.cdiv(M, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_f = load_rows(k_log, i_row, i_h, H, M, o_r, o_k, m_r)
        b_f = key_features(b_f, m_r[:, None] & (o_k < M)[None, :]) * b_end[:, None]
        p_h = dh + (i_c * H + i_h) * M * V + o_k[:, None] * V + o_v[None, :]
        b_dh = tl.load(p_h, mask=(o_k < M)[:, None] & (o_v < V)[None, :], other=0.0)
        b_dv += dot(b_f.to(low), b_dh, PRECISION)
    b_v = load_rows(v, i_b * S + i_s, i_h, H, V, o_r, o_v, m_r)
    b_pairs = tl.zeros([C, C], tl.float32)
    for i_g in range(G):
        i_q = i_h * G + i_g
        b_a = tl.zeros([C, C], tl.float32)
        for i_k in range(tl.cdiv(M, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            b_f = load_rows(k_log, i_row, i_h, H, M, o_r, o_k, m_r)
            b_f = key_features(b_f, m_r[:, None] & (o_k < M)[None, :])
            b_qf = load_queries(q_log, mix, top, lse, i_row, i_q, HQ, M, o_r, o_k, m_t)
            b_a += dot(b_f.to(low), tl.trans(b_qf.to(low)), PRECISION)
        b_a *= b_e
        b_do = load_rows(do, i_row, i_q, HQ, V, o_r, o_v, m_t)
        b_dv += dot(b_a.to(low), b_do, PRECISION)
        if GATED:
            b_delta = tl.load(delta + (i_row + o_r) * HQ + i_q, mask=m_t, other=0.0)
            b_pairs += b_a * (dot(b_v, tl.trans(b_do), PRECISION) - b_delta[None, :])
    store_rows(dv, b_dv, i_b * S + i_s, i_h, H, V, o_r, o_v, m_r)
    if GATED:
        # The gate of row r decays the pairs of rows s < r <= t.
        b_before = tl.cumsum(b_pairs, 0) - b_pairs
        b_dg = tl.sum(tl.where(o_r[:, None] <= o_r[None, :], b_before, 0.0), 1)
        tl.store(dg + (i_row + o_r) * H + i_h, b_dg, mask=m_t)
