"""The sums of log decays within chunks, once for every kernel that wants their factors.

Shapes: as in `tiles`.
"""

import triton
import triton.language as tl

from liger_ops import limits
from liger_ops._triton.tiles import between, load_chunk, load_decays, offsets, scan, store_rows

FACTORABLE = tl.constexpr(limits.FACTORABLE)


@triton.jit
def decays_kernel(
    g,
    to,
    behind,
    e,
    fine,
    chunks,
    H,
    KG,
    C: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
):
    """Log decays g [S,H,KG] -> factors of rows, to and behind [S,H,KG], and per head those of pairs, e [S,H,C].

    to: from the chunk's start through each row. behind: from behind each row through the chunk's last: the decays one
    row further on, summed. e: from behind column s through row t, for s <= t. Per channel fine [chunks,H,C//R] instead:
    whether no channel's decays sum below FACTORABLE in a block of R rows, without its first.
    """
    i_h, i_c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    i_t, n = load_chunk(chunks, i_c)
    if n == 0:
        return
    o_r, o_b = tl.arange(0, C), tl.arange(0, C // R)
    m_r = o_r < n
    b_lowest = tl.zeros([C // R], tl.float32)
    for i_g in range(tl.cdiv(KG, BG)):
        o_g = i_g * BG + tl.arange(0, BG)
        b_g = load_decays(g, i_t, i_h, H, KG, o_r, o_g, m_r)
        b_next = load_decays(g, i_t + 1, i_h, H, KG, o_r, o_g, o_r < n - 1)
        store_rows(to, tl.exp(scan(b_g)), i_t, i_h, H, KG, o_r, o_g, m_r)
        store_rows(behind, tl.exp(scan(b_next, REVERSE=True)), i_t, i_h, H, KG, o_r, o_g, m_r)
        if BG == 1:
            m_e = m_r[:, None] & (o_r[:, None] >= o_r[None, :])
            tl.store(e + offsets(i_t, i_h, H, C, o_r, o_r), between(b_g, o_r), mask=m_e)
        else:
            b_own = tl.reshape(tl.where((o_r % R > 0)[:, None], b_g, 0.0), [C // R, R, BG])
            b_lowest = tl.minimum(b_lowest, tl.min(tl.sum(b_own, 1), 1))
    if BG > 1:
        tl.store(fine + (i_c * H + i_h) * (C // R) + o_b, (b_lowest >= FACTORABLE).to(tl.int32))
