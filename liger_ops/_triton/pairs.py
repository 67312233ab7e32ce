"""Pairs of rows within a chunk under a decay per channel, in blocks of R rows.

Shapes: as in `tiles`; R rows of a block, a [S,HQ,C] pairs of a chunk: row t, column s.

A pair's decay is split at a row between its two: sums on either side, both <= 0. Where their blocks are neighbours of
a run of two, that row is the second block's first; where they are of different runs, the second run's first row. Within
a block there may be no such row; there the decays and their inverses from the block's first row on are multiplied
apart as long as they are far from overflow, and one row is taken at a time otherwise.
"""

import triton
import triton.language as tl

from liger_ops import limits
from liger_ops._triton.decays import FACTORABLE
from liger_ops._triton.tiles import (
    dot,
    head_scale,
    load_chunk,
    load_decays,
    load_pairs,
    load_pairs_turned,
    load_rows,
    offsets,
    store_rows,
)

HALF = tl.constexpr(float(limits.HALF_EXPONENT))
LOG2E = tl.constexpr(1.4426950408889634)
# Running sums of multiples of this stay exact down to FACTORABLE.
STEP = tl.constexpr(2.0**-13)


@triton.jit
def scan_blocks(b_g, R: tl.constexpr, REVERSE: tl.constexpr = False):
    """Running sums within blocks of R rows of b_g [C,BK]."""
    C: tl.constexpr = b_g.shape[0]
    b_sum = tl.cumsum(tl.reshape(b_g, [C // R, R, b_g.shape[1]]), 1, reverse=REVERSE)
    return tl.reshape(b_sum, [C, b_g.shape[1]])


@triton.jit
def load_fine(fine, i_c, i_h, H, o_r, C: tl.constexpr, R: tl.constexpr):
    """Of every row [C] whether the decays of its block may divide."""
    return tl.load(fine + (i_c * H + i_h) * (C // R) + o_r // R) != 0


@triton.jit
def apart(b_g, R: tl.constexpr):
    """The decays through each row of its block of b_g [C,BK] times 2^HALF, and their inverses over it.

    A running sum near FACTORABLE is rounded at 4e-6, which both factors of a pair would keep although the pair's own
    decay be weak. So the sums are taken in two parts: multiples of STEP, without rounding, and small rests. Below
    FACTORABLE both are finite; the first is a decay still, the second means nothing.
    """
    b_g = tl.maximum(b_g * LOG2E, 2 * FACTORABLE)
    b_high = tl.floor(b_g / STEP) * STEP
    b_low = scan_blocks(b_g - b_high, R)
    b_high = tl.maximum(scan_blocks(b_high, R), 2 * FACTORABLE) + HALF
    return tl.exp2(b_high) * tl.exp2(b_low), tl.exp2(-b_high) * tl.exp2(-b_low)


@triton.jit
def across(b_near, o_r, R: tl.constexpr):
    """Factors [C,BK] that reach from a run of two blocks to the next: of the later row, and of the earlier.

    b_near are those from behind each row through the next block's first; at a block's first row, a whole block.
    """
    C: tl.constexpr = b_near.shape[0]
    BK: tl.constexpr = b_near.shape[1]
    b_whole = tl.sum(tl.reshape(tl.where((o_r % R == 0)[:, None], b_near, 0.0), [C // R, R, BK]), 1)
    b_whole = tl.reshape(b_whole, [C // (2 * R), 2, BK])
    m_first = (tl.arange(0, 2) == 0)[None, :, None]
    b_first, b_second = tl.sum(tl.where(m_first, b_whole, 0.0), 1), tl.sum(tl.where(m_first, 0.0, b_whole), 1)
    b_later = tl.where(m_first, 1.0, b_first[:, None, :])
    b_earlier = tl.where(m_first, b_second[:, None, :], 1.0)
    b_later = tl.broadcast_to(tl.reshape(b_later, [C // R, 1, BK]), [C // R, R, BK])
    b_earlier = tl.broadcast_to(tl.reshape(b_earlier, [C // R, 1, BK]), [C // R, R, BK])
    return tl.reshape(b_later, [C, BK]), tl.reshape(b_earlier, [C, BK])


@triton.jit
def kinds_of_pairs(b_t, b_s, R: tl.constexpr):
    """Masks of pairs s <= t: within a block, of the second block of a run of two with its first, and between runs."""
    m_own = (b_t // R == b_s // R) & (b_t >= b_s)
    m_run = (b_t // (2 * R) == b_s // (2 * R)) & (b_t // R > b_s // R)
    return m_own, m_run, b_t // (2 * R) > b_s // (2 * R)


@triton.jit
def load_row(x, i_t, i_h, H, K, o_k, i, n):
    """Row i_t + i of x [S,H,K] as [BK], zero from row n on."""
    return tl.load(x + ((i_t + i) * H + i_h) * K + o_k, mask=(o_k < K) & (o_k * 0 + i < n), other=0.0).to(tl.float32)


@triton.jit
def stacked(b_x, N: tl.constexpr):
    """b_x [C,BK] for each of N heads, [N*C,BK]."""
    if N > 1:
        b_y = tl.broadcast_to(b_x[None, :, :], [N, b_x.shape[0], b_x.shape[1]])
        b_y = tl.reshape(b_y, [N * b_x.shape[0], b_x.shape[1]])
    else:
        b_y = b_x
    return b_y


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
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[t,s] = sum_k q_t exp(g_{s+1} + ... + g_t) k_s for s <= t: q [S,HQ,K], k, g [S,H,K] -> a [S,HQ,C].

    In the dtype of a, float32 or float64. A program has HEADS query heads of a group, one below the other. What it
    says of pairs within blocks that are not fine means nothing: `own_scores_kernel` does.
    """
    i_p, i_c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_q, HQ = i_p * HEADS, H * G
    i_h = i_q // G
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r, o_m = tl.arange(0, C), tl.arange(0, HEADS * C)
    o_t = o_m % C
    m_r, m_t = o_r < n, o_t < n
    m_own, m_run, m_far = kinds_of_pairs(o_t[:, None], o_r[None, :], R)
    # Rows of the other heads of a group lie one head further on.
    p_q, p_a = q + (o_m // C)[:, None] * K, a + (o_m // C)[:, None] * C

    kind: tl.constexpr = a.dtype.element_ty
    b_a = tl.zeros([HEADS * C, C], kind)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(p_q, i_t, i_q, HQ, K, o_t, o_k, m_t).to(kind)
        b_k = load_rows(k, i_t, i_h, H, K, o_r, o_k, m_r).to(kind)
        b_g = load_decays(g, i_t, i_h, H, K, o_r, o_k, m_r & (o_r % R > 0)).to(kind)
        b_fall, b_rise = apart(b_g, R)
        b_to = b_q * stacked(b_fall, HEADS)
        b_part = dot(b_to, tl.trans(b_k * b_rise), PRECISION)
        b_part = tl.where(m_own, b_part, 0.0)
        if C > R:
            b_next = load_decays(g, i_t + 1, i_h, H, K, o_r, o_k, o_r < n - 1).to(kind)
            b_near = tl.exp(scan_blocks(b_next, R, REVERSE=True))
            b_from = b_k * b_near * tl.exp2(-HALF)
            b_part = tl.where(m_run, dot(b_to, tl.trans(b_from), PRECISION), b_part)
            if C > 2 * R:
                b_later, b_earlier = across(b_near, o_r, R)
                b_far = dot(b_to * stacked(b_later, HEADS), tl.trans(b_from * b_earlier), PRECISION)
                b_part = tl.where(m_far, b_far, b_part)
        b_a += b_part
    m_a = m_t[:, None] & (o_t[:, None] >= o_r[None, :])
    tl.store(p_a + offsets(i_t, i_q, HQ, C, o_t, o_r), b_a, mask=m_a)


@triton.jit
def own_scores_kernel(
    q,
    k,
    g,
    fine,
    a,
    chunks,
    H,
    G,
    K,
    C: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
):
    """The scores of `scores_kernel` within blocks that are not fine, one row at a time."""
    i_q, i_c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_h, HQ = i_q // G, H * G
    i_t, n = load_chunk(chunks, i_c)
    o_r = tl.arange(0, R)
    kind: tl.constexpr = a.dtype.element_ty
    for i_b in range(tl.cdiv(n, R)):
        if tl.load(fine + (i_c * H + i_h) * (C // R) + i_b) == 0:
            i_first, n_r = i_b * R, tl.minimum(n - i_b * R, R)
            i_r, m_r = i_t + i_first, o_r < n_r
            b_own = tl.zeros([R, R], kind)
            for i_k in range(tl.cdiv(K, BK)):
                o_k = i_k * BK + tl.arange(0, BK)
                b_q = load_rows(q, i_r, i_q, HQ, K, o_r, o_k, m_r).to(kind)
                b_sum = tl.zeros([R, BK], kind)
                for i in range(R):
                    s = R - 1 - i
                    b_s = b_q * load_row(k, i_r, i_h, H, K, o_k, s, n_r)[None, :] * tl.exp(b_sum)
                    b_own += tl.where(o_r[None, :] == s, tl.sum(b_s, 1)[:, None], 0.0)
                    b_sum += tl.where(o_r[:, None] >= s, load_row(g, i_r, i_h, H, K, o_k, s, n_r)[None, :], 0.0)
            m_own = m_r[:, None] & (o_r[:, None] >= o_r[None, :])
            tl.store(a + offsets(i_r, i_q, HQ, C, o_r, i_first + o_r), b_own, mask=m_own)


@triton.jit
def products_kernel(
    x,
    y,
    e,
    a,
    chunks,
    scale,
    H,
    G,
    V,
    C: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    GATED: tl.constexpr,
    STRICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[t,s] = scale x_t . y_s for s <= t: x [S,HQ,V], y [S,H,V] -> a [S,HQ,C]. STRICT as `head_scale` has it.

    Per head (BG = 1) times the pair's decay, e [S,H,C].
    """
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
    if GATED and BG == 1:
        b_a *= load_pairs(e, i_t, i_h, H, o_r, n, C)
    m_a = m_r[:, None] & (o_r[:, None] >= o_r[None, :])
    tl.store(a + offsets(i_t, i_q, HQ, C, o_r, o_r), b_a * head_scale(scale, i_q % G, G, STRICT), mask=m_a)


@triton.jit
def pairs_gradient_kernel(
    da,
    q,
    k,
    g,
    fine,
    dq,
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
    """What the gradients da [S,HQ,C] of scores make of queries and keys, dq [S,HQ,K] and dk [S,H,K].

    dq_t = sum_{s<t} da[t,s] exp(g_{s+1} + ... + g_t) k_s and dk_s = sum_{t>s} da[t,s] exp(g_{s+1} + ... + g_t) q_t, in
    the chunk. What blocks that are not fine give themselves is left to `own_gradients_kernel`.
    """
    i_h, i_k, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
    HQ = H * G
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    m_r = o_r < n
    m_own, m_run, m_far = kinds_of_pairs(o_r[:, None], o_r[None, :], R)
    m_own_turned, m_run_turned, m_far_turned = kinds_of_pairs(o_r[None, :], o_r[:, None], R)
    m_other = o_r[:, None] != o_r[None, :]

    b_k = load_rows(k, i_t, i_h, H, K, o_r, o_k, m_r).to(tl.float32)
    b_g = load_decays(g, i_t, i_h, H, K, o_r, o_k, m_r & (o_r % R > 0))
    b_fall, b_rise = apart(b_g, R)
    # Zeros where it is not fine: what is infinite would reach other blocks as NaN.
    b_rise = tl.where(load_fine(fine, i_c, i_h, H, o_r, C, R)[:, None], b_rise, 0.0)
    if C > R:
        b_next = load_decays(g, i_t + 1, i_h, H, K, o_r, o_k, o_r < n - 1)
        b_near = tl.exp(scan_blocks(b_next, R, REVERSE=True))
        b_from = b_near * tl.exp2(-HALF)
    if C > 2 * R:
        b_later, b_earlier = across(b_near, o_r, R)
    b_dk = tl.zeros([C, BK], tl.float32)
    for i_g in range(G):
        i_q = i_h * G + i_g
        b_to = load_rows(q, i_t, i_q, HQ, K, o_r, o_k, m_r).to(tl.float32) * b_fall
        b_a = load_pairs(da, i_t, i_q, HQ, o_r, n, C)
        b_turned = load_pairs_turned(da, i_t, i_q, HQ, o_r, n, C)
        b_dq = dot(tl.where(m_own & m_other, b_a, 0.0), b_k * b_rise, PRECISION)
        b_dk += dot(tl.where(m_own_turned & m_other, b_turned, 0.0), b_to, PRECISION) * b_rise
        if C > R:
            b_dq += dot(tl.where(m_run, b_a, 0.0), b_k * b_from, PRECISION)
            b_dk += dot(tl.where(m_run_turned, b_turned, 0.0), b_to, PRECISION) * b_from
        if C > 2 * R:
            b_dq += dot(tl.where(m_far, b_a, 0.0), b_k * b_from * b_earlier, PRECISION) * b_later
            b_part = dot(tl.where(m_far_turned, b_turned, 0.0), b_to * b_later, PRECISION)
            b_dk += b_part * (b_from * b_earlier)
        b_dq *= b_fall
        store_rows(dq, b_dq, i_t, i_q, HQ, K, o_r, o_k, m_r)
    store_rows(dk, b_dk, i_t, i_h, H, K, o_r, o_k, m_r)


@triton.jit
def own_gradients_kernel(
    da,
    q,
    k,
    g,
    fine,
    dq,
    dk,
    chunks,
    H,
    G,
    K,
    C: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
):
    """Adds to dq and dk of `pairs_gradient_kernel` what blocks that are not fine give themselves."""
    i_h, i_k, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
    HQ = H * G
    i_t, n = load_chunk(chunks, i_c)
    o_r, o_k = tl.arange(0, R), i_k * BK + tl.arange(0, BK)
    for i_b in range(tl.cdiv(n, R)):
        if tl.load(fine + (i_c * H + i_h) * (C // R) + i_b) == 0:
            i_first, n_r = i_b * R, tl.minimum(n - i_b * R, R)
            i_r, m_r = i_t + i_first, o_r < n_r
            b_dk = load_rows(dk, i_r, i_h, H, K, o_r, o_k, m_r)
            for i_g in range(G):
                i_q = i_h * G + i_g
                b_dq = load_rows(dq, i_r, i_q, HQ, K, o_r, o_k, m_r)
                b_sum, b_part = tl.zeros([R, BK], tl.float32), tl.zeros([R, BK], tl.float32)
                for t in range(R):
                    s = R - 1 - t
                    p_a = da + ((i_r + o_r) * HQ + i_q) * C + i_first + s
                    b_column = tl.load(p_a, mask=m_r & (o_r > s), other=0.0)
                    b_dq += b_column[:, None] * load_row(k, i_r, i_h, H, K, o_k, s, n_r)[None, :] * tl.exp(b_sum)
                    b_sum += tl.where(o_r[:, None] >= s, load_row(g, i_r, i_h, H, K, o_k, s, n_r)[None, :], 0.0)
                    b_part += tl.where(o_r[:, None] < t, load_row(g, i_r, i_h, H, K, o_k, t, n_r)[None, :], 0.0)
                    p_a = da + ((i_r + t) * HQ + i_q) * C + i_first + o_r
                    b_row = tl.load(p_a, mask=(o_r < t) & (o_r * 0 + t < n_r), other=0.0)
                    b_dk += b_row[:, None] * load_row(q, i_r, i_q, HQ, K, o_k, t, n_r)[None, :] * tl.exp(b_part)
                store_rows(dq, b_dq, i_r, i_q, HQ, K, o_r, o_k, m_r)
            store_rows(dk, b_dk, i_r, i_h, H, K, o_r, o_k, m_r)
