"""One softmax over window, sinks and a delayed recurrence: shares the window's blocks and the recurrence's chunks.

Shapes: as in `window` and `additive`; M features, U = V + 1, the last value column 1, so that it sums the weights.
A block's first C keys are those that leave the window during the block: the chunk that its recurrence lets in.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F

from liger_ops import limits
from liger_ops._inputs import AttentionInputs, Recalled
from liger_ops._torch.attention.recall import recalling, step
from liger_ops._torch.attention.window import (
    HIDING,
    LOG2,
    Held,
    Sinks,
    View,
    Window,
    attend,
    capped,
    divide,
    take_sinks,
    weigh,
    windowed_plan,
)
from liger_ops._torch.decay import make_decay
from liger_ops._torch.layout import full_precision, head_major, head_major_ones, pack
from liger_ops._torch.segments import Plan, Reach, define
from liger_ops._torch.traced.additive import decayed_scores, enter
from liger_ops.limits import MAX_LOG_FEATURE


def _segment(
    rows: slice,
    state: torch.Tensor,
    out: torch.Tensor | None,
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    sink_column: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    mix: torch.Tensor,
    rest: torch.Tensor,
    view: View,
    enters: torch.Tensor | None = None,
    left_v: torch.Tensor | None = None,
    **recalled: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `joint`: out [B,T,HQ,V] or None, state [B,H,M,U], mix [H,1,1,G,1].

    enters, left_v and what `_hold` takes are there where tokens are recalled.
    """
    (B, T), H, C = q.shape[:2], k.shape[2], view.size
    N, short = -(-T // C), -T % C
    held = None if enters is None else _hold(rows.start, N, C, **recalled)
    k, v, q, q_far = head_major(k, short), head_major_ones(v, short), pack(q, H, C), pack(q_log, H, C)
    k_far = head_major(k_log, short).clamp_(max=MAX_LOG_FEATURE).exp_()
    g = None if g is None else head_major(g, short)
    window = Window(rest, view.near(), view.first + rows.start, view.scale, view.softcap)
    weights = weigh(q, k, Sinks(sink_k, sink_v, sink_column), window, held)
    enters = rest[:, :T].unsqueeze(-1) if enters is None else enters
    if short or not enters.all():
        enters = F.pad(enters.transpose(1, 2), (0, short)).unsqueeze(-1)
        k_far = k_far * enters.to(k.dtype)
        g = None if g is None else g.masked_fill(~(enters if g.ndim == 4 else enters.squeeze(-1)), 0.0)
    v_far = v[:, :, : N * C] if left_v is None else head_major_ones(left_v, short)
    k_far, v_far = (x.contiguous().unflatten(2, (N, C)) for x in (k_far, v_far))
    g = None if g is None else g.contiguous().unflatten(2, (N, C))
    decay = make_decay(g, carry=True)
    before, state = enter(k_far, v_far, decay, state)
    # In units of the window's largest weight, which keeps both factors inside float32.
    q_far = q_far.mul_(LOG2).sub_(weights.top).clamp_(max=MAX_LOG_FEATURE * LOG2).exp2_()
    far, q_far = decayed_scores(q_far, k_far, decay, mix)
    # A key that has left the window of a row is one that its recurrence has let in, unless others leave in its place:
    # their columns complement.
    if held is None and torch.is_grad_enabled():
        weights = weights._replace(near=weights.near + F.pad(far, (0, weights.near.shape[-1] - C)))
    elif held is None:
        weights.near[..., :C] += far
    o = attend(weights, v, sink_v, held)
    sums = o.view(B * H * N, -1, o.shape[-1])
    if held is not None:
        sums.baddbmm_(far.flatten(3, 4).flatten(0, 2), v_far.flatten(0, 2))
    sums.baddbmm_(q_far.flatten(3, 4).flatten(0, 2), before.flatten(0, 2))
    return divide(o, T, out), state


def _hold(
    start: int,
    N: int,
    C: int,
    held_k: torch.Tensor,
    held_v: torch.Tensor,
    held_lost: torch.Tensor,
    left_lost: torch.Tensor,
) -> Held:
    """For N blocks of C rows from row `start` on: what they see exactly of that which has left the window.

    held_k [B,N*R,H,D] and held_v [B,N*R,H,V] until the row held_lost [B,N*R,H], and the keys which leave it within a
    block until left_lost [B,T,H].
    """
    short, later = N * C - left_lost.shape[1], torch.ones(C, C, dtype=torch.bool, device=held_k.device).triu(1)
    row = torch.arange(start, start + N * C, device=held_k.device).view(N, C, 1)
    held, left = head_major(held_lost, 0).unflatten(2, (N, 1, -1)), head_major(left_lost, short).unflatten(2, (N, 1, C))
    # A key still in a row's window is not recalled, and shows all the same.
    masks = held <= row, (left <= row) & ~later
    hidden = (held_k.new_zeros(()).masked_fill(x, HIDING[held_k.dtype]).unsqueeze(4) for x in masks)
    k, v = head_major(held_k, 0), head_major_ones(held_v, 0)
    return Held(*(x.unflatten(2, (N, -1)).flatten(0, 2) for x in (k, v)), *hidden)


def _plan(*, block: int, recall: int, **given) -> Plan:
    reach: dict[str, Reach] = dict(mix=None)
    if given["enters"] is not None:
        # Members stand by blocks.
        size = cast(int, torch.sym_min(block, given["q"].shape[1]))
        reach |= dict.fromkeys(("held_k", "held_v", "held_lost"), lambda rows: _members(rows, size, recall))
        return windowed_plan(_segment, block, given["v"].shape[-1], given, reach, recall)
    return windowed_plan(_segment, block, given["v"].shape[-1], given, reach)


def _members(rows: slice, block: int, recall: int) -> slice:
    """Where the members of the blocks of these rows stand."""
    return slice(rows.start // block * recall, -(-rows.stop // block) * recall)


_joint = define(
    "joint",
    "Tensor q, Tensor k, Tensor v, Tensor sink_k, Tensor sink_v, Tensor sink_column, Tensor q_log, Tensor k_log, "
    "Tensor? g, Tensor mix, Tensor rest, Tensor? enters, Tensor? left_v, Tensor? left_lost, Tensor? held_k, "
    "Tensor? held_v, Tensor? held_lost, Tensor state, int window, int block, int recall, float scale, float softcap",
    _plan,
)
# Of its arguments, those for tokens that are recalled.
_RECALL = ("enters", "left_v", "left_lost", "held_k", "held_v", "held_lost")


def _working(x: AttentionInputs) -> AttentionInputs:
    """In the dtype that sums are taken in."""
    work = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    names = ("q", "k", "v", "q_log", "k_log", "g", "mix", "state")
    recalled = None if x.recalled is None else Recalled(*(y.to(work) for y in x.recalled))
    return x._replace(**{n: y.to(work) for n in names if (y := getattr(x, n)) is not None}, recalled=recalled)


def joint(x: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, Recalled | None]:
    """o [B,T,HQ,V] in the dtype of q; after the T tokens the state [B,H,M,U], and what is recalled, if anything."""
    dtype, x = x.q.dtype, _working(x)
    assert x.mix is not None
    sinks, rest = take_sinks(x.k, x.v, x.sinks, x.visible)
    block = limits.CHUNK_PER_CHANNEL if x.g is not None and x.g.ndim == 4 else limits.CHUNK
    recall, recalled = 0, None
    far: dict[str, torch.Tensor | None] = dict(k_log=x.k_log, g=x.g) | dict.fromkeys(_RECALL)
    if x.recalled is not None:
        T, S, recall = x.q.shape[1], x.k.shape[1], x.recalled.k.shape[1]
        given, recalled = recalling(x, rest[:, S - T - x.window : S - x.window], block)
        far |= given
    o, state = _joint(
        **{n: getattr(x, n) for n in ("q", "k", "v", "q_log", "state", "window", "scale", "softcap")},
        **far,
        sink_k=sinks.k,
        sink_v=sinks.v,
        sink_column=sinks.column,
        mix=x.mix.view(x.k.shape[2], 1, 1, -1, 1),
        rest=rest,
        block=block,
        recall=recall,
    )
    return o.to(dtype), state, recalled


def joint_step(x: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, Recalled | None]:
    """`joint` of one token, T = 1, where nothing is differentiated."""
    if torch.is_autocast_enabled(x.q.device.type):
        return full_precision(joint_step)(x)
    dtype, x = x.q.dtype, _working(x)
    (B, S, H, _), q, k, v = x.k.shape, x.q[:, 0], x.k, x.v
    q_log, k_log, g = (None if y is None else y[:, 0] for y in (x.q_log, x.k_log, x.g))
    assert q_log is not None and k_log is not None and x.mix is not None and x.state is not None
    visible = torch.ones(B, S, dtype=torch.bool, device=k.device) if x.visible is None else x.visible
    rank, last = visible.cumsum(1), S - x.window
    rest = visible & (rank > x.sinks)
    near = (visible & ((rank <= x.sinks) | (torch.arange(S, device=k.device) >= last)))[:, None, None]
    enters, value, recalled = rest[:, last - 1, None], v[:, last - 1], None
    if x.recalled is not None:
        k, v, near, k_log, g, value, enters, recalled = step(x, enters, near)

    state = x.state
    entering = k_log.clamp(max=MAX_LOG_FEATURE).exp().masked_fill(~enters.unsqueeze(-1), 0.0)
    if g is not None:
        g = g.masked_fill(~(enters if g.ndim == 2 else enters.unsqueeze(-1)), 0.0)
        state = state * g.exp().view(B, H, -1, 1)
    value = F.pad(value, (0, 1), value=1.0)
    state = torch.addcmul(state, entering.unsqueeze(-1), value.unsqueeze(-2))

    s = (q.view(B, H, -1, q.shape[-1]) * x.scale) @ k.permute(0, 2, 3, 1)
    s = (capped(s, x.softcap) if x.softcap else s).masked_fill(~near, HIDING[s.dtype])
    top = s.amax(-1, keepdim=True)
    weights = (s - top).exp()
    far = (q_log.view(B, H, -1, q_log.shape[-1]) - top).clamp(max=MAX_LOG_FEATURE).exp() * x.mix.view(H, -1, 1)
    o = far @ state
    o = (weights @ v.transpose(1, 2) + o[..., :-1]) / (weights.sum(-1, keepdim=True) + o[..., -1:])
    return o.flatten(1, 2).unsqueeze(1).to(dtype), state, recalled
