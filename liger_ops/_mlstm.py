"""mLSTM: a matrix memory with an exponential input gate, stabilised by the largest gate so far.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

import torch

from liger_ops import _checks
from liger_ops._packed import CHUNK
from liger_ops._sequences import over_sequences
from liger_ops._torch.mlstm import mlstm as _mlstm

MLSTMState = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    scale: float | None = None,
    initial_state: MLSTMState | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    chunk_size: int = CHUNK,
) -> tuple[torch.Tensor, MLSTMState | None]:
    """mLSTM (xLSTM, arXiv 2405.04517, eq. 19-27).

    C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T, n_t = exp(f_t) n_{t-1} + exp(i_t) k_t,
    o_t = scale q_t C_t / max(|scale q_t n_t|, 1), whatever the size of exp(i).

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H.
        k, v: [B,T,H,K] keys and [B,T,H,V] values, in the dtype of q.
        i: [B,T,H] logarithm of the input gate, any real number.
        f: [B,T,H] logarithm of the forget gate, <= 0 (a sigmoid's).
        scale, output_final_state, cu_seqlens, chunk_size: as in `chunk_gla`.
        initial_state: (C [N,H,K,V], n [N,H,K], m [N,H]), standing for exp(m) C and exp(m) n; m takes no gradient.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the final (C, n, m) in float32 (float64 for float64) or None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    _checks.check_qkv(q, k, v)
    _checks.check_decay(f, k, (3,), "f")
    if i.shape != k.shape[:3] or not i.is_floating_point():
        _checks.fail("i", f"a floating tensor {list(k.shape[:3])}", f"{i.dtype} {tuple(i.shape)}")
    bounds = _checks.check_cu_seqlens(cu_seqlens, *q.shape[:2])
    _checks.check_positive("chunk_size", chunk_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    N, (H, K), V = q.shape[0] if bounds is None else len(bounds) - 1, k.shape[2:], v.shape[-1]
    if initial_state is None:
        state = k.new_zeros(N, H, K + 1, V + 1, dtype=work)
    else:
        C, n, m = initial_state
        for name, x, shape in (("C", C, (N, H, K, V)), ("n", n, (N, H, K)), ("m", m, (N, H))):
            if tuple(x.shape) != shape:
                _checks.fail(f"initial_state, {name}", f"shape {list(shape)}", tuple(x.shape))
        sums = torch.cat([C, n.unsqueeze(-1)], -1).to(work)
        state = torch.cat([sums, m.detach().to(work)[..., None, None].expand(-1, -1, 1, V + 1)], 2)

    def core(q, k, v, i, f, state):
        state = q.new_zeros(0, H, K + 1, V + 1) if state is None else state
        return _mlstm(q, k, v, i, f, scale, state, chunk_size)

    o, state = over_sequences(core, [x.to(work) for x in (q, k, v, i, f)], state, bounds)
    if output_final_state:
        state = state[:, :, :-1, :-1].contiguous(), state[:, :, :-1, -1].contiguous(), state[:, :, -1, 0].contiguous()
    return o.to(q.dtype), state if output_final_state else None
