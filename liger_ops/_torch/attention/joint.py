"""One softmax over window, sinks and a delayed recurrence: shares the window's blocks and the recurrence's chunks.

Shapes: as in `window` and `additive`; M features, U = V + 1, the last value column 1, so that it sums the weights.
A block's first C keys are those that leave the window during the block: the chunk that its recurrence lets in.
"""

import torch
import torch.nn.functional as F

from liger_ops import limits
from liger_ops._inputs import AttentionInputs
from liger_ops._torch.attention.window import (
    LOG2,
    MASKED,
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
from liger_ops._torch.segments import Plan, define
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `joint`: out [B,T,HQ,V] or None, state [B,H,M,U], mix [H,1,1,G,1]."""
    (B, T), H, C = q.shape[:2], k.shape[2], view.size
    N, short = -(-T // C), -T % C
    k, v, q, q_far = head_major(k, short), head_major_ones(v, short), pack(q, H, C), pack(q_log, H, C)
    k_far = head_major(k_log, short).clamp_(max=MAX_LOG_FEATURE).exp_()
    g = None if g is None else head_major(g, short)
    window = Window(rest, view.near(), view.first + rows.start, view.scale, view.softcap)
    weights = weigh(q, k, Sinks(sink_k, sink_v, sink_column), window)
    if short or not rest[:, :T].all():
        enters = F.pad(rest[:, :T], (0, short)).view(B, 1, -1, 1)
        k_far = k_far * enters.to(k.dtype)
        g = None if g is None else g.masked_fill(~(enters if g.ndim == 4 else enters.squeeze(-1)), 0.0)
    k_far, v_far = (x.contiguous().unflatten(2, (N, C)) for x in (k_far, v[:, :, : N * C]))
    g = None if g is None else g.contiguous().unflatten(2, (N, C))
    decay = make_decay(g, carry=True)
    before, state = enter(k_far, v_far, decay, state)
    # In units of the window's largest weight, which keeps both factors inside float32.
    q_far = q_far.mul_(LOG2).sub_(weights.top).clamp_(max=MAX_LOG_FEATURE * LOG2).exp2_()
    far, q_far = decayed_scores(q_far, k_far, decay, mix)
    # A key that has left the window of a row is one that its recurrence has let in: their columns complement.
    if torch.is_grad_enabled():
        weights = weights._replace(near=weights.near + F.pad(far, (0, weights.near.shape[-1] - C)))
    else:
        weights.near[..., :C] += far
    o = attend(weights, v, sink_v)
    o.view(B * H * N, -1, o.shape[-1]).baddbmm_(q_far.flatten(3, 4).flatten(0, 2), before.flatten(0, 2))
    return divide(o, T, out), state


def _plan(*, block: int, **given) -> Plan:
    return windowed_plan(_segment, block, given["v"].shape[-1], given, dict(mix=None))


_joint = define(
    "joint",
    "Tensor q, Tensor k, Tensor v, Tensor sink_k, Tensor sink_v, Tensor sink_column, Tensor q_log, Tensor k_log, "
    "Tensor? g, Tensor mix, Tensor rest, Tensor state, int window, int block, float scale, float softcap",
    _plan,
)


def _working(x: AttentionInputs) -> AttentionInputs:
    """In the dtype that sums are taken in."""
    work = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    names = ("q", "k", "v", "q_log", "k_log", "g", "mix", "state")
    return x._replace(**{n: y.to(work) for n in names if (y := getattr(x, n)) is not None})


def joint(x: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B,T,HQ,V] in the dtype of q, and the state after the T tokens [B,H,M,U]."""
    dtype, x = x.q.dtype, _working(x)
    assert x.mix is not None
    sinks, rest = take_sinks(x.k, x.v, x.sinks, x.visible)
    block = limits.CHUNK_PER_CHANNEL if x.g is not None and x.g.ndim == 4 else limits.CHUNK
    o, state = _joint(
        **{n: getattr(x, n) for n in ("q", "k", "v", "q_log", "k_log", "g", "state", "window", "scale", "softcap")},
        sink_k=sinks.k,
        sink_v=sinks.v,
        sink_column=sinks.column,
        mix=x.mix.view(x.k.shape[2], 1, 1, -1, 1),
        rest=rest,
        block=block,
    )
    return o.to(dtype), state


def joint_step(x: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
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
    near = visible & ((rank <= x.sinks) | (torch.arange(S, device=k.device) >= last))
    enters = rest[:, last - 1, None]

    state = x.state
    entering = k_log.clamp(max=MAX_LOG_FEATURE).exp().masked_fill(~enters.unsqueeze(-1), 0.0)
    if g is not None:
        g = g.masked_fill(~(enters if g.ndim == 2 else enters.unsqueeze(-1)), 0.0)
        state = state * g.exp().view(B, H, -1, 1)
    value = F.pad(v[:, last - 1], (0, 1), value=1.0)
    state = torch.addcmul(state, entering.unsqueeze(-1), value.unsqueeze(-2))

    s = (q.view(B, H, -1, q.shape[-1]) * x.scale) @ k.permute(0, 2, 3, 1)
    s = (capped(s, x.softcap) if x.softcap else s).masked_fill(~near[:, None, None], MASKED)
    top = s.amax(-1, keepdim=True)
    weights = (s - top).exp()
    far = (q_log.view(B, H, -1, q_log.shape[-1]) - top).clamp(max=MAX_LOG_FEATURE).exp() * x.mix.view(H, -1, 1)
    o = far @ state
    o = (weights @ v.transpose(1, 2) + o[..., :-1]) / (weights.sum(-1, keepdim=True) + o[..., -1:])
    return o.flatten(1, 2).unsqueeze(1).to(dtype), state
