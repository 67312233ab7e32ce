"""The recurrence token by token, for few of them: one launch reads and writes every state once.

Shapes: as in `tiles`; N sequences of T tokens each.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from liger_ops._inputs import RecurrenceInputs
from liger_ops._triton.launch import LAUNCHER, Launcher


@triton.jit
def recurrent_kernel(
    q,
    k,
    v,
    g,
    gv,
    beta,
    first,
    last,
    slots,
    o,
    scale,
    T,
    H,
    G,
    K,
    V,
    KG,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    GATED: tl.constexpr,
    VALUES_GATED: tl.constexpr,
    ERASES: tl.constexpr,
    BEFORE: tl.constexpr,
    POOLED: tl.constexpr,
):
    """q [N,T,HQ,K], k [N,T,H,K], v, gv [N,T,H,V], g [N,T,H,KG], states first and last [.,H,K,V] -> o [N,T,HQ,V].

    ERASES: instead of v, beta [N,T,H] times what the decayed state lacks of it is added (the delta rule). BEFORE: a
    token reads the state before it. POOLED: the state of sequence n is row slots[n] of first and last, which
    may be one tensor; below 0, n has none.
    """
    i_v, i_nh = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    o_g = o_k if BG == BK else tl.arange(0, 1)
    m_k, m_v = o_k < K, o_v < V
    i_s = tl.load(slots + i_n).to(tl.int64) if POOLED else i_n
    o_h = (i_s * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    m_h = m_k[:, None] & m_v[None, :] & (o_k[:, None] * 0 + i_s >= 0)

    b_h = tl.load(first + o_h, mask=m_h, other=0.0)
    i_row = i_n * T * H + i_h
    p_k, p_g = k + i_row * K + o_k, g + i_row * KG + o_g
    p_v, p_gv = v + i_row * V + o_v, gv + i_row * V + o_v
    p_q, p_o, p_beta = q + i_row * G * K + o_k, o + i_row * G * V + o_v, beta + i_row
    for _ in range(T):
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        b_old = b_h
        if GATED:
            b_h *= tl.exp(tl.load(p_g, mask=o_g < KG, other=0.0))[:, None]
        if VALUES_GATED:
            b_h *= tl.exp(tl.load(p_gv, mask=m_v, other=0.0))[None, :]
        if ERASES:
            b_v = tl.load(p_beta).to(tl.float32) * (b_v - tl.sum(b_h * b_k[:, None], 0))
        b_h += b_k[:, None] * b_v[None, :]
        b_read = b_old if BEFORE else b_h
        for i_g in range(G):
            b_q = tl.load(p_q + i_g * K, mask=m_k, other=0.0).to(tl.float32)
            b_o = tl.where(i_s >= 0, tl.sum(b_read * b_q[:, None], 0) * scale, 0.0)
            tl.store(p_o + i_g * V, b_o.to(o.dtype.element_ty), mask=m_v)
        p_k, p_v, p_g, p_gv = p_k + H * K, p_v + H * V, p_g + H * KG, p_gv + H * V
        p_q, p_o, p_beta = p_q + H * G * K, p_o + H * G * V, p_beta + H
    tl.store(last + o_h, b_h, mask=m_h)


def forward(
    x: RecurrenceInputs,
    last: torch.Tensor,
    slots: torch.Tensor | None = None,
    before: bool = False,
    launcher: Launcher = LAUNCHER,
) -> torch.Tensor:
    """o [N,T,HQ,V]; fills last, which may be x.state. slots [N] addresses both, None is one state per sequence.

    before: what a token reads is the state without it.
    """
    (N, T, H, K), V = x.k.shape, x.v.shape[-1]
    q, k, v = (y.contiguous() for y in (x.q, x.k, x.v))
    o = v.new_empty(N, T, q.shape[2], V)
    given = dict(q=q, k=k, v=v, first=x.state, last=last, o=o, scale=x.scale)
    # What no kernel reads may be anything.
    given |= {n: q if y is None else y.float().contiguous() for n, y in dict(g=x.g, gv=x.gv, beta=x.beta).items()}
    given |= dict(slots=q if slots is None else slots.contiguous())
    sizes = dict(T=T, H=H, G=q.shape[2] // H, K=K, V=V, KG=K if x.per_channel else 1)
    constants = dict(GATED=x.g is not None, PER_CHANNEL=x.per_channel and K > 1, VALUES_GATED=x.gv is not None)
    constants |= dict(BEFORE=before, POOLED=slots is not None, ERASES=x.beta is not None)
    launcher.launch(recurrent_kernel, lambda c: (N * H, cdiv(V, c.BV)), given | sizes | constants)
    return o
