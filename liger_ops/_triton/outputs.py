"""What a chunk reads: from the state that it starts from, and from its own rows. And the same for gradients of values.

Shapes: as in `tiles`.
"""

import triton
import triton.language as tl

from liger_ops._triton.tiles import dot, head_scale, load_chunk, load_pairs, load_pairs_turned, load_rows, store_rows


@triton.jit
def outputs_kernel(
    q,
    k,
    v,
    to,
    e,
    h,
    a,
    o,
    chunks,
    scale,
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
    PRECISION: tl.constexpr,
):
    """q [S,HQ,K], k [S,H,K], v [S,H,V], factors to [S,H,KG], h [chunks,H,K,V] -> o [S,HQ,V].

    Per channel (BG > 1) the scores of a chunk's own rows come ready in a [S,HQ,C], per head their decays in e [S,H,C].
    """
    i_q, i_v, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_h, HQ = i_q // G, H * G
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_r = o_r < n

    b_o = tl.zeros([C, BV], tl.float32)
    b_a = tl.zeros([C, C], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_q = load_rows(q, i_t, i_q, HQ, K, o_r, o_k, m_r)
        p_h = h + (i_c * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
        b_h = tl.load(p_h, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
        if BG > 1:
            b_o += dot(b_q * load_rows(to, i_t, i_h, H, KG, o_r, o_k, m_r), b_h, PRECISION)
        else:
            b_k = load_rows(k, i_t, i_h, H, K, o_r, o_k, m_r)
            b_o += dot(b_q, b_h, PRECISION)
            b_a += dot(b_q, tl.trans(b_k), PRECISION)
    if BG > 1:
        b_a = load_pairs(a, i_t, i_q, HQ, o_r, n, C)
    elif GATED:
        b_o *= load_rows(to, i_t, i_h, H, KG, o_r, tl.arange(0, 1), m_r)
        b_a *= load_pairs(e, i_t, i_h, H, o_r, n, C)
    else:
        b_a = tl.where(o_r[:, None] >= o_r[None, :], b_a, 0.0)
    b_o += dot(b_a, load_rows(v, i_t, i_h, H, V, o_r, o_v, m_r), PRECISION)
    store_rows(o, b_o * scale, i_t, i_q, HQ, V, o_r, o_v, m_r)


@triton.jit
def values_gradient_kernel(
    q,
    k,
    do,
    behind,
    e,
    dh,
    a,
    dv,
    chunks,
    scale,
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
    ALONE: tl.constexpr,
    STRICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient dv [S,H,V]: from the state's gradient dh [chunks,H,K,V] behind a chunk, and from its own rows.

    ALONE: only from its own rows. STRICT: the last head of a group asks for what came before it.
    """
    i_h, i_v, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
    HQ = H * G
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    m_r = o_r < n

    b_dv = tl.zeros([C, BV], tl.float32)
    n_k = tl.cdiv(K, BK)
    for i_k in range(0 if ALONE else n_k):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_rows(k, i_t, i_h, H, K, o_r, o_k, m_r)
        p_h = dh + (i_c * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
        b_dh = tl.load(p_h, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
        if GATED:
            o_g = o_k if BG > 1 else tl.arange(0, 1)
            b_dv += dot(b_k * load_rows(behind, i_t, i_h, H, KG, o_r, o_g, m_r), b_dh, PRECISION)
        else:
            b_dv += dot(b_k, b_dh, PRECISION)
    if GATED and BG == 1:
        b_e = load_pairs_turned(e, i_t, i_h, H, o_r, n, C)
    else:
        b_e = tl.where(o_r[:, None] <= o_r[None, :], 1.0, 0.0)
    for i_g in range(G):
        i_q = i_h * G + i_g
        if BG > 1:
            b_a = load_pairs_turned(a, i_t, i_q, HQ, o_r, n, C)
        else:
            b_a = tl.zeros([C, C], tl.float32)
            for i_k in range(n_k):
                o_k = i_k * BK + tl.arange(0, BK)
                b_q = load_rows(q, i_t, i_q, HQ, K, o_r, o_k, m_r)
                b_k = load_rows(k, i_t, i_h, H, K, o_r, o_k, m_r)
                b_a += dot(b_k, tl.trans(b_q), PRECISION)
            b_a *= b_e
        if STRICT:
            b_a = tl.where((o_r[:, None] < o_r[None, :]) | (i_g < G - 1), b_a, 0.0)
        b_do = load_rows(do, i_t, i_q, HQ, V, o_r, o_v, m_r)
        b_dv += dot(b_a, b_do, PRECISION) * head_scale(scale, i_g, G, STRICT)
    store_rows(dv, b_dv, i_t, i_h, H, V, o_r, o_v, m_r)
