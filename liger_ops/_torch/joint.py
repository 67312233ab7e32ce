"""One softmax over window, sinks and a delayed recurrence: shares the window's blocks and the recurrence's chunks.

Shapes: as in `window` and `additive`; M features, U = V + 1, the last value column 1, so that it sums the weights.
A block's first C keys are those that leave the window during the block: the chunk that its recurrence lets in.
"""

from functools import partial

import torch
import torch.nn.functional as F

from liger_ops._torch.additive import enter, products
from liger_ops._torch.decay import make_decay
from liger_ops._torch.layout import divide, full_precision, head_major, head_major_ones, pack
from liger_ops._torch.scores import scores
from liger_ops._torch.segments import Plan, define
from liger_ops._torch.window import LOG2, MASKED, Sinks, Window, attend, capped, lazy_near, rows_at_once, weigh

# exp(30) squared, times features, times a million tokens, stays inside float32.
MAX_LOG = 30.0


def _segment(
    near, first, scale, softcap, rows, state, out, q, k, v, sink_k, sink_v, sink_column, q_log, k_log, g, mix, rest
):
    """Rows of `joint`'s arguments: out [B,T,HQ,V] or None, state [B,H,M,U], mix [H,1,1,G,1]."""
    window = Window(rest, near(), first + rows.start, scale, softcap)
    (B, T), H, C = q.shape[:2], k.shape[2], len(window.near)
    N, short = -(-T // C), -T % C
    k, v = head_major(k, short), head_major_ones(v, short)
    weights = weigh(pack(q, H, C), k, Sinks(sink_k, sink_v, sink_column), window)

    k_far = head_major(k_log, short).clamp_(max=MAX_LOG).exp_()
    g = None if g is None else head_major(g, short)
    if short or not rest[:, :T].all():
        enters = F.pad(rest[:, :T], (0, short)).view(B, 1, -1, 1)
        k_far = k_far * enters.to(k.dtype)
        g = None if g is None else g.masked_fill(~(enters if g.ndim == 4 else enters.squeeze(-1)), 0.0)
    k_far, v_far, g = (x if x is None else x.contiguous().unflatten(2, (N, C)) for x in (k_far, v[:, :, : N * C], g))
    decay = make_decay(g)
    before, state = enter(k_far, v_far, decay, state)
    # In units of the window's largest weight, which keeps both factors inside float32.
    q_far = pack(q_log, H, C).mul_(LOG2).sub_(weights.top).clamp_(max=MAX_LOG * LOG2).exp2_()
    far, q_far = scores(q_far, k_far, decay, mix)
    # A key that has left the window of a row is one that its recurrence has let in: their columns complement.
    if torch.is_grad_enabled():
        weights = weights._replace(near=weights.near + F.pad(far, (0, weights.near.shape[-1] - C)))
    else:
        weights.near[..., :C] += far
    o = attend(weights, v, sink_v)
    o.view(B * H * N, -1, o.shape[-1]).baddbmm_(products(q_far), products(before))
    return divide(o, T, out), state


def _plan(q, k, v, sink_k, sink_v, sink_column, q_log, k_log, g, mix, rest, state, window, block, scale, softcap):
    first = k.shape[1] - q.shape[1]
    body = partial(_segment, lazy_near(q, window, block), first, scale, softcap)
    step, own, keys = rows_at_once(q, window + block, block), (0, 0), (first - window, first)
    inputs = [q, k, v, sink_k, sink_v, sink_column, q_log, k_log, g, mix, rest]
    return Plan(body, step, v.shape[-1], state, inputs, [own, keys, keys, *[None] * 3, own, own, own, None, keys])


_joint = define(
    "joint",
    "Tensor q, Tensor k, Tensor v, Tensor sink_k, Tensor sink_v, Tensor sink_column, Tensor q_log, Tensor k_log, "
    "Tensor? g, Tensor mix, Tensor rest, Tensor state, int window, int block, float scale, float softcap",
    _plan,
)


@full_precision
def joint(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    mix: torch.Tensor,
    state: torch.Tensor,
    sinks: Sinks,
    rest: torch.Tensor,
    window: int,
    block: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V], q_log [B,T,HQ,M], k_log [B,T,H,M], mix [HQ], state [B,H,M,U].

    rest [B,S] marks the keys that are not sinks, and k_log and g belong to the T keys from W before the first query on;
    a block has at most `block` queries. Returns o [B,T,HQ,V], state [B,H,M,U].
    """
    mix = mix.view(k.shape[2], 1, 1, -1, 1)
    return _joint(q, k, v, *sinks, q_log, k_log, g, mix, rest, state, window, block, scale, softcap)[:2]


@full_precision
def joint_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    mix: torch.Tensor,
    state: torch.Tensor,
    visible: torch.Tensor,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: q [B,HQ,D], k [B,S,H,D], v [B,S,H,V], q_log [B,HQ,M], k_log [B,H,M], g [B,H], [B,H,M] or None.

    Returns o [B,HQ,V], state [B,H,M,U].
    """
    B, S, H, _ = k.shape
    rank, last = visible.cumsum(1), S - window
    rest = visible & (rank > sinks)
    near = visible & ((rank <= sinks) | (torch.arange(S, device=k.device) >= last))
    enters = rest[:, last - 1, None]

    entering = k_log.clamp(max=MAX_LOG).exp().masked_fill(~enters.unsqueeze(-1), 0.0)
    if g is not None:
        g = g.masked_fill(~(enters if g.ndim == 2 else enters.unsqueeze(-1)), 0.0)
        state = state * g.exp().view(B, H, -1, 1)
    value = F.pad(v[:, last - 1], (0, 1), value=1.0)
    state = torch.addcmul(state, entering.unsqueeze(-1), value.unsqueeze(-2))

    s = (q.view(B, H, -1, q.shape[-1]) * scale) @ k.permute(0, 2, 3, 1)
    s = capped(s, softcap).masked_fill(~near[:, None, None], MASKED)
    top = s.amax(-1, keepdim=True)
    weights = (s - top).exp()
    far = (q_log.view(B, H, -1, q_log.shape[-1]) - top).clamp(max=MAX_LOG).exp() * mix.view(H, -1, 1)
    o = far @ state
    o = (weights @ v.transpose(1, 2) + o[..., :-1]) / (weights.sum(-1, keepdim=True) + o[..., -1:])
    return o.flatten(1, 2), state
