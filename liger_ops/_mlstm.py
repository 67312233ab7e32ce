"""mLSTM: the gated recurrence in units that follow its largest exponential input gate so far.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width, N sequences.
"""

from functools import partial

import torch
import torch.nn.functional as F

from liger_ops import _checks, errors
from liger_ops._backend import recurrence
from liger_ops._inputs import RecurrenceInputs, work_dtype
from liger_ops._keywords import keywords
from liger_ops._sequences import after_one, in_order
from liger_ops._torch.layout import full_precision
from liger_ops.limits import SMALLEST_UNIT

MLSTMState = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("liger_ops::units", mutates_args=())
def _units(
    i: torch.Tensor, f: torch.Tensor, unit: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the unit before and after each token, m_t = max(m_{t-1} + f_t, i_t, SMALLEST_UNIT), both [B,T,H].

    i, f [B,T,H] and unit [N,H], the one that each sequence starts from, are float64: what rounds away here would
    be missing from a product of many decays. Tokens combine in log2(T) rounds.
    """
    first = after_one(torch.full_like(f, -torch.inf), unit, cu_seqlens)
    top = torch.maximum(i.clamp(min=SMALLEST_UNIT), first + f)
    # Nothing older than a sequence reaches over its first token.
    drop = f.masked_fill(first > -torch.inf, -torch.inf)
    reach = 1
    while reach < f.shape[1]:
        earlier, before = (F.pad(x[:, :-reach], (0, 0, reach, 0), value=-torch.inf) for x in (top, drop))
        top, drop = torch.maximum(top, earlier + drop), drop + before
        reach *= 2
    return after_one(top, unit, cu_seqlens).contiguous(), top


@_units.register_fake
def _(i, f, unit, cu_seqlens):
    return tuple(torch.empty_like(f, memory_format=torch.contiguous_format) for _ in range(2))


def stable_denominator(total: torch.Tensor, unit: torch.Tensor, heads: int) -> torch.Tensor:
    """max(|total|, exp(-unit)) for total [...,HQ,1] and unit [...,H]; never so small that gradients overflow."""
    floor = (-unit).exp().clamp(min=2.0**SMALLEST_UNIT).to(total.dtype)
    return torch.maximum(total.abs(), floor.repeat_interleave(heads // unit.shape[-1], -1).unsqueeze(-1))


@full_precision
def _core(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    *,
    state: tuple[torch.Tensor, torch.Tensor],
    cu_seqlens: torch.Tensor | None,
    scale: float,
    chunk: int | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Arguments as in `mlstm`, of one dtype, state ([N,H,K,V+1], [N,H] in float64) -> o, state."""
    held, unit = state
    if not f.numel():
        return v.new_zeros(*q.shape[:3], v.shape[-1]), (held.clone(), unit.clone())
    with torch.no_grad():
        smallest = unit.clamp(min=SMALLEST_UNIT)
        before, after = _units(i.double(), f.double(), smallest, cu_seqlens)
    held = held * (unit - smallest).exp().to(held.dtype)[..., None, None]
    entering = (i - after).exp().to(k.dtype)
    kept = (f + (before - after)).to(f.dtype)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    x = RecurrenceInputs(q, k * entering.unsqueeze(-1), v, kept, state=held, cu_seqlens=cu_seqlens)
    o, held = recurrence(x._replace(scale=scale, chunk=chunk))
    o = o[..., :-1] / stable_denominator(o[..., -1:], after, q.shape[2])
    if cu_seqlens is None:
        return o, (held, after[:, -1])
    empty = (cu_seqlens[1:] == cu_seqlens[:-1]).unsqueeze(-1)
    return o, (held, torch.where(empty, smallest, after[0, (cu_seqlens[1:] - 1).clamp(min=0)]))


@keywords()
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
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, MLSTMState | None]:
    """mLSTM (xLSTM, arXiv 2405.04517, eq. 19-27).

    C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T, n_t = exp(f_t) n_{t-1} + exp(i_t) k_t,
    o_t = scale q_t C_t / max(|scale q_t n_t|, 1), whatever the size of exp(i).

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H.
        k, v: [B,T,H,K] keys and [B,T,H,V] values, in the dtype of q.
        i: [B,T,H] logarithm of the input gate, any real number.
        f: [B,T,H] logarithm of the forget gate, <= 0 (a sigmoid's).
        scale, output_final_state, cu_seqlens, chunk_size, max_seqlen: as in `chunk_gla`.
        initial_state: (C [N,H,K,V], n [N,H,K], m [N,H]), standing for exp(m) C and exp(m) n; m takes no gradient.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the final (C, n, m) in float32 (float64 for float64) or None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    _checks.check_qkv(q, k, v)
    errors.check_tensor("f", f)
    _checks.check_decay(f, k, (3,), "f")
    _checks.check_input_gate(i, k)
    errors.check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], None, max_seqlen)
    _checks.check_chunk_size(chunk_size)
    scale = _checks.as_scale(scale, q.shape[-1])
    work = work_dtype(q)
    N, (H, K), V = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k.shape[2:], v.shape[-1]
    if initial_state is None:
        state = k.new_zeros(N, H, K, V + 1, dtype=work), k.new_zeros(N, H, dtype=torch.float64)
    else:
        C, n, m = _checks.check_parts(initial_state, dict(C=(N, H, K, V), n=(N, H, K), m=(N, H)), k)
        state = torch.cat([C, n.unsqueeze(-1)], -1).to(work), m.detach().double()

    tensors = {n: x.to(work) for n, x in dict(q=q, k=k, v=v, i=i, f=f).items()}
    o, (held, unit) = in_order(partial(_core, scale=scale, chunk=chunk_size), tensors, state, cu_seqlens)
    if not output_final_state:
        return o.to(q.dtype), None
    m = unit.to(work)
    # What m loses to its dtype goes to what it is the unit of.
    held = held * (unit - m).exp().to(work)[..., None, None]
    return o.to(q.dtype), (held[..., :-1].contiguous(), held[..., -1].contiguous(), m)
