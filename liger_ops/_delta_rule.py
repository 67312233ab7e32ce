"""The delta rule under its names: a token erases what its key holds, then writes; the gate's rank selects what runs.

Shapes: B batch, T time, HQ query heads, HK key heads, H value heads (a multiple of HK), K key width, V value width,
N sequences.
"""

import math

import torch
import torch.nn.functional as F

from liger_ops import _checks, _packed, errors
from liger_ops._keywords import keywords
from liger_ops._sequences import in_order

# What goes to `_run` by name.
_SHARED = "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens_cpu reverse chunk_size max_seqlen"
_GATED = "use_gate_in_kernel A_log dt_bias lower_bound " + _SHARED


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
        errors.fail("lower_bound", "a number < 0", lower_bound)
    return lower_bound * torch.sigmoid(rate * g)


def _with_unit_keys(q, k, v, beta, g, state, scale, chunk_size, cu_seqlens):
    """The recurrence for q and k of length 1; o in the dtype of v."""
    if q.dtype in (torch.float16, torch.bfloat16) and _packed.on_triton(q):
        return _packed.recurrence(q, k, v, g, scale, state, chunk_size, None, cu_seqlens, beta, True)
    # Rounded to halves only as a whole, as are the gradients.
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    q, k = q / _packed.length(q), k / _packed.length(k)
    return _packed.recurrence(q, k, v, g, scale, state, chunk_size, None, cu_seqlens, beta)


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


def _run(
    q,
    k,
    v,
    g,
    beta,
    scale,
    initial_state,
    output_final_state,
    cu_seqlens,
    cu_seqlens_cpu=None,
    *,
    ranks=(),
    gate_name="g",
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    lower_bound=None,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    reverse=False,
    chunk_size=None,
    max_seqlen=None,
):
    """Check, give every head of the state its key and query, and run every sequence."""
    _checks.check_qkv(q, k, v, more_values=True)
    scale = _checks.as_scale(scale, q.shape[-1])
    H = v.shape[2]
    if q.dtype in (torch.float16, torch.bfloat16) and min(q.shape[2], k.shape[2]) < H and not _packed.on_triton(q):
        # Gradients of a shared head are summed first, then rounded.
        q, k = q.float(), k.float()
    k = k if k.shape[2] == H else k.repeat_interleave(H // k.shape[2], 2)
    q = q if q.shape[2] >= H else q.repeat_interleave(H // q.shape[2], 2)
    if use_gate_in_kernel:
        errors.check_tensor("g", g)
        _checks.check_decay(g, k, ranks, gate_name, raw=True)
        g = _gate(g, A_log, dt_bias, lower_bound, k)
    elif A_log is not None or dt_bias is not None:
        errors.fail("dt_bias" if A_log is None else "A_log", "None without use_gate_in_kernel", "a tensor")
    beta = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval, v)
    _checks.check_decay(g, k, ranks, gate_name)
    _checks.check_strength(beta, v)
    errors.check_cu_seqlens(cu_seqlens, *q.shape[:2], cu_seqlens_cpu, max_seqlen)
    state = _checks.keys_first(initial_state, state_v_first)
    _checks.check_state(state, q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, k, v.shape[-1])
    _checks.check_chunk_size(chunk_size)

    def core(q, k, v, beta, g, state, cu_seqlens):
        if use_qk_l2norm_in_kernel:
            return _with_unit_keys(q, k, v, beta, g, state, scale, chunk_size, cu_seqlens)
        return _packed.recurrence(q, k, v, g, scale, state, chunk_size, None, cu_seqlens, beta)

    o, state = in_order(core, (q, k, v, beta, g), state, cu_seqlens, reverse)
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2).contiguous() if state_v_first else state


@keywords(_SHARED)
def chunk_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """DeltaNet (arXiv 2406.06484, eq. 3): a token takes out what its key reads and puts its value there.

    h_t = (I - beta_t k_t k_t^T) h_{t-1} + beta_t k_t v_t^T. Everything else, errors included, as in
    `chunk_gated_delta_rule`, whose state_v_first, chunk_size and max_seqlen go by name.
    """
    flags = (scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return _run(q, k, v, None, beta, *flags, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **options)


@keywords(_SHARED)
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
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_delta_rule` for few tokens; beta is 1 unless given, reverse runs time backwards."""
    flags = (scale, initial_state, output_final_state, cu_seqlens)
    return _run(q, k, v, None, beta, *flags, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **options)


@keywords(_GATED)
def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule (arXiv 2412.06464, eq. 10): the state decays per head, then the key's place is rewritten.

    h_t = (I - beta_t k_t k_t^T) exp(g_t) h_{t-1} + beta_t k_t v_t^T, o_t = scale q_t h_t. Bounded where
    beta_t |k_t|^2 <= 2, as for keys of length 1.

    Args:
        q: [B,T,HQ,K] queries, HQ a multiple of H, or H a multiple of HQ.
        k: [B,T,HK,K] keys; v: [B,T,H,V] values, H a multiple of HK; in the dtype of q.
        g: [B,T,H] log decay per step, <= 0; -inf forgets everything.
        beta: [B,T,H] write strength, 0 to 2: at 1 the old value goes, at 2 it changes sign.
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
    options |= dict(use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, state_v_first=state_v_first, ranks=(3,))
    options |= dict(use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval)
    flags = (scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return _run(q, k, v, g, beta, *flags, **options)


@keywords(_GATED)
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
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_gated_delta_rule` for few tokens; beta is 1 unless given.

    gk [B,T,H,K] decays key channels instead of g, or beside it. Values have no decay here: gv is None.
    """
    if gv is not None:
        errors.fail("gv", "None (the delta rule decays keys, not values)", type(gv).__name__)
    if g is not None and gk is not None:
        errors.check_tensor("g", g)
        errors.check_tensor("gk", gk)
        if gk.ndim != 4 or gk.shape[:3] != g.shape or gk.device != g.device:
            wanted = f"[{', '.join(map(str, g.shape))}, K] on {g.device} beside g"
            errors.fail("gk", wanted, f"{tuple(gk.shape)} on {gk.device}")
        gk = gk + g.unsqueeze(-1)
    options |= dict(use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
    options |= dict(ranks=(3,)) if gk is None else dict(ranks=(4,), gate_name="gk")
    flags = (scale, initial_state, output_final_state, cu_seqlens)
    return _run(q, k, v, g if gk is None else gk, beta, *flags, **options)


@keywords(_GATED + " return_intermediate_states use_graph max_num_seqs")
def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention (arXiv 2510.26692, eq. 1): the delta rule with a decay per key channel.

    h_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) h_{t-1} + beta_t k_t v_t^T with g [B,T,H,K]. With use_gate_in_kernel and
    lower_bound the decay is lower_bound sigmoid(exp(A_log) (g + dt_bias)). safe_gate is accepted and has no effect:
    gates of any size are safe. Everything else, errors included, as in `chunk_gated_delta_rule`.
    """
    options |= dict(use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel, ranks=(4,))
    options |= dict(use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval)
    flags = (scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu)
    return _run(q, k, v, g, beta, *flags, lower_bound=lower_bound, **options)


@keywords(_GATED)
def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_kda` for few tokens; reverse runs time backwards."""
    options |= dict(use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, A_log=A_log, dt_bias=dt_bias, ranks=(4,))
    flags = (scale, initial_state, output_final_state, cu_seqlens)
    return _run(q, k, v, g, beta, *flags, **options)
