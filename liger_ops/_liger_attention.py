"""Liger Attention's joint form: exact softmax over the window and the sinks, a recurrence for everything older.

Shapes: B batch, T queries, S = W + T keys, HQ query heads, H key/value heads, D width, M features, V value width.
"""

import torch

from liger_ops import _backend, _checks, errors
from liger_ops._inputs import AttentionInputs


@errors.lists_keywords
def liger_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    mix: torch.Tensor | float = 1.0,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    visible: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax whose far part is a gated recurrence over positive features.

    o_i = (sum_near exp(s_ij) v_j + mix sum_far w_ij v_j) / (sum_near exp(s_ij) + mix sum_far w_ij) with
    s_ij = scale q_i k_j and w_ij = exp(q_log_i) exp(decay from j to i) exp(k_log_j). Near is the last `window`
    tokens and the sinks; far is every other earlier token, so that each token counts once. A token enters the
    recurrence, under its own decay, when it leaves the window. Features saturate: k_log counts up to 30, and q_log
    up to 30 above the largest score in the row's window and sinks.

    Args:
        q: [B,T,HQ,D] queries as the window branch scores them (rotated), HQ a multiple of H.
        k, v: [B,S,H,D] keys and [B,S,H,V] values. S >= T + window and the queries are the last T: the first
            `window` columns before them are the tokens already in the window (hide them at the start of a text),
            anything older is sinks.
        q_log: [B,T,HQ,M] logarithm of the query features.
        k_log: [B,T,H,M] logarithm of the key features of the T tokens that leave the window, columns
            S - T - window .. S - window - 1.
        g: their log decay, [B,T,H,M], [B,T,H] or None.
        mix: [HQ] weight >= 0 of the far part; 0 leaves the window and the sinks alone.
        window, sinks, scale, visible, softcap: as in `sliding_window_attention`.
        initial_state: [B,H,M,V+1]; the last column accumulates the key features alone.
        output_final_state: also return the state after the T tokens have entered.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the final state [B,H,M,V+1] in float32 (float64 for float64) or None.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    scale, softcap = _checks.check_windowed(q, k, v, window, sinks, scale, softcap, visible)
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if T + window > S:
        errors.fail("k", f"at least T + window = {T + window} tokens", S)
    if not isinstance(q_log, torch.Tensor):
        errors.check_tensor("q_log", q_log)
    if not isinstance(mix, torch.Tensor) and (not isinstance(mix, int | float) or not mix >= 0):
        errors.fail("mix", f"a number >= 0 or [{q.shape[2]}]", repr(mix))
    far = slice(S - T - window, S - window)
    _checks.check_qkv(q_log, k_log, v[:, far].to(q_log.dtype), query="q_log", key="k_log")
    if q_log.shape[:3] != q.shape[:3]:
        errors.fail("q_log", f"{list(q.shape[:3])} and a width, to match q", tuple(q_log.shape))
    if isinstance(mix, torch.Tensor) and (mix.shape not in (q.shape[2:3], (1,), ()) or mix.device != q.device):
        errors.fail("mix", f"a number or [{q.shape[2]}] on {q.device}", f"{tuple(mix.shape)} on {mix.device}")
    _checks.check_decay(g, k_log, (3, 4))
    _checks.check_state(initial_state, B, k_log, v.shape[-1] + 1)
    if initial_state is None:
        initial_state = k_log.new_zeros(B, k.shape[2], k_log.shape[-1], v.shape[-1] + 1)
    fine = torch.promote_types(q.dtype, torch.float32)
    mix = torch.as_tensor(mix, dtype=fine, device=q.device).expand(q.shape[2])
    x = AttentionInputs(q, k, v, window, sinks, scale, softcap, visible, q_log, k_log, g, mix, initial_state)
    o, state = _backend.joint(x)
    return o, state if output_final_state else None
