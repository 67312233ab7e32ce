"""States at the bounds of chunks, forwards in time and, for the gradient, backwards.

Shapes: as in `tiles`; N sequences, in M pieces where they are few and long, R heads of k and v per head of the state.
"""

import triton
import triton.language as tl

from liger_ops._triton.tiles import dot, load_rows


@triton.jit
def states_kernel(
    k,
    v,
    to,
    behind,
    first,
    h,
    last,
    total,
    sequences,
    scale,
    H,
    R,
    K,
    V,
    KG,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    GATED: tl.constexpr,
    REVERSE: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """k [S,H*R,K], v [S,H*R,V], factors to and behind [S,H,KG], first and last [N,H,K,V] -> h [chunks,H,K,V], what a
    chunk starts from.

    PART: a sequence is a piece of one, starts from nothing, and instead of h gives what it keeps, total [N,H,KG].
    REVERSE starts at the last token, and a row decays on its way to what precedes it: by itself and all before it.
    """
    i_v, i_k, i_nh = tl.program_id(2), tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    i_begin, i_end = tl.load(sequences + i_n * 3), tl.load(sequences + i_n * 3 + 1)
    i_first = tl.load(sequences + i_n * 3 + 2)
    o_r, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_g = o_k if BG == BK else tl.arange(0, 1)
    o_h = o_k[:, None] * V + o_v[None, :]
    m_h = (o_k < K)[:, None] & (o_v < V)[None, :]

    if PART:
        b_h = tl.zeros((BK, BV), tl.float32)
        b_total = tl.full((BG,), 1.0, tl.float32)
    else:
        b_h = tl.load(first + i_nh * K * V + o_h, mask=m_h, other=0.0)
    n_c = tl.cdiv(i_end - i_begin, C)
    for i in range(n_c):
        i_c = n_c - 1 - i if REVERSE else i
        i_t = i_begin + i_c * C
        n = tl.minimum(i_end - i_t, C)
        m_r = o_r < n
        if not PART:
            tl.store(h + ((i_first + i_c) * H + i_h) * K * V + o_h, b_h.to(h.dtype.element_ty), mask=m_h)
        if GATED:
            b_decay = tl.load(to + ((i_t + n - 1) * H + i_h) * KG + o_g, mask=o_g < KG, other=0.0)
            b_h *= b_decay[:, None]
            if PART:
                b_total *= b_decay
            b_w = load_rows(to if REVERSE else behind, i_t, i_h, H, KG, o_r, o_g, m_r)
        for i_r in range(R):
            b_k = load_rows(k, i_t, i_h * R + i_r, H * R, K, o_r, o_k, m_r)
            b_v = load_rows(v, i_t, i_h * R + i_r, H * R, V, o_r, o_v, m_r)
            if GATED:
                b_h += dot(tl.trans(b_k * b_w * scale), b_v, PRECISION)
            else:
                b_h += dot(tl.trans(b_k), b_v, PRECISION) * scale
    tl.store(last + i_nh * K * V + o_h, b_h, mask=m_h)
    if PART and GATED:
        # Every block of values has the same, and per head every block of keys: the first one tells.
        i_other = i_v + i_k if BG == 1 else i_v
        tl.store(total + i_nh * KG + o_g, b_total, mask=o_g + i_other * KG < KG)


@triton.jit
def joins_kernel(
    part,
    total,
    first,
    start,
    last,
    pieces,
    H,
    K,
    V,
    KG,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    GATED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What pieces add, part [M,H,K,V], and keep, total [M,H,KG] -> the states they start from [M,H,K,V], and the last.

    pieces [N,2]: the first piece of each sequence, and how many; first and last [N,H,K,V].
    """
    i_v, i_k, i_nh = tl.program_id(2), tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    i_first, n_m = tl.load(pieces + i_n * 2), tl.load(pieces + i_n * 2 + 1)
    o_k, o_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_g = o_k if BG == BK else tl.arange(0, 1)
    o_h = o_k[:, None] * V + o_v[None, :]
    m_h = (o_k < K)[:, None] & (o_v < V)[None, :]

    b_h = tl.load(first + i_nh * K * V + o_h, mask=m_h, other=0.0)
    for i in range(n_m):
        i_mh = (i_first + (n_m - 1 - i if REVERSE else i)) * H + i_h
        tl.store(start + i_mh * K * V + o_h, b_h, mask=m_h)
        if GATED:
            b_h *= tl.load(total + i_mh * KG + o_g, mask=o_g < KG, other=0.0)[:, None]
        b_h += tl.load(part + i_mh * K * V + o_h, mask=m_h, other=0.0)
    tl.store(last + i_nh * K * V + o_h, b_h, mask=m_h)
