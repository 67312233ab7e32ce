"""States of features that chunks of the joint softmax start from, forwards in time and, for the gradient, backwards.

Shapes: as in `joint_tiles`; N sequences, in pieces where they are few and long, R heads per head of the state.
"""

import triton
import triton.language as tl

from liger_ops._triton.joint_tiles import key_features, load_rest, query_features
from liger_ops._triton.tiles import dot, load_rows


@triton.jit
def load_turned(x, i_t, i_h, H, D, o_r, o_d, m_r):
    """The transpose [BD,C] of `load_rows`, as it comes from memory."""
    p_x = x + ((i_t + o_r.to(tl.int64)) * H + i_h)[None, :] * D + o_d[:, None]
    return tl.load(p_x, mask=m_r[None, :] & (o_d < D)[:, None], other=0.0)


@triton.jit
def far_states_kernel(
    logs,
    v,
    top,
    lse,
    delta,
    mix,
    rest,
    to,
    behind,
    first,
    h,
    z,
    last,
    total,
    sequences,
    T,
    S,
    W,
    H,
    R,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    REVERSE: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logarithms of key features [B,T,H,K], v [B,S,H,V], first and last [N,H,K,V+1] -> h [chunks,H,K,V] and, from
    values of 1, z [chunks,H,K].

    REVERSE: logarithms of query features [B,T,HQ,K], the output's gradient v [B,T,HQ,V] and -delta [B,T,HQ] for 1.
    PART: of a piece of a sequence only last, from nothing, and what it keeps, total [N,H,1].
    """
    i_v, i_k, i_nh = tl.program_id(2), tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    i_begin, i_end = tl.load(sequences + i_n * 3), tl.load(sequences + i_n * 3 + 1)
    i_first = tl.load(sequences + i_n * 3 + 2)
    i_b = i_begin // T
    i_off = i_b * S + S - T - W - i_b * T
    o_r, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_h = m_k[:, None] & (o_v < V)[None, :]
    # Every block of values has the same z: the first one tells.
    m_z = o_k + i_v * K < K
    o_first = i_nh * K * (V + 1) + o_k * (V + 1)
    low: tl.constexpr = tl.bfloat16 if v.dtype.element_ty == tl.bfloat16 else tl.float32

    if PART:
        b_h = tl.zeros((BK, BV), tl.float32)
        b_z = tl.zeros((BK,), tl.float32)
        b_total = 1.0
    else:
        b_h = tl.load(first + o_first[:, None] + o_v[None, :], mask=m_h, other=0.0)
        b_z = tl.load(first + o_first + V, mask=m_k, other=0.0)
    n_c = tl.cdiv(i_end - i_begin, C)
    for i in range(n_c):
        i_c = n_c - 1 - i if REVERSE else i
        i_t = i_begin + i_c * C
        n = tl.minimum(i_end - i_t, C)
        m_r = o_r < n
        if not PART:
            o_h = ((i_first + i_c) * H + i_h) * K + o_k
            tl.store(h + o_h[:, None] * V + o_v[None, :], b_h.to(h.dtype.element_ty), mask=m_h)
            tl.store(z + o_h, b_z, mask=m_z)
        if GATED:
            b_decay = tl.load(to + (i_t + n - 1) * H + i_h)
            b_h *= b_decay
            b_z *= b_decay
            if PART:
                b_total *= b_decay
            b_w = tl.load((to if REVERSE else behind) + (i_t + o_r) * H + i_h, mask=m_r, other=0.0)
        for i_r in range(R):
            i_x = i_h * R + i_r
            b_f = load_turned(logs, i_t, i_x, H * R, K, o_r, o_k, m_r)
            if REVERSE:
                o_x = (i_t + o_r) * (H * R) + i_x
                b_top = tl.load(top + o_x, mask=m_r, other=0.0)
                b_less = tl.load(mix + i_x) * tl.exp2(b_top - tl.load(lse + o_x, mask=m_r, other=0.0))
                b_f = query_features(b_f, b_top[None, :]) * tl.where(m_r, b_less, 0.0)[None, :]
                b_one = -tl.load(delta + o_x, mask=m_r, other=0.0)
                b_v = load_rows(v, i_t, i_x, H * R, V, o_r, o_v, m_r)
            else:
                m_f = m_r & load_rest(rest, i_b, i_off + i_t - i_b * S, S, o_r)
                b_f = key_features(b_f, m_f[None, :])
                b_one = tl.full((C,), 1.0, tl.float32)
                b_v = load_rows(v, i_off + i_t, i_x, H, V, o_r, o_v, m_r)
            if GATED:
                b_f *= b_w[None, :]
            b_h += dot(b_f.to(low), b_v, PRECISION)
            b_z += tl.sum(b_f * b_one[None, :], 1)
    tl.store(last + o_first[:, None] + o_v[None, :], b_h, mask=m_h)
    tl.store(last + o_first + V, b_z, mask=m_z)
    if PART and GATED:
        tl.store(total + i_nh, b_total, mask=i_k + i_v < 1)
