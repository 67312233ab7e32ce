"""The delta rule under its names: a token erases what its key holds, then writes; the gate's rank selects what runs.

Shapes: B batch, T time, HQ query heads, HK key heads, H value heads (a multiple of HK), K key width, V value width,
N sequences.
"""

import math

import torch
import torch.nn.functional as F

from liger_ops import _checks, _devices, errors
from liger_ops._inputs import RecurrenceInputs
from liger_ops._keywords import keywords
from liger_ops._sequences import run_in_order


def _gate(g, A_log, dt_bias, lower_bound, k):
    """The log decay of a raw gate g: -exp(A_log) softplus(g + dt_bias), or lower_bound sigmoid(exp(A_log) ...)."""
    H = k.shape[2]
    if A_log is None and lower_bound is None:
        errors.fail("A_log", f"a tensor [{H}] with use_gate_in_kernel", None)
    for name, x, size in (("A_log", A_log, H), ("dt_bias", dt_bias, math.prod(g.shape[2:]))):
        if x is not None and (not isinstance(x, torch.Tensor) or x.numel() != size):
            errors.fail(name, f"a tensor of {size} numbers", getattr(x, "shape", type(x).__name__))
    g = g if g.dtype == torch.float64 else g.float()
    g = g if dt_bias is None else g + dt_bias.view(g.shape[2:])
    rate = 1.0 if A_log is None else A_log.to(g.dtype).exp().view(-1, *[1] * (g.ndim - 3))
    if lower_bound is None:
        return -rate * F.softplus(g)
    if not isinstance(lower_bound, (int, float)) or not -torch.inf < lower_bound < 0:
        errors.fail("lower_bound", "a number < 0", errors.shown(lower_bound))
    return lower_bound * torch.sigmoid(rate * g)


def _strength(beta, sigmoid, doubled, v):
    if doubled and not sigmoid:
        errors.fail("allow_neg_eigval", "False without use_beta_sigmoid_in_kernel", True)
    if beta is None:
        return v.new_ones(v.shape[:3])
    errors.check_tensor("beta", beta)
    if not sigmoid:
        return beta
    if not beta.is_floating_point():
        errors.fail("beta", "a floating tensor", beta.dtype)
    return (beta if beta.dtype == torch.float64 else beta.float()).sigmoid() * (2.0 if doubled else 1.0)


def run_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    rank: int | None,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor | None,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
    cu_seqlens_cpu: torch.Tensor | None,
    reverse: bool,
    chunk_size: int | None,
    max_seqlen: int | None,
    gate_name: str = "g",
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check, give every head of the state its key and query, and run every sequence."""
    _checks.check_qkv(q, k, v, more_values=True)
    scale = _checks.as_scale(scale, q.shape[-1])
    H, halves = v.shape[2], q.dtype in (torch.float16, torch.bfloat16)
    if halves and min(q.shape[2], k.shape[2]) < H and not _devices.on_triton(q):
        # Gradients of a shared head are summed first, then rounded.
        q, k = q.float(), k.float()
    k = k if k.shape[2] == H else k.repeat_interleave(H // k.shape[2], 2)
    q = q if q.shape[2] >= H else q.repeat_interleave(H // q.shape[2], 2)
    ranks = () if rank is None else (rank,)
    if use_gate_in_kernel:
        errors.check_tensor("g", g)
        _checks.check_decay(g, k, ranks, gate_name, raw=True)
        g = _gate(g, A_log, dt_bias, lower_bound, k)
    else:
        for name, given in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if given is not None:
                errors.fail(name, "None without use_gate_in_kernel", errors.shown(given))
    strength = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval, v)
    _checks.check_decay(g, k, ranks, gate_name)
    _checks.check_strength(strength, v)
    errors.check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1], cu_seqlens_cpu, max_seqlen)
    state = _checks.keys_first(initial_state, state_v_first)
    _checks.check_chunk_size(chunk_size)
    x = RecurrenceInputs(
        q, k, v, g, None, strength, state, cu_seqlens, scale=scale, chunk=chunk_size, unit=use_qk_l2norm_in_kernel
    )
    _checks.check_state(state, x.sequences, k, v.shape[-1])
    if x.unit and not _devices.on_triton(q):
        # Rounded to halves only as a whole, as are the gradients.
        kind = torch.promote_types(q.dtype, torch.float32)
        x = x._replace(q=q.to(kind), k=k.to(kind))
    o, state = run_in_order(x, reverse)
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2).contiguous() if state_v_first else state


@keywords()
def chunk_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """DeltaNet (arXiv 2406.06484, eq. 3): a token takes out what its key reads and puts its value there.

    h_t = (I - beta_t k_t k_t^T) h_{t-1} + beta_t k_t v_t^T. Everything else, errors included, as in
    `chunk_gated_delta_rule`, whose state_v_first, chunk_size and max_seqlen go by name.
    """
    return run_delta_rule(
        q,
        k,
        v,
        rank=None,
        g=None,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        reverse=reverse,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


@keywords()
def fused_recurrent_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens_cpu: torch.Tensor | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_delta_rule` for few tokens; beta is 1 unless given, reverse runs time backwards."""
    return run_delta_rule(
        q,
        k,
        v,
        rank=None,
        g=None,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        reverse=reverse,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


@keywords()
def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule (arXiv 2412.06464, eq. 10): the state decays per head, then the key's place is rewritten.

    h_t = (I - beta_t k_t k_t^T) exp(g_t) h_{t-1} + beta_t k_t v_t^T, o_t = scale q_t h_t. Bounded where
    beta_t |k_t|^2 <= 2, as for keys of length 1.

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H, or H a multiple of HQ.
        k: [B,T,HK,K] keys; v: [B,T,H,V] values, H a multiple of HK; in the dtype of q.
        g: [B,T,H] log decay per step, <= 0; -inf forgets everything.
        beta: [B,T,H] write strength, 0 to 2, None for 1: at 1 the old value goes, at 2 it changes sign.
        scale: factor on q, a number; None means K ** -0.5.
        initial_state: [N,H,K,V], or None for zeros.
        output_final_state: also return the state after the last token.
        use_qk_l2norm_in_kernel: give q and k length 1 first, x / sqrt(|x|^2 + 1e-6).
        use_beta_sigmoid_in_kernel: beta is raw, its sigmoid counts; twice that with allow_neg_eigval.
        state_v_first: states are [N,H,V,K].
        cu_seqlens: [N+1] bounds of sequences packed along time, batch 1; cu_seqlens_cpu: the same on the host, which
            spares a synchronisation.
        use_gate_in_kernel (by name, as all that follow): g is raw, -exp(A_log) softplus(g + dt_bias) counts;
            A_log [H], dt_bias as many numbers as a token of g has.
        reverse: run time backwards.
        chunk_size: about how many tokens one matrix product handles; changes speed only.
        max_seqlen: length of the longest sequence; with it a GPU's cu_seqlens are neither checked nor waited for.

    Returns:
        o [B,T,max(HQ,H),V] in the dtype of v, and the final state in float32 (float64 for float64) or None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    return run_delta_rule(
        q,
        k,
        v,
        rank=3,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        reverse=reverse,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )


@keywords()
def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: torch.Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens_cpu: torch.Tensor | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_gated_delta_rule` for few tokens; beta is 1 unless given.

    gk [B,T,H,K] decays key channels instead of g, or beside it. Values have no decay here: gv is None.
    """
    if gv is not None:
        errors.fail("gv", "None (the delta rule decays keys, not values)", type(gv).__name__)
    if g is not None and gk is not None:
        errors.check_tensor("g", g)
        errors.check_tensor("gk", gk)
        if gk.ndim != 4 or gk.shape[:3] != g.shape or (gk.device, gk.layout) != (g.device, g.layout):
            wanted = f"[{', '.join(map(str, g.shape))}, K] on {g.device} beside g"
            errors.fail("gk", wanted, f"{tuple(gk.shape)} on {gk.device}")
        gk = gk + g.unsqueeze(-1)
    return run_delta_rule(
        q,
        k,
        v,
        rank=3 if gk is None else 4,
        g=g if gk is None else gk,
        gate_name="g" if gk is None else "gk",
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        reverse=reverse,
        chunk_size=chunk_size,
        max_seqlen=max_seqlen,
    )
