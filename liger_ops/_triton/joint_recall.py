"""The joint softmax with recall, in three parts: the window, what is recalled beside it, and the recurrence.

Shapes: B batch, T queries, S keys, HQ = G * H query heads, H key/value heads, D width, M features, V value width, W
window, N blocks of C queries, L = R + C keys that a block sees beside its window: R held from before, and those that
leave the window in it.

Each part has a softmax of its own; the logs of their weights tell how they mix. The gradient of a weight wants the
output and the log of all weights, whichever part it is in. Logarithms are to base 2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from liger_ops._inputs import KernelAttentionInputs
from liger_ops._torch.attention.window import HIDING, LOG2
from liger_ops._torch.layout import full_precision, head_major, pack, unpack
from liger_ops._triton import joint
from liger_ops.limits import BLOCK, MAX_LOG_FEATURE

# Scores beside the window at once, 128 MB of float32.
_SCORES = 1 << 25


class Outputs(NamedTuple):
    """o [B,T,HQ,V] and the last state [B,H,M,V+1]; of every query [B,T,HQ] its largest exact score, the log of all that
    is exact, and of everything in units of that; h and z as `joint.States` has them."""

    o: torch.Tensor
    last: torch.Tensor | None
    top: torch.Tensor
    exact: torch.Tensor
    lse: torch.Tensor
    h: torch.Tensor
    z: torch.Tensor


class _Blocks(NamedTuple):
    """Of blocks `at`, in float32: queries [B,H,n,C*G,D] and what they see beside their windows, keys [B,H,n,L,D],
    values [B,H,n,L,V], and scores [B,H,n,C*G,L]."""

    at: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor


def _left(x: KernelAttentionInputs) -> slice:
    """The columns that leave the window."""
    first = x.k.shape[1] - x.q.shape[1] - x.window
    return slice(first, first + x.q.shape[1])


def _in_blocks(held: torch.Tensor, left: torch.Tensor, count: int) -> torch.Tensor:
    """Of `count` blocks what they hold [B,N*R,H,...] and what leaves in them [B,T,H,...] -> [B,H,N,L,...]."""
    parts = head_major(held, 0), head_major(left, count * BLOCK - left.shape[1])
    return torch.cat([y.unflatten(2, (count, -1)) for y in parts], 3)


def _beside(x: KernelAttentionInputs) -> Iterator[_Blocks]:
    """As many blocks at once as are not too many."""
    T, H, left = x.q.shape[1], x.k.shape[2], _left(x)
    N = -(-T // BLOCK)
    q = pack(x.q.float(), H, BLOCK).flatten(3, 4)
    k, v = _in_blocks(x.held_k, x.k[:, left], N), _in_blocks(x.held_v, x.v[:, left], N)
    lost = _in_blocks(x.held_lost, x.left_lost, N)
    row = torch.arange(N * BLOCK, device=q.device).view(N, BLOCK, 1)
    # Until a key that leaves in the block has left, the window shows it.
    near = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    near = F.pad(near, (k.shape[3] - BLOCK, 0))
    step = max(1, _SCORES // (q[:, :, 0, :, 0].numel() * k.shape[3]))
    for at in (slice(start, start + step) for start in range(0, N, step)):
        some = q[:, :, at], k[:, :, at].float(), v[:, :, at].float()
        scores = (some[0] @ some[1].transpose(3, 4)).mul_(x.scale * LOG2)
        hidden = (lost[:, :, at, None] <= row[at]) | near
        scores.unflatten(3, (BLOCK, -1)).masked_fill_(hidden.unsqueeze(4), HIDING[scores.dtype])
        yield _Blocks(at, *some, scores)


def _to_time(parts: list[torch.Tensor], length: int) -> torch.Tensor:
    """Blocks [B,H,n,C*G,...] -> [B,T,HQ,...]"""
    return unpack(torch.cat(parts, 2).unflatten(3, (BLOCK, -1)), length).flatten(2, 3)


def _window(x: KernelAttentionInputs) -> joint.Call:
    return joint.prepare(x._replace(q_log=None, g=None))


def _above(x: KernelAttentionInputs, top: torch.Tensor) -> torch.Tensor:
    """By how much the logarithms of query features [B,T,HQ,M] exceed a row's largest exact score."""
    assert x.q_log is not None
    return x.q_log.float() - top.unsqueeze(-1) / LOG2


def _recurrence(x: KernelAttentionInputs, top: torch.Tensor, exact: torch.Tensor) -> joint.Call:
    """What is far, in units of all that is exact, for which there stands a sink of score 0 and value 0."""
    assert x.left_v is not None
    B, T, H, _ = x.left_v.shape
    k, v = x.k.new_zeros(B, T + 1, H, x.k.shape[3]), F.pad(x.left_v, (0, 0, 0, 0, 1, 0))
    column, rest = x.column.new_zeros(B, 1), torch.arange(T + 1, device=k.device).expand(B, -1) > 0
    # Features saturate above the largest score, not above all that is exact.
    q_log = _above(x, top).clamp_(max=MAX_LOG_FEATURE) - (exact - top).unsqueeze(-1) / LOG2
    return joint.prepare(x._replace(q_log=q_log, k=k, v=v, column=column, rest=rest, window=0))


@full_precision
def forward(x: KernelAttentionInputs) -> Outputs:
    near = joint.forward(_window(x), None)
    o, top, exact = _join(x, near)
    far = joint.forward(_recurrence(x, top, exact), x.state)
    o = (o * torch.exp2(-far.lse).unsqueeze(-1)).add_(far.o)
    return Outputs(o.to(x.q.dtype), far.last, top, exact, far.lse, far.h, far.z)


def _join(x: KernelAttentionInputs, near: joint.Outputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a window gives, with what is recalled beside it: o [B,T,HQ,V], top and the log of its weights [B,T,HQ]."""
    found = []
    for blocks in _beside(x):
        top = blocks.scores.amax(-1, keepdim=True)
        weights = blocks.scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        found.append(((weights @ blocks.v).div_(total), top, top + total.log2_()))
    o, top, lse = (_to_time(list(parts), x.q.shape[1]) for parts in zip(*found, strict=True))
    lse, near_lse = lse.squeeze(-1), near.lse
    both = torch.logaddexp2(near_lse, lse)
    shares = ((y - both).exp2_().unsqueeze(-1) for y in (near_lse, lse))
    o = near.o.float() * next(shares) + o * next(shares)
    return o, torch.maximum(near.top, top.squeeze(-1)), both


@full_precision
def backward(x: KernelAttentionInputs, do: torch.Tensor, dstate: torch.Tensor, found: Outputs) -> joint.Gradients:
    """do and dstate are the gradients of what `forward` has found."""
    lse = found.exact + found.lse
    near = joint.backward(_window(x), do, None, joint.Outputs(found.o, None, lse, lse, x.q, x.q))
    # The largest weight that is not far is the sink's.
    states = joint.Outputs(found.o, None, torch.zeros_like(lse), found.lse, found.h, found.z)
    far = joint.backward(_recurrence(x, found.top, found.exact), do, dstate, states)
    assert far.q_log is not None and far.v is not None
    q_log = far.q_log.masked_fill(_above(x, found.top) > MAX_LOG_FEATURE, 0.0)
    q, k, v, held_k, held_v = _beside_gradients(x, do, found.o, lse)
    k, v = (F.pad(y, (0, 0, 0, 0, _left(x).start, x.window)).add_(z) for y, z in ((k, near.k), (v, near.v)))
    return far._replace(q=q + near.q, k=k, v=v, q_log=q_log, left_v=far.v[:, 1:], held_k=held_k, held_v=held_v)


def _beside_gradients(
    x: KernelAttentionInputs, do: torch.Tensor, o: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of q, of keys and values that leave the window [B,T,H,...], and of those that are held [B,N*R,H,...]."""
    T, H = x.q.shape[1], x.k.shape[2]
    do = do.float()
    rows = torch.cat([do, (do * o).sum(-1, keepdim=True), lse.unsqueeze(-1)], -1)
    rows = pack(rows, H, BLOCK).flatten(3, 4)
    dq, dk, dv = [], [], []
    for at, q, k, v, scores in _beside(x):
        some, delta, some_lse = rows[:, :, at].split([do.shape[-1], 1, 1], -1)
        weights = scores.sub_(some_lse).exp2_()
        dv.append(weights.transpose(3, 4) @ some)
        ds = (some @ v.transpose(3, 4)).sub_(delta).mul_(weights).mul_(x.scale)
        dq.append(ds @ k)
        dk.append(ds.transpose(3, 4) @ q)
    found = []
    for parts in (dk, dv):
        y = torch.cat(parts, 2)
        held, left = y.split([y.shape[3] - BLOCK, BLOCK], 3)
        found.append((held.flatten(2, 3).transpose(1, 2), left.flatten(2, 3)[:, :, :T].transpose(1, 2)))
    (held_k, k), (held_v, v) = found
    return _to_time(dq, T), k, v, held_k, held_v
