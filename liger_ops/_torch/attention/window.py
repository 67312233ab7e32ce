"""Blocked causal window attention with sinks: cost linear in T.

Shapes: B batch, T queries, S keys (the queries are the last T of them), HQ query heads, H key/value heads, G query
heads per key/value head, D width, W window, P sinks, N blocks of C queries, L = W + C keys in reach of a block.
A segment of rows at a time, all heads together; a head's key blocks overlap in memory and are never copied out.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from liger_ops._inputs import AttentionInputs, work_dtype
from liger_ops._torch.layout import head_major, head_major_ones, pack, unpack
from liger_ops._torch.segments import Plan, Reach, define

BLOCK = 32
# Floats of scores in a segment, 4 MB of float32: beyond, products wait for memory; below, for the interpreter.
_SCORES = 1 << 20
# How many times as many on a GPU, which waits for the launches of small segments.
_ON_GPU = 8
LOG2 = math.log2(math.e)
# Hides a score when added to it, twice if need be, without a NaN where a row sees nothing.
HIDING = {dtype: torch.finfo(dtype).min / 2 for dtype in (torch.float32, torch.float64)}


class Sinks(NamedTuple):
    """The first visible keys of each row: k [B,H,P,D], v [B,H,P,V], column [B,P] (S where a row has fewer)."""

    k: torch.Tensor
    v: torch.Tensor
    column: torch.Tensor


class Window(NamedTuple):
    """What a window may show of a segment, and how: rest [B,W+T] marks its keys, from W before the first query on.

    near [C,L] is added to the scores of every block, first is the column of the first query, scale the scores' factor,
    softcap what bounds them, 0 if nothing does.
    """

    rest: torch.Tensor
    near: torch.Tensor
    first: int
    scale: float
    softcap: float


class Held(NamedTuple):
    """Keys that a block sees beside its window: k [B*H*N,R,D], v [B*H*N,R,V+1].

    Added to scores are hidden [B,H,N,C,1,R] to theirs, and left [B,H,N,C,1,C] to those of the block's first C keys,
    which leave the window in it.
    """

    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor
    left: torch.Tensor


def lazy_near(q: torch.Tensor, reach: int, block: int, behind: bool = False) -> Callable[[], torch.Tensor]:
    """`near` of q [B,T,HQ,D] over `reach` keys, at most `block` rows of it, made when first asked for.

    behind: keys that have left a row's window show, for others to hide.
    """

    @cache
    def near() -> torch.Tensor:
        C = min(block, q.shape[1])
        r, c = torch.arange(C, device=q.device)[:, None], torch.arange(reach + C, device=q.device)
        hidden = c > r + reach
        return q.new_zeros(C, reach + C).masked_fill_(hidden if behind else hidden | (c <= r), HIDING[q.dtype])

    return near


def find_sinks(k: torch.Tensor, count: int, visible: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns [B,P] of the sinks of k [B,S,H,D], S where a row has fewer, and the mask [B,S] of the other keys."""
    B, S = k.shape[:2]
    columns = torch.arange(S, device=k.device).expand(B, S)
    rest = torch.ones(B, S, dtype=torch.bool, device=k.device) if visible is None else visible
    # Tensors of sizes, and never sizes as the numbers of an op: a trace would hold each for its own case.
    column = torch.arange(count, device=k.device).clamp(max=S).expand(B, count)
    if visible is not None and count:
        seen = torch.cat([torch.where(visible, columns, S), columns.new_full((B, count), S)], 1)
        column = seen.topk(count, dim=1, largest=False, sorted=True).values
    return column, rest & (rest.cumsum(1) > count)


def take_sinks(
    k: torch.Tensor, v: torch.Tensor, count: int, visible: torch.Tensor | None
) -> tuple[Sinks, torch.Tensor]:
    """The sinks of k [B,S,H,D], v [B,S,H,V], and the mask [B,S] of the keys left to the window."""
    S, H = k.shape[1:3]
    column, rest = find_sinks(k, count, visible)
    index = column.clamp(max=S - 1)[:, :, None, None].expand(-1, -1, H, -1)
    sink_k, sink_v = (x.gather(1, index.expand(-1, -1, -1, x.shape[-1])).transpose(1, 2) for x in (k, v))
    return Sinks(sink_k, sink_v, column), rest


def _masks(window: Window, sinks: Sinks, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is added to the scores of `count` blocks, and to those of the sinks.

    [B or 1,1,N or 1,C,1,L] and [B,1,P,N,C,1], or None where every sink is in the past.
    """
    C, L = window.near.shape
    near, sink, rest, first = window.near.view(1, 1, 1, C, 1, L), None, window.rest, window.first
    if (short := count * C + L - C - rest.shape[1]) or not rest.all():
        hidden = near.new_zeros(()).masked_fill(~F.pad(rest, (0, short)), HIDING[near.dtype])
        near = near + hidden.unfold(1, L, C).unflatten(1, (1, count, 1, 1))
    if not (sinks.column <= first).all():
        query = torch.arange(first, first + count * C, device=rest.device).view(1, 1, 1, count, C, 1)
        later = sinks.column.view(len(rest), 1, -1, 1, 1, 1) > query
        sink = near.new_zeros(()).masked_fill(later, HIDING[near.dtype])
    return near, sink


def _each(x: torch.Tensor, y: list[torch.Tensor]) -> torch.Tensor:
    """x [B*H,N,R,D] times one y [N,D,E] per head, whose matrices may overlap in memory: no copy is made of them."""
    if torch.is_grad_enabled():
        return torch.stack([a @ b for a, b in zip(x, y, strict=True)])
    out = x.new_empty(*x.shape[:3], y[0].shape[-1])
    for a, b, o in zip(x, y, out, strict=True):
        torch.bmm(a, b, out=o)
    return out


class Weights(NamedTuple):
    """2^(score - top): near of the window [B,H,N,C,G,L] and sinks [B*H,P,N*C*G]; top [B,H,N,C,G,1], the largest.

    held [B*H*N,C*G,R] of `Held`, if any. Scores are logarithms to base 2, whose exponential stays fast far below the
    underflow.
    """

    near: torch.Tensor
    sinks: torch.Tensor
    top: torch.Tensor
    held: torch.Tensor | None = None


def capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, sec. 2)."""
    return (scores / softcap).tanh() * softcap


def weigh(q: torch.Tensor, k: torch.Tensor, sinks: Sinks, window: Window, held: Held | None = None) -> Weights:
    """q [B,H,N,C,G,D], which it changes, and k [B,H,W+N*C,D]."""
    (B, H, N, _, G, D), P, (C, L) = q.shape, sinks.k.shape[2], window.near.shape
    q = q.mul_(window.scale * LOG2).view(B * H, N, C * G, D)
    near, future = _masks(window, sinks, N)
    keys = [x.unfold(0, L, C) for x in k.flatten(0, 1)]
    cap = window.softcap * LOG2
    scores = _each(q, keys)
    scores = (capped(scores, cap) if cap else scores).view(B, H, N, C, G, L).add_(near)
    beside = None
    if held is not None:
        scores[..., :C].add_(held.left)
        beside = torch.bmm(q.view(B * H * N, C * G, D), held.k.transpose(1, 2)).view(B, H, N, C, G, -1)
        beside = (capped(beside, cap) if cap else beside).add_(held.hidden)
    # A constant to the gradient: it divides out.
    top = scores.detach().amax(-1, keepdim=True)
    if beside is not None:
        top = torch.maximum(top, beside.detach().amax(-1, keepdim=True))
    # Keys first: with P so small, everything else is far slower.
    sink = torch.bmm(sinks.k.flatten(0, 1), q.view(B * H, -1, D).transpose(1, 2))
    sink = capped(sink, cap) if cap else sink
    if P:
        if future is not None:
            sink.view(B, H, P, N, C, G).add_(future)
        top = torch.maximum(top, sink.detach().amax(1).view(top.shape))
        sink.sub_(top.view(B * H, 1, -1)).exp2_()
    if beside is not None:
        beside = beside.sub_(top).exp2_().view(B * H * N, C * G, -1)
    return Weights(scores.sub_(top).exp2_(), sink, top, beside)


def attend(weights: Weights, v: torch.Tensor, sink_v: torch.Tensor, held: Held | None = None) -> torch.Tensor:
    """v [B,H,W+N*C,V+1], sink_v [B,H,P,V] -> weighted sums [B,H,N,C,G,V+1]."""
    B, H, N, C, G, L = weights.near.shape
    values = [x.unfold(0, L, C).transpose(1, 2) for x in v.flatten(0, 1)]
    o = _each(weights.near.view(B * H, N, C * G, L), values)
    if sink_v.shape[2]:
        sink_v = F.pad(sink_v.flatten(0, 1), (0, 1), value=1.0)
        o.view(B * H, N * C * G, -1).baddbmm_(weights.sinks.transpose(1, 2), sink_v)
    if held is not None:
        assert weights.held is not None
        o.view(B * H * N, C * G, -1).baddbmm_(weights.held, held.v)
    return o.view(B, H, N, C, G, -1)


def divide(x: torch.Tensor, length: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """[B,H,N,C,G,V+1] -> [B,T,HQ,V]: the first V columns divided by the last, into `out` if given."""
    x = x.flatten(2, 3).transpose(1, 2)[:, :length]
    if out is None:
        return (x[..., :-1] / x[..., -1:]).flatten(2, 3)
    torch.div(x[..., :-1], x[..., -1:], out=out.unflatten(2, x.shape[2:4]))
    return out


def rows_at_once(q: torch.Tensor, reach: int, size: int) -> int:
    """How many of the queries q [B,T,HQ,D] a segment takes: a multiple of `size`, whose scores fit a core's cache."""
    floats = _SCORES * (_ON_GPU if q.is_cuda else 1)
    return cast(int, torch.sym_max(floats // (q.shape[0] * q.shape[2] * reach * size), 1)) * size


class View(NamedTuple):
    """What of `Window` all rows of an op share, whose first query stands at key `first`; near is made when needed.

    size is C, the queries of a block.
    """

    near: Callable[[], torch.Tensor]
    size: int
    first: int
    scale: float
    softcap: float


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
    rest: torch.Tensor,
    view: View,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `window_attention`; the state is nothing."""
    window = Window(rest, view.near(), view.first + rows.start, view.scale, view.softcap)
    T, H, C = q.shape[1], k.shape[2], view.size
    k, v = head_major(k, -T % C), head_major_ones(v, -T % C)
    weights = weigh(pack(q, H, C), k, Sinks(sink_k, sink_v, sink_column), window)
    sums = attend(weights, v, sink_v)
    if not with_lse:
        return divide(sums, T, out), state
    lse = unpack((sums[..., -1:].log2() + weights.top) / LOG2, T).flatten(2, 3)
    if out is None:
        return torch.cat([divide(sums, T), lse], -1), state
    divide(sums, T, out[..., :-1])
    out[..., -1:] = lse
    return out, state


def windowed_plan(
    segment: Callable[..., Any],
    block: int,
    width: int,
    given: dict[str, Any],
    reach: dict[str, Reach],
    held: int | None = None,
) -> Plan:
    """A plan of an op over windows: segment(rows, state, out, view=, **inputs) on blocks of queries.

    given: the op's arguments by name, without any that only the segment knows; reach as `Plan` has it, of those beside
    keys and sinks. held: how many keys a block sees beside its window, among them some that have left it.
    """
    inputs = dict(given)
    state, window, scale, softcap = (inputs.pop(n) for n in ("state", "window", "scale", "softcap"))
    q, k = inputs["q"], inputs["k"]
    first, window = k.shape[1] - q.shape[1], cast(int, torch.sym_min(window, k.shape[1]))
    size = cast(int, torch.sym_min(block, q.shape[1]))
    # Keys from `window` before a query on; where it is not among them, it and what it sees begin further back.
    keys = first - window, first
    reaches = {**reach, "k": keys, "v": keys, "rest": keys, "sink_k": None, "sink_v": None, "sink_column": None}
    near = lazy_near(q, window, block, behind=held is not None)
    body = partial(segment, view=View(near, size, first, scale, softcap))
    return Plan(body, rows_at_once(q, window + block + (held or 0), block), width, q, state, inputs, reaches)


def _plan(*, with_lse: bool, **given) -> Plan:
    width = given["v"].shape[-1] + with_lse
    return windowed_plan(partial(_segment, with_lse=with_lse), BLOCK, width, given, {})


_window = define(
    "window",
    "Tensor q, Tensor k, Tensor v, Tensor sink_k, Tensor sink_v, Tensor sink_column, Tensor rest, Tensor state, "
    "int window, float scale, float softcap, bool with_lse",
    _plan,
)


def window_attention(x: AttentionInputs, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """o [B,T,HQ,V] in the dtype of q, and lse [B,T,HQ] in float32 or float64, or None."""
    dtype, (B, T) = x.q.dtype, x.q.shape[:2]
    work = work_dtype(x.q)
    if T == 0 or B == 0:
        lse = x.q.new_zeros(x.q.shape[:3], dtype=work) if with_lse else None
        return x.q.new_zeros(*x.q.shape[:3], x.v.shape[-1]), lse
    q, k, v = x.q.to(work), x.k.to(work), x.v.to(work)
    held, rest = take_sinks(k, v, x.sinks, x.visible)
    tensors = dict(q=q, k=k, v=v, sink_k=held.k, sink_v=held.v, sink_column=held.column, rest=rest)
    more = dict(window=x.window, scale=x.scale, softcap=x.softcap, with_lse=with_lse)
    o, _ = _window(**tensors, state=q.new_zeros(0), **more)
    if not with_lse:
        return o.to(dtype), None
    return o[..., :-1].to(dtype, copy=True, memory_format=torch.contiguous_format), o[..., -1].contiguous()
