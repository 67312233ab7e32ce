"""Gradients of the joint softmax by queries, and by keys and values in the window or among the sinks.

Shapes: as in `joint_outputs`. With p the weights after the division and delta = do . o, the gradient of a score is
p (do . v - delta): what is far is the same with values [v, 1], of which [do, -delta] is the output's gradient.
"""

import triton
import triton.language as tl

from liger_ops._triton.joint_tiles import LOG2, MASKED, MOST, is_near, key_features, load_rest, place, program
from liger_ops._triton.tiles import dot, load_rows, offsets, store_rows


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    q_log,
    k_log,
    to,
    e,
    h,
    z,
    rest,
    column,
    mix,
    top,
    lse,
    o,
    do,
    delta,
    dq,
    dq_log,
    d_mix,
    d_to,
    scale,
    T,
    S,
    W,
    H,
    G,
    D,
    M,
    V,
    P,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BP: tl.constexpr,
    FAR: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq [B,T,HQ,D], dq_log [B,T,HQ,M] and, of each row [B,T,HQ], delta = do . o, the gradient of its mix, and of the
    log of what the state gives it.
    """
    _, i_p, i_c = program(1, H * G // HEADS)
    i_q, HQ = i_p * HEADS, H * G
    i_h = i_q // G
    i_b, i_t, n = place(T, i_c, C)
    i_row, i_s = i_b * T + i_t, S - T - W + i_t
    o_m, o_r = tl.arange(0, HEADS * C), tl.arange(0, C)
    o_t, o_q = o_m % C, i_q + o_m // C
    m_t = o_t < n
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    o_row = (i_row + o_t) * HQ + o_q
    low: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32

    b_q = load_rows(q, i_row, o_q, HQ, D, o_t, o_d, m_t)
    b_do = load_rows(do, i_row, o_q, HQ, V, o_t, o_v, m_t)
    b_lse = tl.load(lse + o_row, mask=m_t, other=0.0)[:, None]
    b_out = load_rows(o, i_row, o_q, HQ, V, o_t, o_v, m_t)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + o_row, b_delta, mask=m_t)
    b_delta = b_delta[:, None]
    b_dq = tl.zeros([HEADS * C, BD], tl.float32)
    if BP > 0:
        o_p = tl.arange(0, BP)
        b_column = tl.load(column + i_b * P + o_p, mask=o_p < P, other=S)
        m_p = b_column < S
        b_sk = load_rows(k, i_b * S, i_h, H, D, b_column, o_d, m_p)
        b_sv = load_rows(v, i_b * S, i_h, H, V, b_column, o_v, m_p)
        m_s = m_p[None, :] & (b_column[None, :] <= (S - T + i_t + o_t)[:, None])
        b_ss = dot(b_q, tl.trans(b_sk), PRECISION) * (scale * LOG2) - b_lse
        b_ss = tl.exp2(tl.where(m_s, b_ss, MASKED)) * (dot(b_do, tl.trans(b_sv), PRECISION) - b_delta)
        b_dq = dot(b_ss.to(low), b_sk, PRECISION)
    for i in range(1 if FAR else tl.maximum(0, -i_s // C), (C - 1 + W) // C + 1):
        o_s = i * C + o_r
        m_r = load_rest(rest, i_b, i_s, S, o_s)
        b_k = load_rows(k, i_b * S + i_s, i_h, H, D, o_s, o_d, m_r)
        b_v = load_rows(v, i_b * S + i_s, i_h, H, V, o_s, o_v, m_r)
        b_p = dot(b_q, tl.trans(b_k), PRECISION) * (scale * LOG2) - b_lse
        b_p = tl.exp2(tl.where(is_near(o_t, o_s, W) & m_r[None, :], b_p, MASKED))
        b_p *= dot(b_do, tl.trans(b_v), PRECISION) - b_delta
        b_dq += dot(b_p.to(low), b_k, PRECISION)
    if FAR:
        m_r = load_rest(rest, i_b, i_s, S, o_r)
        m_far = o_r[None, :] <= o_t[:, None]
        b_k = load_rows(k, i_b * S + i_s, i_h, H, D, o_r, o_d, m_r)
        b_v = load_rows(v, i_b * S + i_s, i_h, H, V, o_r, o_v, m_r)
        b_da = dot(b_do, tl.trans(b_v), PRECISION) - b_delta
        b_p = dot(b_q, tl.trans(b_k), PRECISION) * (scale * LOG2) - b_lse
        b_p = tl.exp2(tl.where(is_near(o_t, o_r, W) & m_r[None, :], b_p, MASKED))
        b_dq += dot((b_p * b_da).to(low), b_k, PRECISION)
    store_rows(dq, b_dq * scale, i_row, o_q, HQ, D, o_t, o_d, m_t)
    if FAR:
        if GATED:
            m_e = m_far & m_t[:, None]
            b_da *= tl.load(e + offsets(i_row, i_h, H, C, o_t, o_r), mask=m_e, other=0.0)
            b_to = tl.load(to + (i_row + o_t) * H + i_h, mask=m_t, other=0.0)
        b_da = tl.where(m_far, b_da, 0.0).to(low)
        b_top = tl.load(top + o_row, mask=m_t, other=0.0)[:, None]
        b_less = tl.exp2(b_top - b_lse)
        b_mix = tl.load(mix + o_q)
        b_d_mix = tl.zeros([HEADS * C], tl.float32)
        b_d_to = tl.zeros([HEADS * C], tl.float32)
        for i_k in range(tl.cdiv(M, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            p_h = h + (i_c * H + i_h) * M * V + o_k[:, None] * V + o_v[None, :]
            b_h = tl.load(p_h, mask=(o_k < M)[:, None] & (o_v < V)[None, :], other=0.0)
            b_z = tl.load(z + (i_c * H + i_h) * M + o_k, mask=o_k < M, other=0.0)
            b_df = dot(b_do, tl.trans(b_h), PRECISION) - b_delta * b_z[None, :]
            b_x = load_rows(q_log, i_row, o_q, HQ, M, o_t, o_k, m_t).to(tl.float32) * LOG2 - b_top
            b_f = tl.exp2(tl.minimum(b_x, MOST)) * b_less
            if GATED:
                b_df *= b_to[:, None]
                b_d_to += tl.sum(b_df * b_f, 1)
            b_kf = load_rows(k_log, i_row, i_h, H, M, o_r, o_k, o_r < n)
            b_kf = key_features(b_kf, (m_r & (o_r < n))[:, None] & (o_k < M)[None, :])
            b_df += dot(b_da, b_kf.to(low), PRECISION)
            b_df *= b_f
            b_d_mix += tl.sum(tl.where((o_k < M)[None, :], b_df, 0.0), 1)
            b_df = tl.where(b_x <= MOST, b_df * b_mix[:, None], 0.0)
            store_rows(dq_log, b_df, i_row, o_q, HQ, M, o_t, o_k, m_t)
        tl.store(d_mix + o_row, b_d_mix, mask=m_t)
        if GATED:
            tl.store(d_to + o_row, b_d_to * b_mix, mask=m_t)


@triton.jit
def near_kernel(
    q,
    k,
    v,
    rest,
    lse,
    delta,
    do,
    dk,
    dv,
    scale,
    T,
    S,
    W,
    H,
    G,
    D,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk [B,S,H,D] and dv [B,S,H,V] of C keys from all queries that have them in their window, BK at a time."""
    _, i_h, i_c = program(1, H)
    HQ = H * G
    i_b, i_s, n = place(S, i_c, C)
    o_r, o_b, o_d, o_v = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BD), tl.arange(0, BV)
    m_r = load_rest(rest, i_b, i_s, S, o_r)
    # The first query that has the first of the keys.
    i_first = i_s - (S - T)
    i_low = tl.maximum(0, -i_first // BK)
    n_t = tl.maximum(tl.minimum((C + W - 2) // BK + 1, tl.cdiv(T - i_first, BK)) - i_low, 0)
    low: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32

    b_k = load_rows(k, i_b * S + i_s, i_h, H, D, o_r, o_d, m_r)
    b_v = load_rows(v, i_b * S + i_s, i_h, H, V, o_r, o_v, m_r)
    b_dk = tl.zeros([C, BD], tl.float32)
    b_dv = tl.zeros([C, BV], tl.float32)
    for j in range(n_t * G):
        i_t, i_q = i_first + (i_low + j // G) * BK, i_h * G + j % G
        m_t = (i_t + o_b >= 0) & (i_t + o_b < T)
        b_q = load_rows(q, i_b * T + i_t, i_q, HQ, D, o_b, o_d, m_t)
        b_do = load_rows(do, i_b * T + i_t, i_q, HQ, V, o_b, o_v, m_t)
        o_row = (i_b * T + i_t + o_b) * HQ + i_q
        b_lse = tl.load(lse + o_row, mask=m_t, other=0.0)
        b_delta = tl.load(delta + o_row, mask=m_t, other=0.0)
        o_back = (i_t - i_first + o_b)[None, :] - o_r[:, None]
        m_near = (o_back >= 0) & (o_back < W) & m_t[None, :] & m_r[:, None]
        b_p = dot(b_k, tl.trans(b_q), PRECISION) * (scale * LOG2) - b_lse[None, :]
        b_p = tl.exp2(tl.where(m_near, b_p, MASKED))
        b_dv += dot(b_p.to(low), b_do, PRECISION)
        b_p *= dot(b_v, tl.trans(b_do), PRECISION) - b_delta[None, :]
        b_dk += dot(b_p.to(low), b_q, PRECISION)
    store_rows(dk, b_dk * scale, i_b * S + i_s, i_h, H, D, o_r, o_d, o_r < n)
    store_rows(dv, b_dv, i_b * S + i_s, i_h, H, V, o_r, o_v, o_r < n)


@triton.jit
def sinks_kernel(
    q,
    k,
    v,
    column,
    lse,
    delta,
    do,
    dk,
    dv,
    scale,
    T,
    S,
    H,
    G,
    D,
    V,
    P,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BP: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What N chunks of queries add to the gradients of the sinks, dk [B,parts,H,P,D] and dv [B,parts,H,P,V]."""
    n_m = tl.cdiv(T, C * N)
    i_m, i_h, i_b = program(n_m, H)
    HQ = H * G
    o_r, o_p, o_d, o_v = tl.arange(0, C), tl.arange(0, BP), tl.arange(0, BD), tl.arange(0, BV)
    b_column = tl.load(column + i_b * P + o_p, mask=o_p < P, other=S)
    m_p = b_column < S
    low: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32

    b_k = load_rows(k, i_b * S, i_h, H, D, b_column, o_d, m_p)
    b_v = load_rows(v, i_b * S, i_h, H, V, b_column, o_v, m_p)
    b_dk = tl.zeros([BP, BD], tl.float32)
    b_dv = tl.zeros([BP, BV], tl.float32)
    for j in range(N * G):
        i_t, i_q = (i_m * N + j // G) * C, i_h * G + j % G
        m_t = i_t + o_r < T
        b_q = load_rows(q, i_b * T + i_t, i_q, HQ, D, o_r, o_d, m_t)
        b_do = load_rows(do, i_b * T + i_t, i_q, HQ, V, o_r, o_v, m_t)
        o_row = (i_b * T + i_t + o_r) * HQ + i_q
        b_lse = tl.load(lse + o_row, mask=m_t, other=0.0)
        b_delta = tl.load(delta + o_row, mask=m_t, other=0.0)
        m_s = m_p[:, None] & m_t[None, :] & (b_column[:, None] <= (S - T + i_t + o_r)[None, :])
        b_p = dot(b_k, tl.trans(b_q), PRECISION) * (scale * LOG2) - b_lse[None, :]
        b_p = tl.exp2(tl.where(m_s, b_p, MASKED))
        b_dv += dot(b_p.to(low), b_do, PRECISION)
        b_p *= dot(b_v, tl.trans(b_do), PRECISION) - b_delta[None, :]
        b_dk += dot(b_p.to(low), b_q, PRECISION)
    i_part = ((i_b * n_m + i_m) * H + i_h) * P
    store_rows(dk, b_dk * scale, i_part, 0, 1, D, o_p, o_d, o_p < P)
    store_rows(dv, b_dv, i_part, 0, 1, V, o_p, o_v, o_p < P)
