"""Gradients of queries, keys and gates of a chunk, from the states on both of its sides.

Shapes: as in `tiles`; h, dh [chunks,H,K,V]: the state before a chunk, and the gradient of the state behind it.
"""

import triton
import triton.language as tl

from liger_ops._triton.tiles import dot, head_scale, load_chunk, load_pairs, load_pairs_turned, load_rows, store_rows


# As a constant, G = 1 next to V = 1 makes LLVM give up in Triton 3.9.
@triton.jit(do_not_specialize=["G"])
def gradients_kernel(
    q,
    k,
    v,
    to,
    behind,
    h,
    dh,
    do,
    da,
    dq_own,
    dk_own,
    dq,
    dk,
    dg,
    chunks,
    scale,
    S,
    H,
    G,
    K,
    V,
    KG,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    GATED: tl.constexpr,
    GATE_GRADIENT: tl.constexpr,
    STRICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq [S,HQ,K], dk [S,H,K], dg [S,H,K] per channel or, a part per block of channels, [blocks,S,H].

    da [S,HQ,C] are the gradients of products of the chunk's queries and keys; per channel of its scores instead, and
    dq_own and dk_own what its pairs s < t make of them. STRICT: the last head of a group is the key, which asks for
    what came before it: its gradient is part of dk.
    dg_r sums over all pairs s < r <= t: both outside of the chunk, one of them, or none. Only the last is a
    difference, of sums that neither token's own pair enters; per head it is the pairs' own sum where products are as
    fine as float32, which that difference is not.
    """
    PAIRED: tl.constexpr = BG == 1 and PRECISION == "ieee"
    i_h, i_k, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
    HQ = H * G
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    o_g = o_k if BG > 1 else tl.arange(0, 1)
    m_r = o_r < n
    n_v = tl.cdiv(V, BV)

    b_k = load_rows(k, i_t, i_h, H, K, o_r, o_k, m_r)
    b_dk = tl.zeros([C, BK], tl.float32)
    b_straddle = tl.zeros([BK], tl.float32)
    for i_v in range(n_v):
        o_v = i_v * BV + tl.arange(0, BV)
        o_h = (i_c * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
        m_h = (o_k < K)[:, None] & (o_v < V)[None, :]
        b_dh = tl.load(dh + o_h, mask=m_h, other=0.0)
        b_dk += dot(load_rows(v, i_t, i_h, H, V, o_r, o_v, m_r), tl.trans(b_dh), PRECISION)
        if GATE_GRADIENT:
            b_h = tl.load(h + o_h, mask=m_h, other=0.0)
            b_straddle += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
    if GATED:
        b_dk *= load_rows(behind, i_t, i_h, H, KG, o_r, o_g, m_r)
        b_to = load_rows(to, i_t, i_h, H, KG, o_r, o_g, m_r)
    if GATE_GRADIENT:
        # No gate follows the last row: it keeps everything, and would cover what strong gates leave of others.
        b_part = tl.where((o_r < n - 1)[:, None], b_k * b_dk, 0.0)
        b_whole = tl.load(to + ((i_t + n - 1) * H + i_h) * KG + o_g, mask=o_g < KG, other=0.0)
        b_dg = tl.cumsum(b_part, 0) - b_part + (b_straddle * b_whole)[None, :]
    if BG > 1:
        b_own = load_rows(dk_own, i_t, i_h, H, K, o_r, o_k, m_r)
        b_dk += b_own
        b_pairs = -(b_k * b_own)
    else:
        b_pairs = tl.zeros([C, BK], tl.float32)
    b_both = tl.zeros([C, C], tl.float32)
    for i_g in range(G):
        i_q = i_h * G + i_g
        b_q = load_rows(q, i_t, i_q, HQ, K, o_r, o_k, m_r)
        b_dq = tl.zeros([C, BK], tl.float32)
        for i_v in range(n_v):
            o_v = i_v * BV + tl.arange(0, BV)
            p_h = h + (i_c * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
            b_h = tl.load(p_h, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
            b_do = load_rows(do, i_t, i_q, HQ, V, o_r, o_v, m_r)
            b_dq += dot(b_do, tl.trans(b_h), PRECISION)
        b_dq *= head_scale(scale, i_g, G, STRICT)
        if GATED:
            b_dq *= b_to
        if BG > 1:
            b_own_q = load_rows(dq_own, i_t, i_q, HQ, K, o_r, o_k, m_r)
            p_a = da + ((i_t + o_r) * HQ + i_q) * C + o_r
            b_same = tl.load(p_a, mask=m_r, other=0.0)
            b_own_k = tl.zeros([C, BK], tl.float32)
        else:
            b_a = load_pairs(da, i_t, i_q, HQ, o_r, n, C)
            b_same = tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_a, 0.0), 1)
            b_a = tl.where(o_r[:, None] > o_r[None, :], b_a, 0.0)
            b_back = load_pairs_turned(da, i_t, i_q, HQ, o_r, n, C)
            b_own_q = dot(b_a, b_k, PRECISION)
            if PAIRED:
                b_both += b_a * dot(b_q, tl.trans(b_k), PRECISION)
                b_pairs += b_q * b_dq
            b_own_k = dot(tl.where(o_r[:, None] < o_r[None, :], b_back, 0.0), b_q, PRECISION)
        b_dq += b_own_q
        if STRICT:
            b_same = tl.where(i_g < G - 1, b_same, 0.0)
            b_dk += tl.where(i_g < G - 1, 0.0, b_dq)
        b_dk += b_own_k + b_same[:, None] * b_q
        if not PAIRED:
            b_pairs += b_q * b_dq - b_k * b_own_k
        store_rows(dq, b_dq + b_same[:, None] * b_k, i_t, i_q, HQ, K, o_r, o_k, m_r)
    store_rows(dk, b_dk, i_t, i_h, H, K, o_r, o_k, m_r)
    if GATE_GRADIENT:
        b_dg += tl.cumsum(b_pairs, 0, reverse=True)
        if BG > 1:
            store_rows(dg, b_dg, i_t, i_h, H, K, o_r, o_k, m_r)
        else:
            b_row = tl.sum(b_dg, 1)
            if PAIRED:
                b_before = tl.cumsum(b_both, 1) - b_both
                b_row += tl.sum(tl.where(o_r[:, None] >= o_r[None, :], b_before, 0.0), 0)
            tl.store(dg + (i_k.to(tl.int64) * S + i_t + o_r) * H + i_h, b_row, mask=m_r)
