"""Liger Attention's joint form: exact softmax over the window and the sinks, a recurrence for everything older.

Shapes: B batch, T queries, S = W + T keys, HQ query heads, H key/value heads, D width, M features, V value width.
"""

import math
from typing import Any, cast

import torch

from liger_ops import _backend, _checks, errors
from liger_ops._inputs import AttentionInputs, Recalled
from liger_ops.documents import read_documents

# The state of the recurrence, and what `Recalled` holds.
RecallState = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


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
    initial_state: torch.Tensor | RecallState | None = None,
    output_final_state: bool = False,
    visible: torch.Tensor | None = None,
    softcap: float | None = None,
    recall: int = 0,
    score: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | RecallState | None]:
    """One softmax whose far part is a gated recurrence over positive features.

    o_i = (sum_near exp(s_ij) v_j + mix sum_far w_ij v_j) / (sum_near exp(s_ij) + mix sum_far w_ij) with
    s_ij = scale q_i k_j and w_ij = exp(q_log_i) exp(decay from j to i) exp(k_log_j). Near is the last `window`
    tokens and the sinks; far is every other earlier token, so that each token counts once. A token enters the
    recurrence, under its own decay, when it leaves the window. Features saturate: k_log counts up to 30, and q_log
    up to 30 above the largest score in the row's window and sinks.

    With recall, as many of the tokens that have left the window stay near, those of the highest score, and what enters
    the recurrence at a step is the token that is not, or no longer, among them; of equal scores the later token stays.
    The choice takes no gradient. This is LoLA's idea (arXiv 2505.23666, sec. 4) with a score that a token brings along.

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
        initial_state: [B,H,M,V+1]; the last column accumulates the key features alone. With recall what a call
            returned, that and the tokens recalled.
        output_final_state: also return the state after the T tokens have left the window.
        recall: how many tokens stay exact beyond the window, for each key/value head.
        score: [B,T,H] of the T tokens that leave the window, columns as of k_log; needed with recall.
        cu_seqlens: [N+1] bounds of documents packed along time, with batch 1, each of which is as if it were alone.
            Then S = T, no column lies before the queries', and k_log, g and score are of the T tokens themselves;
            without visible, initial_state and output_final_state.

    Returns:
        o [B,T,HQ,V] in the dtype of q, and the final state [B,H,M,V+1] in float32 (float64 for float64) or None; with
        recall (that, (k [B,R,H,D], v [B,R,H,V], far [B,R,H,F])): the tokens recalled, in the order of time, far what
        they will enter the recurrence by, their score, and 1 where there is a token.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    if cu_seqlens is not None:
        _checks.check_windowed(q, k, v, window, sinks, scale, softcap, visible)
        refused: dict[str, Any] = dict(visible=visible, initial_state=initial_state)
        refused["output_final_state"] = output_final_state or None
        told = dict(window=window, sinks=sinks, scale=scale, softcap=softcap, recall=recall)
        tensors = dict(q=q, k=k, v=v, q_log=q_log, k_log=k_log, g=g, score=score)
        return _packed(tensors, mix, cu_seqlens, refused, told), None
    scale, softcap = _checks.check_windowed(q, k, v, window, sinks, scale, softcap, visible)
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if T + window > S:
        errors.fail("k", f"at least T + window = {T + window} tokens", S)
    if not isinstance(q_log, torch.Tensor):
        errors.check_tensor("q_log", q_log)
    fine = torch.promote_types(q.dtype, torch.float32)
    # What is plainly right costs no call.
    if not isinstance(mix, torch.Tensor) or (mix.shape, mix.dtype, mix.device) != (q.shape[2:3], fine, q.device):
        mix = _as_mix(mix, q, fine)
    # Values are read on a CPU only.
    if mix.device.type == "cpu" and not torch.compiler.is_compiling() and not mix.detach().amin() >= 0:
        errors.fail("mix", "weights >= 0", f"a minimum of {mix.detach().amin().item():.4g}")
    far = slice(S - T - window, S - window)
    _checks.check_qkv(q_log, k_log, v[:, far].to(q_log.dtype), query="q_log", key="k_log")
    if q_log.shape[:3] != q.shape[:3]:
        errors.fail("q_log", f"{list(q.shape[:3])} and a width, to match q", tuple(q_log.shape))
    _checks.check_decay(g, k_log, (3, 4))
    # What is plainly right costs no call.
    if type(recall) is not int or recall or score is not None:
        state, recalled = _check_recall(recall, score, initial_state, k_log, g, (k, v))
    else:
        state, recalled = cast("torch.Tensor | None", initial_state), None
    _checks.check_state(state, B, k_log, v.shape[-1] + 1)
    if state is None:
        state = k_log.new_zeros(B, k.shape[2], k_log.shape[-1], v.shape[-1] + 1)
    far = q_log, k_log, g, mix, state, score, recalled
    o, state, after = _backend.joint(AttentionInputs(q, k, v, window, sinks, scale, softcap, visible, *far))
    if not output_final_state:
        return o, None
    return o, state if after is None else (state, (after.k.to(k.dtype), after.v.to(v.dtype), after.far))


def _packed(
    tensors: dict[str, torch.Tensor | None],
    mix: torch.Tensor | float,
    cu_seqlens: torch.Tensor,
    refused: dict[str, Any],
    told: dict[str, Any],
) -> torch.Tensor:
    """o of documents one behind the other; tensors [1,T,...] by the names of arguments, told what else they have."""
    given = {n: x for n, x in tensors.items() if x is not None or n not in ("g", "score")}
    q, window = cast(torch.Tensor, given["q"]), told["window"]
    documents = read_documents(cu_seqlens, q, refused)
    apart: dict[str, list[torch.Tensor]] = {}
    for name, x in given.items():
        errors.check_tensor(name, x)
        assert isinstance(x, torch.Tensor)
        if x.shape[:2] != q.shape[:2]:
            errors.fail(name, f"{list(q.shape[:2])} and more, as q has, beside cu_seqlens", tuple(x.shape))
        apart[name] = documents.apart(x)
    parts = []
    for i, rows in enumerate(documents.groups):
        own: dict[str, Any] = {"g": None, **{name: x[i] for name, x in apart.items()}}
        # Before a document lies an empty window, and what leaves it are the tokens that a window stands behind.
        own |= {name: _behind(own[name], window) for name in ("k", "v")}
        leaving = [name for name in ("k_log", "g", "score") if own.get(name) is not None]
        own |= {name: _behind(own[name], window)[:, : rows.shape[1]] for name in leaving}
        shown = torch.arange(window + rows.shape[1], device=q.device) >= window
        o, _ = liger_attention(**own, mix=mix, visible=shown.expand(len(rows), -1), **told)
        parts.append(o)
    v = cast(torch.Tensor, given["v"])
    return documents.together(parts, q.new_zeros(*q.shape[:3], v.shape[-1]))


def _behind(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x [N,L,...] behind so many columns of zeros."""
    return torch.cat([x.new_zeros(len(x), columns, *x.shape[2:]), x], 1)


def _as_mix(mix: torch.Tensor | float, q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight of the far part for each query head [HQ], in a dtype."""
    expected = f"a number >= 0 or floating [{q.shape[2]}] on {q.device}"
    if not isinstance(mix, torch.Tensor):
        if isinstance(mix, bool) or not isinstance(mix, int | float) or not 0 <= mix < math.inf:
            errors.fail("mix", expected, errors.shown(mix))
    elif mix.shape not in (q.shape[2:3], (1,), ()) or mix.device != q.device or not mix.is_floating_point():
        errors.fail("mix", expected, f"{mix.dtype} {tuple(mix.shape)} on {mix.device}")
    return torch.as_tensor(mix, dtype=dtype, device=q.device).expand(q.shape[2])


def _check_recall(
    recall: int,
    score: torch.Tensor | None,
    state: torch.Tensor | RecallState | None,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    columns: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor | None, Recalled | None]:
    """The state of the recurrence, if there is one, and the tokens recalled, zeros at first; None without recall."""
    errors.check_positive("recall", recall, 0)
    if not recall:
        if score is not None:
            errors.fail("score", "None without recall", f"a {type(score).__name__}")
        return cast("torch.Tensor | None", state), None
    B, T, H, M = k_log.shape
    errors.check_tensor("score", score)
    assert isinstance(score, torch.Tensor)
    if score.shape != (B, T, H) or score.device != k_log.device or not score.is_floating_point():
        given = f"{score.dtype} {tuple(score.shape)} on {score.device}"
        errors.fail("score", f"a floating tensor {[B, T, H]} on {k_log.device}", given)
    (k, v), gate = columns, 0 if g is None else 1 if g.ndim == 3 else M
    shapes = [(B, recall, H, width) for width in (k.shape[-1], v.shape[-1], M + gate + 2)]
    if state is None:
        kinds = k.dtype, v.dtype, torch.promote_types(k.dtype, torch.float32)
        return None, Recalled(*(k.new_zeros(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)))
    if not isinstance(state, tuple | list) or len(state) != 2:
        errors.fail("initial_state", "(state, recalled) with recall", type(state).__name__)
    return state[0], Recalled(*_checks.check_parts(state[1], dict(zip(Recalled._fields, shapes, strict=True)), k_log))
