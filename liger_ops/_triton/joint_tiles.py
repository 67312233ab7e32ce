"""What the kernels of the joint softmax do alike: keys near a query, features, one step of a softmax.

Shapes: B sequences of T queries and S keys, the queries the last T; HQ = G * H query heads, H key/value heads, D width,
M features, V value width, W window, C rows of a chunk, R rows: those of a chunk, once for each of several heads.

A chunk counts its keys from the first that leaves the window while it lasts: row t has t + 1 .. t + W near and, of the
chunk's own C, 0 .. t far. Logarithms are to base 2.
"""

import triton
import triton.language as tl

from liger_ops import limits
from liger_ops._triton.tiles import dot

LOG2 = tl.constexpr(1.4426950408889634)
# What the logarithm of a feature saturates at.
MOST = tl.constexpr(limits.MAX_LOG_FEATURE * 1.4426950408889634)
# Half of what float32 holds: added to a score it hides it, and a row that sees nothing has no NaN.
MASKED = tl.constexpr(-1.7e38)


@triton.jit
def program(blocks, heads):
    """Block of a width, head and chunk: those that read the same rows run one after the other, and find them cached."""
    i = tl.program_id(0)
    return i % blocks, (i // blocks % heads).to(tl.int64), (i // (blocks * heads)).to(tl.int64)


@triton.jit
def place(T, i_c, C: tl.constexpr):
    """Sequence, first query within it and number of queries of chunk i_c of equally long sequences."""
    i_b, i_t = i_c // tl.cdiv(T, C), i_c % tl.cdiv(T, C) * C
    return i_b, i_t, tl.minimum(T - i_t, C)


@triton.jit
def load_rest(rest, i_b, i_s, S, o_r):
    """Whether keys i_s + o_r of sequence i_b exist and are neither hidden nor sinks: rest [B,S]."""
    o_s = i_s + o_r
    m_s = (o_s >= 0) & (o_s < S)
    return tl.load(rest + i_b * S + o_s, mask=m_s, other=0) != 0


@triton.jit
def is_near(o_t, o_s, W):
    """[R,C]: keys o_s [C] of a chunk that its rows o_t [R] have in their window."""
    return (o_s[None, :] > o_t[:, None]) & (o_s[None, :] <= o_t[:, None] + W)


@triton.jit
def key_features(b_log, m_f):
    """exp of a tile of logarithms as far as features go, 0 outside of the mask."""
    return tl.where(m_f, tl.exp2(tl.minimum(b_log.to(tl.float32) * LOG2, MOST)), 0.0)


@triton.jit
def query_features(b_log, b_top):
    """The same in units of 2^top, a row's largest weight nearby."""
    return tl.exp2(tl.minimum(b_log.to(tl.float32) * LOG2 - b_top, MOST))


@triton.jit
def attend(b_s, b_v, b_o, b_l, b_top, PRECISION: tl.constexpr):
    """A block of scores b_s [R,C] and values [C,BV] joins sums of values [R,BV], of weights [R], the largest score."""
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_less = tl.exp2(b_top - b_new)
    b_w = tl.exp2(b_s - b_new[:, None])
    b_o = b_o * b_less[:, None] + dot(b_w.to(b_v.dtype), b_v, PRECISION)
    return b_o, b_l * b_less + tl.sum(b_w, 1), b_new
