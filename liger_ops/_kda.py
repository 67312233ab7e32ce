"""Kimi Delta Attention: the delta rule with a decay per key channel.

Shapes: B batch, T time, HQ query heads, HK key heads, H value heads (a multiple of HK), K key width, V value width,
N sequences.
"""

import torch

from liger_ops._delta_rule import run_delta_rule
from liger_ops._keywords import keywords


@keywords("return_intermediate_states use_graph max_num_seqs")
def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
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
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    state_v_first: bool = False,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention (arXiv 2510.26692, eq. 1): the delta rule with a decay per key channel.

    h_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) h_{t-1} + beta_t k_t v_t^T with g [B,T,H,K]. With use_gate_in_kernel and
    lower_bound the decay is lower_bound sigmoid(exp(A_log) (g + dt_bias)). safe_gate is accepted and has no effect:
    gates of any size are safe. Everything else, errors included, as in `chunk_gated_delta_rule`.
    """
    return run_delta_rule(
        q,
        k,
        v,
        rank=4,
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
def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: torch.Tensor | None = None,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens_cpu: torch.Tensor | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_kda` for few tokens; reverse runs time backwards."""
    return run_delta_rule(
        q,
        k,
        v,
        rank=4,
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
