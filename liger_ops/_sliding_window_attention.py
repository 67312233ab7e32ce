"""Causal sliding-window attention with attention sinks.

Shapes: B batch, T queries, S keys (the queries are the last T of them), HQ query heads, H key/value heads, D width.
"""

import torch

from liger_ops import _checks, _joint, errors
from liger_ops._torch.window import window_attention


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    *,
    visible: torch.Tensor | None = None,
    return_lse: bool = False,
    softcap: float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the last `window` keys and the first `sinks` keys (StreamingLLM, arXiv 2309.17453).

    Token i sees tokens i - window + 1 .. i, itself included, and the sinks up to i, each once; cost grows with
    T * window. A row of queries that sees nothing (padding) yields finite numbers without meaning.

    Args:
        q: [B,T,HQ,D] queries, HQ a multiple of H.
        k, v: [B,S,H,D] keys and [B,S,H,V] values, S >= T; query t stands at key S - T + t.
        window: number of keys, at least 1.
        sinks: number of first keys that every later token sees, per row the first visible ones.
        scale: factor on the scores; None means D ** -0.5.
        visible: [B,S] bool, False hides a key (padding).
        return_lse: also return the log of the softmax denominator.
        softcap: bound > 0 of the scores s, which become softcap tanh(s / softcap); None bounds nothing.

    Returns:
        o [B,T,HQ,V] in the dtype of q; with return_lse also lse [B,T,HQ] in float32 (float64 for float64).

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    _checks.check_qkv(q, k, v, same_length=False)
    errors.check_window(window, sinks)
    _checks.check_visible(visible, k)
    scale, softcap = _checks.as_scale(scale, q.shape[-1]), _checks.as_softcap(softcap)
    if _joint.on_kernels(sinks, softcap, q, v) and not (return_lse and torch.is_grad_enabled()):
        o, lse = _joint.window(q, k, v, *_joint.find_keys(k, sinks, visible), window, scale)
    else:
        o, lse = window_attention(q, k, v, window, sinks, scale, softcap, visible, return_lse)
    return (o, lse) if return_lse else o
