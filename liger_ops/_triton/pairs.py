"""Pairs of rows within a chunk under a decay per channel, in blocks of R rows.

Shapes: as in `tiles`; R rows of a block, a [S,HQ,C] pairs of a chunk: row t, column s.

A pair's decay is split at a row between its two: sums on either side, both <= 0. Within a block there may be no such
row; there the decays and their inverses from the block's first row on are multiplied apart as long as they are far
from overflow, and one row is taken at a time otherwise.
"""

import triton
import triton.language as tl

from liger_ops._triton.tiles import dot, from_row, head_scale, load_chunk, load_decays, load_rows, offsets, store_rows

# The smallest sum of decays, and the largest logarithm of an operand over its decay, that float32 factors bear.
FACTORABLE = tl.constexpr(-80.0)
REACH = tl.constexpr(84.0)
# About half of it in powers of two, moved from one factor to the other, keeps both clear of underflow.
HALF = tl.constexpr(57.0)
LOG2E = tl.constexpr(1.4426950408889634)
# Running sums of multiples of this stay exact down to FACTORABLE.
STEP = tl.constexpr(2.0**-13)


@triton.jit
def factorable(b_g, b_x):
    """Whether the decays b_g [R,BK] may divide b_x: their sums and the largest quotient stay far inside float32."""
    lowest = tl.min(tl.sum(b_g, 0))
    return (lowest >= FACTORABLE) & (tl.log(tl.maximum(tl.max(tl.abs(b_x)), 1.0)) - lowest <= REACH)


@triton.jit
def apart(b_g):
    """The decays through each row of b_g [R,BK] times 2^HALF, and their inverses over it.

    A running sum near FACTORABLE is rounded at 4e-6, which both factors of a pair would keep although the pair's own
    decay be weak. So the sums are taken in two parts: multiples of STEP, without rounding, and small rests. Below
    FACTORABLE both are finite and mean nothing.
    """
    b_g = tl.maximum(b_g * LOG2E, 2 * FACTORABLE)
    b_high = tl.floor(b_g / STEP) * STEP
    b_low = tl.cumsum(b_g - b_high, 0)
    b_high = tl.maximum(tl.cumsum(b_high, 0), 2 * FACTORABLE) + HALF
    return tl.exp2(b_high) * tl.exp2(b_low), tl.exp2(-b_high) * tl.exp2(-b_low)


@triton.jit
def load_row(x, i_t, i_h, H, K, o_k, i, n):
    """Row i_t + i of x [S,H,K] as [BK], zero from row n on."""
    return tl.load(x + ((i_t + i) * H + i_h) * K + o_k, mask=(o_k < K) & (o_k * 0 + i < n), other=0.0).to(tl.float32)


@triton.jit
def load_block(a, i_t, i_h, HQ, o_r, i_column, n, C: tl.constexpr):
    """The pairs s < t of a block with itself."""
    m_a = (o_r[:, None] > o_r[None, :]) & (o_r < n)[:, None]
    return tl.load(a + offsets(i_t, i_h, HQ, C, o_r, i_column + o_r), mask=m_a, other=0.0)


@triton.jit
def scores_kernel(
    q,
    k,
    g,
    a,
    chunks,
    H,
    G,
    K,
    C: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[t,s] = sum_k q_t exp(g_{s+1} + ... + g_t) k_s for s <= t: q [S,HQ,K], k, g [S,H,K] -> a [S,HQ,C].

    In the dtype of a, float32 or float64.
    """
    i_q, i_b, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_h, HQ, i_first = i_q // G, H * G, i_b * R
    i_t, n = load_chunk(chunks, i_c)
    if n <= i_first:
        return
    o_r, o_c = tl.arange(0, R), tl.arange(0, C)
    i_r = i_t + i_first
    n_r = tl.minimum(n - i_first, R)
    m_r = o_r < n_r

    kind = a.dtype.element_ty
    b_past = tl.zeros([R, C], kind)
    b_own = tl.zeros([R, R], kind)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(q, i_r, i_q, HQ, K, o_r, o_k, m_r).to(kind)
        b_k = load_rows(k, i_r, i_h, H, K, o_r, o_k, m_r).to(kind)
        b_g = load_decays(g, i_r, i_h, H, K, o_r, o_k, m_r & (o_r > 0)).to(kind)
        b_sum = tl.cumsum(b_g, 0)
        b_to = b_q * tl.exp(b_sum)
        if i_b > 0:
            b_from = load_rows(k, i_t, i_h, H, K, o_c, o_k, o_c < i_first)
            b_from = b_from * from_row(g, i_t, i_first + 1, i_h, H, K, o_c, o_k)
            b_past += dot(b_to, tl.trans(b_from), PRECISION)
        if factorable(b_g, b_k):
            b_fall, b_rise = apart(b_g)
            b_own += dot(b_q * b_fall, tl.trans(b_k * b_rise), PRECISION)
        else:
            b_sum = tl.zeros([R, BK], kind)
            for i in range(R):
                s = R - 1 - i
                b_s = b_q * load_row(k, i_r, i_h, H, K, o_k, s, n_r)[None, :] * tl.exp(b_sum)
                b_own += tl.where(o_r[None, :] == s, tl.sum(b_s, 1)[:, None], 0.0)
                b_sum += tl.where(o_r[:, None] >= s, load_row(g, i_r, i_h, H, K, o_k, s, n_r)[None, :], 0.0)
    m_past = m_r[:, None] & (o_c < i_first)[None, :]
    tl.store(a + offsets(i_r, i_q, HQ, C, o_r, o_c), b_past, mask=m_past)
    m_own = m_r[:, None] & (o_r[:, None] >= o_r[None, :])
    tl.store(a + offsets(i_r, i_q, HQ, C, o_r, i_first + o_r), b_own, mask=m_own)


@triton.jit
def products_kernel(
    x,
    y,
    a,
    chunks,
    scale,
    H,
    G,
    V,
    C: tl.constexpr,
    BV: tl.constexpr,
    STRICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[t,s] = scale x_t . y_s for s <= t: x [S,HQ,V], y [S,H,V] -> a [S,HQ,C]. STRICT as `head_scale` has it."""
    i_q, i_c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_h, HQ = i_q // G, H * G
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r = tl.arange(0, C)
    m_r = o_r < n
    b_a = tl.zeros([C, C], tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_x = load_rows(x, i_t, i_q, HQ, V, o_r, o_v, m_r)
        b_a += dot(b_x, tl.trans(load_rows(y, i_t, i_h, H, V, o_r, o_v, m_r)), PRECISION)
    m_a = m_r[:, None] & (o_r[:, None] >= o_r[None, :])
    tl.store(a + offsets(i_t, i_q, HQ, C, o_r, o_r), b_a * head_scale(scale, i_q % G, G, STRICT), mask=m_a)


@triton.jit
def queries_gradient_kernel(
    da,
    k,
    g,
    dq,
    chunks,
    H,
    G,
    K,
    C: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq_t = sum_{s<t} da[t,s] exp(g_{s+1} + ... + g_t) k_s, s in the chunk of t: da [S,HQ,C] -> dq [S,HQ,K]."""
    i_qk, i_b, i_c = tl.program_id(2), tl.program_id(1), tl.program_id(0).to(tl.int64)
    n_k = tl.cdiv(K, BK)
    i_q, i_k = (i_qk // n_k).to(tl.int64), i_qk % n_k
    i_h, HQ, i_first = i_q // G, H * G, i_b * R
    i_t, n = load_chunk(chunks, i_c)
    if n <= i_first:
        return
    o_r, o_c, o_k = tl.arange(0, R), tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    i_r = i_t + i_first
    n_r = tl.minimum(n - i_first, R)
    m_r = o_r < n_r

    b_k = load_rows(k, i_r, i_h, H, K, o_r, o_k, m_r).to(tl.float32)
    b_g = load_decays(g, i_r, i_h, H, K, o_r, o_k, m_r & (o_r > 0))
    b_sum = tl.cumsum(b_g, 0)
    b_dq = tl.zeros([R, BK], tl.float32)
    if i_b > 0:
        m_a = m_r[:, None] & (o_c < i_first)[None, :]
        b_past = tl.load(da + offsets(i_r, i_q, HQ, C, o_r, o_c), mask=m_a, other=0.0)
        b_from = load_rows(k, i_t, i_h, H, K, o_c, o_k, o_c < i_first)
        b_from = b_from * from_row(g, i_t, i_first + 1, i_h, H, K, o_c, o_k)
        b_dq += dot(b_past, b_from, PRECISION) * tl.exp(b_sum)
    b_a = load_block(da, i_r, i_q, HQ, o_r, i_first, n_r, C)
    if factorable(b_g, b_k * tl.maximum(tl.max(tl.abs(b_a)) * R, 1.0)):
        b_fall, b_rise = apart(b_g)
        b_dq += dot(b_a, b_k * b_rise, PRECISION) * b_fall
    else:
        b_sum = tl.zeros([R, BK], tl.float32)
        for i in range(R):
            s = R - 1 - i
            p_a = da + ((i_r + o_r) * HQ + i_q) * C + i_first + s
            b_column = tl.load(p_a, mask=m_r & (o_r > s), other=0.0)
            b_dq += b_column[:, None] * load_row(k, i_r, i_h, H, K, o_k, s, n_r)[None, :] * tl.exp(b_sum)
            b_sum += tl.where(o_r[:, None] >= s, load_row(g, i_r, i_h, H, K, o_k, s, n_r)[None, :], 0.0)
    store_rows(dq, b_dq, i_r, i_q, HQ, K, o_r, o_k, m_r)


@triton.jit
def keys_gradient_kernel(
    da,
    q,
    g,
    dk,
    chunks,
    H,
    G,
    K,
    C: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk_s = sum_{t>s} da[t,s] exp(g_{s+1} + ... + g_t) q_t, t in the chunk of s: da [S,HQ,C] -> dk [S,H,K]."""
    i_hk, i_b, i_c = tl.program_id(2), tl.program_id(1), tl.program_id(0).to(tl.int64)
    n_k = tl.cdiv(K, BK)
    i_h, i_k = (i_hk // n_k).to(tl.int64), i_hk % n_k
    HQ, i_first = H * G, i_b * R
    i_t, n = load_chunk(chunks, i_c)
    if n <= i_first:
        return
    o_r, o_c, o_k = tl.arange(0, R), tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    i_r = i_t + i_first
    n_r = tl.minimum(n - i_first, R)
    m_r = o_r < n_r
    i_next = i_first + R
    m_next = (o_c >= i_next) & (o_c < n)

    b_g = load_decays(g, i_r, i_h, H, K, o_r, o_k, m_r & (o_r > 0))
    b_fall, b_rise = apart(b_g)
    b_behind = from_row(g, i_r, n_r, i_h, H, K, o_r, o_k)
    b_later = tl.exp(tl.cumsum(load_decays(g, i_t, i_h, H, K, o_c, o_k, m_next), 0))
    b_dk = tl.zeros([R, BK], tl.float32)
    for i_g in range(G):
        i_q = i_h * G + i_g
        if i_next < n:
            p_a = da + offsets(i_t, i_q, HQ, C, o_c, i_first + o_r)
            b_next = tl.load(p_a, mask=m_next[:, None], other=0.0)
            b_t = load_rows(q, i_t, i_q, HQ, K, o_c, o_k, m_next) * b_later
            b_dk += dot(tl.trans(b_next), b_t, PRECISION) * b_behind
        b_q = load_rows(q, i_r, i_q, HQ, K, o_r, o_k, m_r).to(tl.float32)
        b_a = load_block(da, i_r, i_q, HQ, o_r, i_first, n_r, C)
        b_up = dot(tl.trans(b_a), b_q * b_fall, PRECISION)
        if factorable(b_g, b_up):
            b_dk += b_up * b_rise
        else:
            b_part = tl.zeros([R, BK], tl.float32)
            for t in range(R):
                b_part += tl.where(o_r[:, None] < t, load_row(g, i_r, i_h, H, K, o_k, t, n_r)[None, :], 0.0)
                p_a = da + ((i_r + t) * HQ + i_q) * C + i_first + o_r
                b_row = tl.load(p_a, mask=(o_r < t) & (o_r * 0 + t < n_r), other=0.0)
                b_row_q = load_row(q, i_r, i_q, HQ, K, o_k, t, n_r)
                b_dk += b_row[:, None] * b_row_q[None, :] * tl.exp(b_part)
    store_rows(dk, b_dk, i_r, i_h, H, K, o_r, o_k, m_r)
