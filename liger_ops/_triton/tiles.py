"""What every kernel does alike: rows of a chunk, their decays, the products.

Shapes: S tokens of all sequences one after the other, H key/value heads, HQ = G * H query heads, K key width, V value
width, D either, C rows of a chunk, BK, BV, BD blocks of a width, BG = 1 for a decay per head, BK per channel.

Gates are only ever added: every exponent is a sum of log decays, hence <= 0, and -inf forgets exactly.
"""

import triton
import triton.language as tl


@triton.jit
def load_chunk(chunks, i_c):
    """First token and number of tokens of chunk i_c; a chunk of 0 tokens is none."""
    return tl.load(chunks + i_c * 2), tl.load(chunks + i_c * 2 + 1)


@triton.jit
def offsets(i_t, i_h, H, D, o_r, o_d):
    """Where rows i_t + o_r of head i_h lie in [S,H,D], in 64 bits."""
    return ((i_t + o_r.to(tl.int64)) * H + i_h)[:, None] * D + o_d[None, :]


@triton.jit
def load_rows(x, i_t, i_h, H, D, o_r, o_d, m_r):
    """Tile [C,BD] of x [S,H,D], zero outside of the rows m_r and of the width."""
    return tl.load(x + offsets(i_t, i_h, H, D, o_r, o_d), mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, b_x, i_t, i_h, H, D, o_r, o_d, m_r):
    b_x = b_x.to(x.dtype.element_ty)
    tl.store(x + offsets(i_t, i_h, H, D, o_r, o_d), b_x, mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit
def load_decays(g, i_t, i_h, H, D, o_r, o_d, m_r):
    return load_rows(g, i_t, i_h, H, D, o_r, o_d, m_r).to(tl.float32)


@triton.jit
def load_pairs(a, i_t, i_h, HQ, o_r, n, C: tl.constexpr):
    """Tile [C,C] of the chunk's pairs in a [S,HQ,C]: row t, column s <= t; the rest was never written."""
    m_a = (o_r[:, None] >= o_r[None, :]) & (o_r < n)[:, None]
    return tl.load(a + offsets(i_t, i_h, HQ, C, o_r, o_r), mask=m_a, other=0.0)


@triton.jit
def load_pairs_turned(a, i_t, i_h, HQ, o_r, n, C: tl.constexpr):
    """The transpose of `load_pairs`, as it comes from memory.

    Triton before 3.7.1 gets products wrong on Hopper where the left side was turned in registers.
    """
    m_a = (o_r[:, None] <= o_r[None, :]) & (o_r < n)[None, :]
    p_a = a + ((i_t + o_r.to(tl.int64)) * HQ + i_h)[None, :] * C + o_r[:, None]
    return tl.load(p_a, mask=m_a, other=0.0)


@triton.jit
def scan(b_g, REVERSE: tl.constexpr = False):
    """Running sums of the rows of b_g [C,BG]. One column goes as a vector: Triton 3.6 cannot scan it as a matrix."""
    if b_g.shape[1] == 1:
        b_sum = tl.cumsum(tl.reshape(b_g, [b_g.shape[0]]), 0, reverse=REVERSE)[:, None]
    else:
        b_sum = tl.cumsum(b_g, 0, reverse=REVERSE)
    return b_sum


@triton.jit
def between(b_g, o_r):
    """[C,1] log decays -> [C,C]: the factor from behind column s through row t, 1 for s > t."""
    m_later = o_r[:, None] > o_r[None, :]
    b_sum = tl.cumsum(tl.where(m_later, b_g, 0.0), 0)
    return tl.exp(b_sum)


@triton.jit
def head_scale(scale, i_g, G, STRICT: tl.constexpr):
    """The factor on query head i_g of a group of G; STRICT: on the last, the key that asks what came before it, 1."""
    return tl.where(i_g < G - 1, scale, 1.0) if STRICT else scale


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """float32 x as tf32 holds it, to nearest: matrix units cut off what they cannot hold. Halves are as they are."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot_parts(a, b, PRECISION: tl.constexpr):
    """a @ b where one is bfloat16 and the other float32, of which two parts in bfloat16 hold 16 bits, three all 24."""
    if a.dtype == tl.float32:
        b_high = a.to(tl.bfloat16)
        b_rest = a - b_high.to(tl.float32)
        b_low = b_rest.to(tl.bfloat16)
        b_c = tl.dot(b_low, b, tl.dot(b_high, b))
        if PRECISION == "tf32x3":
            b_c = tl.dot((b_rest - b_low.to(tl.float32)).to(tl.bfloat16), b, b_c)
    else:
        b_high = b.to(tl.bfloat16)
        b_rest = b - b_high.to(tl.float32)
        b_low = b_rest.to(tl.bfloat16)
        b_c = tl.dot(a, b_low, tl.dot(a, b_high))
        if PRECISION == "tf32x3":
            b_c = tl.dot(a, (b_rest - b_low.to(tl.float32)).to(tl.bfloat16), b_c)
    return b_c


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b summed in float32; in float64 where either is.

    bfloat16 and float32 meet in bfloat16, which matrix units are fastest at, float16 and float32 in float32.
    """
    if a.dtype == tl.float64 or b.dtype == tl.float64:
        b_c = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    elif a.dtype != b.dtype and (a.dtype == tl.bfloat16 or b.dtype == tl.bfloat16):
        b_c = dot_parts(a, b, PRECISION)
    elif a.dtype != b.dtype:
        b_c = tl.dot(
            rounded(a.to(tl.float32), PRECISION), rounded(b.to(tl.float32), PRECISION), input_precision=PRECISION
        )
    else:
        b_c = tl.dot(rounded(a, PRECISION), rounded(b, PRECISION), input_precision=PRECISION)
    return b_c
