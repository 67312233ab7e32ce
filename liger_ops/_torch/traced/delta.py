"""The delta rule in chunks: values that tokens correct for each other, after which the recurrence is additive.

Shapes: B batch, T time, HQ query heads, H key/value heads, G query heads per key/value head, K key width, V value
width, N chunks of C tokens.

With u_t = beta_t (v_t - k_t diag(exp(g_t)) h_{t-1}) the state is h_t = diag(exp(g_t)) h_{t-1} + k_t u_t^T: additive in
u. Within a chunk u_i needs u_j of earlier rows only, (I + A) u = beta (v - k h), A_ij = beta_i k_i decay_ij k_j, j < i
(arXiv 2406.06484, section 3.2, and 2412.06464, appendix A).
"""

import torch

from liger_ops._torch.decay import Decay, make_decay
from liger_ops._torch.traced.additive import decayed_products


def _corrected(
    k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B,H,N,C,K], v [B,H,N,C,V], beta [B,H,N,C] -> u for an empty state [B,H,N,C,V], and what a state takes away
    from it, [B,H,N,C,K].

    In float64: at beta = 2 nothing fades, and among parallel keys every product of two rounds alike, step after step.
    """
    dtype, weight = k.dtype, beta.double().unsqueeze(-1)
    k, decay = k.double(), make_decay(g if g is None else g.double())
    a = decayed_products(k.unsqueeze(4), k, decay).squeeze(4).tril(-1) * weight
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    inverse = torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True) * weight.transpose(-1, -2)
    return (inverse @ v.double()).to(dtype), (inverse @ (k if decay is None else k * decay.start)).to(dtype)


def _through(
    k: torch.Tensor, u: torch.Tensor, taken: torch.Tensor, decay: Decay | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunk by chunk: the corrected values [B,H,N,C,V], the states before chunks [B,H,N,K,V], and the last one."""
    k = (k if decay is None else k * decay.end).transpose(-1, -2)
    heads, state = state.shape[:2], state.flatten(0, 1)
    keep = [None] * k.shape[2] if decay is None else decay.total.flatten(0, 1).unsqueeze(-1).unbind(1)
    values, before = [], []
    for u_n, taken_n, k_n, keep_n in zip(*(x.flatten(0, 1).unbind(1) for x in (u, taken, k)), keep, strict=True):
        before.append(state)
        values.append(torch.baddbmm(u_n, taken_n, state, alpha=-1))
        state = torch.baddbmm(state if keep_n is None else keep_n * state, k_n, values[-1])
    values, before = (torch.stack(x, 1).unflatten(0, heads) for x in (values, before))
    return values, before, state.unflatten(0, heads)


def enter(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    decay: Decay | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `additive.enter`, behind the corrected values: k [B,H,N,C,K], v [B,H,N,C,V], beta and g like them."""
    u, taken = _corrected(k, v, beta, g)
    return _through(k, u, taken, decay, state)
