"""The delta rule in a chunk: what tokens take back of each other's values, and states that follow from it.

Shapes: as in `tiles`; N sequences, NB blocks of 16 rows in a chunk.

With L[t,s] = k_t exp(g_{s+1} + ... + g_t) k_s, s < t, the errors e = v - (what the keys read) of a chunk's rows solve
(I + L diag(beta)) e = v - exp(g) k h, and beta e are the values of an additive recurrence. m is the inverse.
"""

import triton
import triton.language as tl

from liger_ops._triton.tiles import (
    between,
    dot,
    load_chunk,
    load_decays,
    load_pairs,
    load_pairs_turned,
    load_rows,
    offsets,
    store_rows,
)


@triton.jit
def load_weights(beta, i_t, i_h, H, o_r, m_r):
    return tl.load(beta + (i_t + o_r) * H + i_h, mask=m_r, other=0.0).to(tl.float32)


@triton.jit
def inverse(b_a, o_r, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + b_a)^-1 for a strictly lower b_a [C,C], C 16 or 32: blocks of 16 rows by substitution, joined by products.

    A power series of all of b_a would sum binomials of up to 2^C where keys are alike.
    """
    NB: tl.constexpr = C // 16
    o_i = tl.arange(0, 16)
    m_same = (o_r // 16)[:, None] == (o_r // 16)[None, :]
    b_d = tl.sum(tl.reshape(tl.where(m_same, -b_a, 0.0), [C, NB, 16]), 1)
    b_d = tl.reshape(b_d, [NB, 16, 16])
    for i in tl.range(2, 16):
        m_i = (o_i == i)[None, :, None]
        b_row = tl.sum(tl.where(m_i, b_d, 0.0), 1)
        b_row += tl.sum(b_row[:, :, None] * b_d, 1)
        b_d = tl.where(m_i, b_row[:, None, :], b_d)
    b_d = tl.reshape(tl.broadcast_to(tl.reshape(b_d, [C, 1, 16]), [C, NB, 16]), [C, C])
    b_d = tl.where(m_same, b_d, 0.0) + tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)
    if NB > 1:
        b_n = -dot(b_d, tl.where(m_same, 0.0, b_a), PRECISION)
        b_d += dot(b_n, b_d, PRECISION)
    return b_d


@triton.jit
def inverse_kernel(
    k,
    beta,
    g,
    a,
    m,
    chunks,
    H,
    K,
    C: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """k [S,H,K], beta [S,H], g [S,H] -> m [S,H,C], of which row t holds columns s <= t; per channel L comes in a.

    In the dtype of m. Where it is float64, so are the products of keys: at beta = 2 nothing fades, and among parallel
    keys each rounds alike, step after step.
    """
    i_h, i_c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r = tl.arange(0, C)
    m_r = o_r < n
    kind = m.dtype.element_ty

    if BG > 1:
        b_a = load_pairs(a, i_t, i_h, H, o_r, n, C).to(kind)
    else:
        b_a = tl.zeros([C, C], kind)
        for i_k in range(tl.cdiv(K, BK)):
            b_k = load_rows(k, i_t, i_h, H, K, o_r, i_k * BK + tl.arange(0, BK), m_r)
            if kind == tl.float64:
                b_k = b_k.to(kind)
            b_a += dot(b_k, tl.trans(b_k), PRECISION)
        if GATED:
            b_a *= between(load_decays(g, i_t, i_h, H, 1, o_r, tl.arange(0, 1), m_r).to(kind), o_r)
    b_a *= load_weights(beta, i_t, i_h, H, o_r, m_r)[None, :]
    b_a = tl.where(o_r[:, None] > o_r[None, :], b_a, 0.0)
    m_m = m_r[:, None] & (o_r[:, None] >= o_r[None, :])
    tl.store(m + offsets(i_t, i_h, H, C, o_r, o_r), inverse(b_a, o_r, C, PRECISION), mask=m_m)


@triton.jit
def mixed_kernel(
    m,
    x,
    beta,
    to,
    behind,
    y,
    chunks,
    sign,
    H,
    K,
    KG,
    C: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DECAYED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = sign m x for x [S,H,K], its rows decayed from the chunk's start if DECAYED. TRANSPOSED: y = sign m^T beta x,
    decayed to the chunk's end.
    """
    i_h, i_k, i_c = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r, o_k = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    o_g = o_k if BG > 1 else tl.arange(0, 1)
    m_r = o_r < n

    b_x = load_rows(x, i_t, i_h, H, K, o_r, o_k, m_r)
    if TRANSPOSED:
        b_m = load_pairs_turned(m, i_t, i_h, H, o_r, n, C)
        b_x = b_x * load_weights(beta, i_t, i_h, H, o_r, m_r)[:, None]
        if DECAYED:
            b_x *= load_rows(behind, i_t, i_h, H, KG, o_r, o_g, m_r)
    else:
        b_m = load_pairs(m, i_t, i_h, H, o_r, n, C)
        if DECAYED:
            b_x = b_x * load_rows(to, i_t, i_h, H, KG, o_r, o_g, m_r)
    store_rows(y, dot(b_m, b_x, PRECISION) * sign, i_t, i_h, H, K, o_r, o_k, m_r)


@triton.jit
def take(b_h, i_k):
    """Block i_k of a state in blocks [NB,BK,BV]."""
    if b_h.shape[0] == 1:
        b_part = tl.reshape(b_h, [b_h.shape[1], b_h.shape[2]])
    else:
        o_n = tl.arange(0, b_h.shape[0])
        b_part = tl.sum(tl.where((o_n == i_k)[:, None, None], b_h, 0.0), 0)
    return b_part


@triton.jit
def put(b_h, i_k, b_part):
    if b_h.shape[0] == 1:
        b_h = b_part[None, :, :]
    else:
        o_n = tl.arange(0, b_h.shape[0])
        b_h = tl.where((o_n == i_k)[:, None, None], b_part[None, :, :], b_h)
    return b_h


@triton.jit
def corrected_states_kernel(
    k,
    x,
    y,
    beta,
    to,
    behind,
    q,
    do,
    first,
    h,
    e,
    u,
    last,
    sequences,
    scale,
    H,
    G,
    K,
    V,
    KG,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    GATED: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """e = x - y h [S,H,V] and the states h [chunks,H,K,V] that chunks start from: x [S,H,V], y and k [S,H,K].

    Forwards a chunk adds k^T u to its decayed state, where u = beta e; e is stored only to KEEP it. REVERSE: k^T e and,
    of every query head, scale q^T do; rows decay on their way to the chunk's start. A program holds all WIDTH >= K
    channels of the key, which every error wants, and works on BK of them at a time: operands of more would not fit
    beside it.
    """
    i_v, i_nh = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    i_begin, i_end = tl.load(sequences + i_n * 3), tl.load(sequences + i_n * 3 + 1)
    i_first = tl.load(sequences + i_n * 3 + 2)
    NB: tl.constexpr = WIDTH // BK
    o_r, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    o_all = tl.arange(0, NB)[:, None, None] * BK + tl.arange(0, BK)[None, :, None]
    o_h = o_all * V + o_v[None, None, :]
    m_h = (o_all < K) & (o_v < V)[None, None, :]

    b_h = tl.load(first + i_nh * K * V + o_h, mask=m_h, other=0.0)
    n_c = tl.cdiv(i_end - i_begin, C)
    for i in range(n_c):
        i_c = n_c - 1 - i if REVERSE else i
        i_t = i_begin + i_c * C
        n = tl.minimum(i_end - i_t, C)
        m_r = o_r < n
        tl.store(h + ((i_first + i_c) * H + i_h) * K * V + o_h, b_h.to(h.dtype.element_ty), mask=m_h)
        b_e = load_rows(x, i_t, i_h, H, V, o_r, o_v, m_r)
        for i_k in range(NB):
            o_k = i_k * BK + tl.arange(0, BK)
            b_e -= dot(load_rows(y, i_t, i_h, H, K, o_r, o_k, m_r), take(b_h, i_k), PRECISION)
        if KEEP:
            store_rows(e, b_e, i_t, i_h, H, V, o_r, o_v, m_r)
        if not REVERSE:
            b_e *= load_weights(beta, i_t, i_h, H, o_r, m_r)[:, None]
            store_rows(u, b_e, i_t, i_h, H, V, o_r, o_v, m_r)
        for i_k in range(NB):
            o_k = i_k * BK + tl.arange(0, BK)
            b_k = load_rows(k, i_t, i_h, H, K, o_r, o_k, m_r)
            b_part = take(b_h, i_k)
            if GATED:
                o_g = o_k if BG > 1 else tl.arange(0, 1)
                p_last = to + ((i_t + n - 1) * H + i_h) * KG + o_g
                b_part *= tl.load(p_last, mask=o_g < KG, other=0.0)[:, None]
                b_w = load_rows(to if REVERSE else behind, i_t, i_h, H, KG, o_r, o_g, m_r)
                b_k = b_k * b_w
            b_part += dot(tl.trans(b_k), b_e, PRECISION)
            if REVERSE:
                for i_g in range(G):
                    b_q = load_rows(q, i_t, i_h * G + i_g, H * G, K, o_r, o_k, m_r)
                    if GATED:
                        b_q = b_q * b_w
                    b_do = load_rows(do, i_t, i_h * G + i_g, H * G, V, o_r, o_v, m_r)
                    b_part += dot(tl.trans(b_q), b_do, PRECISION) * scale
            b_h = put(b_h, i_k, b_part)
    tl.store(last + i_nh * K * V + o_h, b_h, mask=m_h)
