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
def scan(b_g, REVERSE: tl.constexpr = False):
    """Running sums of the rows of b_g [C,BG]. One column goes as a vector: Triton 3.6 cannot scan it as a matrix."""
    if b_g.shape[1] == 1:
        b_sum = tl.cumsum(tl.reshape(b_g, [b_g.shape[0]]), 0, reverse=REVERSE)[:, None]
    else:
        b_sum = tl.cumsum(b_g, 0, reverse=REVERSE)
    return b_sum


@triton.jit
def to_row(b_g):
    """[C,BG] log decays -> factors from the chunk's start through each row."""
    return tl.exp(scan(b_g))


@triton.jit
def from_row(g, i_t, n, i_h, H, D, o_r, o_d):
    """Factors [C,BG] from behind each row through the last of n rows: the decays one row further on, summed."""
    b_g = load_decays(g, i_t + 1, i_h, H, D, o_r, o_d, o_r < n - 1)
    return tl.exp(scan(b_g, REVERSE=True))


@triton.jit
def between(b_g, o_r):
    """[C,1] log decays -> [C,C]: the factor from behind column s through row t, 0 for s > t."""
    m_later = o_r[:, None] > o_r[None, :]
    b_sum = tl.cumsum(tl.where(m_later, b_g, 0.0), 0)
    return tl.where(o_r[:, None] >= o_r[None, :], tl.exp(b_sum), 0.0)


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
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b summed in float32. Operands of different dtypes meet in float32, which tf32 holds halves in exactly.

    With float64 on either side all of it is in float64.
    """
    a, b = rounded(a, PRECISION), rounded(b, PRECISION)
    if a.dtype == tl.float64 or b.dtype == tl.float64:
        b_c = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    elif a.dtype != b.dtype:
        b_c = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    else:
        b_c = tl.dot(a, b, input_precision=PRECISION)
    return b_c
