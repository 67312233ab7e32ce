"""What queries see under one softmax: the sinks, their window and, from a state and rows that left it, all else.

Shapes: as in `joint_tiles`; P sinks, BD, BK, BV, BP blocks of D, M, V, P, HEADS query heads of a group at a time.
"""

import triton
import triton.language as tl

from liger_ops._triton.joint_tiles import (
    LOG2,
    MASKED,
    attend,
    is_near,
    key_features,
    load_rest,
    place,
    program,
    query_features,
)
from liger_ops._triton.tiles import dot, load_rows, offsets, store_rows


@triton.jit
def see(
    b_q,
    k,
    v,
    rest,
    i_b,
    i_s,
    S,
    W,
    i_h,
    H,
    D,
    V,
    o_s,
    o_t,
    o_d,
    o_v,
    scale,
    b_o,
    b_l,
    b_top,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What `attend` makes of the keys o_s of a chunk; EDGE: some are near to some rows only."""
    m_r = load_rest(rest, i_b, i_s, S, o_s)
    b_k = load_rows(k, i_b * S + i_s, i_h, H, D, o_s, o_d, m_r)
    # In one step with the scale, where a choice would take another.
    b_s = dot(b_q, tl.trans(b_k), PRECISION) * (scale * LOG2) + tl.where(m_r, 0.0, MASKED)[None, :]
    if EDGE:
        b_s = tl.where(is_near(o_t, o_s, W), b_s, MASKED)
    b_v = load_rows(v, i_b * S + i_s, i_h, H, V, o_s, o_v, m_r)
    return attend(b_s, b_v, b_o, b_l, b_top, PRECISION)


@triton.jit
def joint_kernel(
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
    o,
    top,
    lse,
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
    STEP: tl.constexpr,
    APART: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BP: tl.constexpr,
    FAR: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V], q_log [B,T,HQ,M], k_log [B,T,H,M] of the keys that leave, their factors
    to [B,T,H] and e [B,T,H,C], h [chunks,H,M,V], z [chunks,H,M], rest [B,S], column [B,P], mix [HQ] -> o [B,T,HQ,V]
    and, [B,T,HQ], the largest score nearby and the log of all weights.

    STEP: chunks of keys at a time that every row has near. APART: a product of its own for what is near in the chunk
    that leaves, which then takes no registers while its features are summed.
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
    low: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32

    b_q = load_rows(q, i_row, o_q, HQ, D, o_t, o_d, m_t)
    b_o = tl.zeros([HEADS * C, BV], tl.float32)
    b_l = tl.zeros([HEADS * C], tl.float32)
    b_top = tl.full([HEADS * C], MASKED, tl.float32)
    if BP > 0:
        o_p = tl.arange(0, BP)
        b_column = tl.load(column + i_b * P + o_p, mask=o_p < P, other=S)
        m_p = b_column < S
        b_sk = load_rows(k, i_b * S, i_h, H, D, b_column, o_d, m_p)
        b_ss = dot(b_q, tl.trans(b_sk), PRECISION) * (scale * LOG2)
        m_s = m_p[None, :] & (b_column[None, :] <= (S - T + i_t + o_t)[:, None])
        b_sv = load_rows(v, i_b * S, i_h, H, V, b_column, o_v, m_p)
        b_o, b_l, b_top = attend(tl.where(m_s, b_ss, MASKED), b_sv, b_o, b_l, b_top, PRECISION)
    # Ahead of the first key there is nothing to see.
    i_low = 0 if FAR else tl.maximum(0, -i_s // C)
    # Blocks from here on are beyond the reach of some rows, or too few for a step.
    i_whole = tl.maximum(i_low, 1)
    n_steps = tl.maximum((W + 1) // C - i_whole, 0) // STEP
    i_edge = i_whole + n_steps * STEP
    for i in range(n_steps):
        b_o, b_l, b_top = see(
            b_q,
            k,
            v,
            rest,
            i_b,
            i_s,
            S,
            W,
            i_h,
            H,
            D,
            V,
            (i_whole + i * STEP) * C + tl.arange(0, STEP * C),
            o_t,
            o_d,
            o_v,
            scale,
            b_o,
            b_l,
            b_top,
            False,
            PRECISION,
        )
    for i in range(1 if FAR and not APART else tl.minimum(i_low, 1), (C - 1 + W) // C + 2 - i_edge):
        o_s = tl.where(i == 0, 0, i_edge + i - 1) * C + o_r
        b_o, b_l, b_top = see(
            b_q,
            k,
            v,
            rest,
            i_b,
            i_s,
            S,
            W,
            i_h,
            H,
            D,
            V,
            o_s,
            o_t,
            o_d,
            o_v,
            scale,
            b_o,
            b_l,
            b_top,
            True,
            PRECISION,
        )
    if FAR:
        m_r = load_rest(rest, i_b, i_s, S, o_r)
        m_far = o_r[None, :] <= o_t[:, None]
        if not APART:
            # Rows above the diagonal are near, the others far: they share one product with the values.
            b_k = load_rows(k, i_b * S + i_s, i_h, H, D, o_r, o_d, m_r)
            b_s = dot(b_q, tl.trans(b_k), PRECISION) * (scale * LOG2)
            b_s = tl.where(is_near(o_t, o_r, W) & m_r[None, :], b_s, MASKED)
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_less = tl.exp2(b_top - b_new)
            b_top = b_new
            b_w = tl.exp2(b_s - b_top[:, None])
            b_o *= b_less[:, None]
            b_l *= b_less
        b_mix = tl.load(mix + o_q)
        b_a = tl.zeros([HEADS * C, C], tl.float32)
        if GATED:
            b_to = tl.load(to + (i_row + o_t) * H + i_h, mask=m_t, other=0.0)
        for i_k in range(tl.cdiv(M, BK)):
            o_k = i_k * BK + tl.arange(0, BK)
            b_qf = load_rows(q_log, i_row, o_q, HQ, M, o_t, o_k, m_t)
            b_qf = query_features(b_qf, b_top[:, None]) * b_mix[:, None]
            b_kf = load_rows(k_log, i_row, i_h, H, M, o_r, o_k, o_r < n)
            b_kf = key_features(b_kf, (m_r & (o_r < n))[:, None] & (o_k < M)[None, :])
            b_a += dot(b_qf.to(low), tl.trans(b_kf.to(low)), PRECISION)
            if GATED:
                b_qf *= b_to[:, None]
            p_h = h + (i_c * H + i_h) * M * V + o_k[:, None] * V + o_v[None, :]
            b_h = tl.load(p_h, mask=(o_k < M)[:, None] & (o_v < V)[None, :], other=0.0)
            b_z = tl.load(z + (i_c * H + i_h) * M + o_k, mask=o_k < M, other=0.0)
            b_o += dot(b_qf.to(low), b_h, PRECISION)
            b_l += tl.sum(b_qf * b_z[None, :], 1)
        if GATED:
            m_e = m_far & m_t[:, None]
            b_a *= tl.load(e + offsets(i_row, i_h, H, C, o_t, o_r), mask=m_e, other=0.0)
        b_a = tl.where(m_far, b_a, 0.0)
        if not APART:
            b_a += b_w
        b_l += tl.sum(b_a, 1)
        b_v = load_rows(v, i_b * S + i_s, i_h, H, V, o_r, o_v, m_r)
        b_o += dot(b_a.to(low), b_v, PRECISION)
    store_rows(o, b_o / b_l[:, None], i_row, o_q, HQ, V, o_t, o_v, m_t)
    o_row = (i_row + o_t) * HQ + o_q
    tl.store(top + o_row, b_top, mask=m_t)
    tl.store(lse + o_row, b_top + tl.log2(b_l), mask=m_t)
