"""Which tokens stay exact beyond the window, by their scores: a running top R, a block of arrivals at a time.

Shapes: B batch, T arrivals, H key/value heads, R tokens recalled at once, S = R + T candidates, those held from before
first and all in the order of time; N blocks of C arrivals.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from liger_ops._inputs import AttentionInputs, Recalled


class Membership(NamedTuple):
    """members [B,N*R,H]: the candidates that each block starts with; kept [B,R,H] those after the last one, in order.

    lost [B,S,H]: the arrival, counted from 0, from which on a candidate is recalled no more; T if it stays, 0 if it is
    none. losers [B,T,H]: the candidate that each arrival makes lose its place, itself maybe; enters [B,T,H] whether
    there is one.
    """

    members: torch.Tensor
    kept: torch.Tensor
    lost: torch.Tensor
    losers: torch.Tensor
    enters: torch.Tensor


def _ranks(score: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """score, there [B,H,S] -> candidates from the lowest on, and the place of each: of equal ones the later is higher.

    What is not there is lower than all that is.
    """
    order = torch.where(there, score, -torch.inf).sort(dim=-1, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(-1, order, places)


def _contest(slots: torch.Tensor, arrivals: torch.Tensor) -> torch.Tensor:
    """Ranks slots [...,R], which it changes, and arrivals [...,C] -> the rank [...,C] that each arrival drives out."""
    lost = torch.empty_like(arrivals)
    for new, out in zip(arrivals.unbind(-1), lost.unbind(-1), strict=True):
        low, place = slots.min(-1, keepdim=True)
        torch.minimum(low.squeeze(-1), new, out=out)
        slots.scatter_(-1, place, torch.maximum(low, new.unsqueeze(-1)))
    return lost


def _starts(first: torch.Tensor, arrivals: torch.Tensor) -> torch.Tensor:
    """Ranks first [...,R] and arrivals [...,N,C] -> the R highest before each block and behind the last [...,N+1,R]."""
    R, starts = first.shape[-1], [first]
    for new in arrivals.unbind(-2):
        starts.append(torch.cat([starts[-1], new], -1).topk(R, sorted=False).values)
    return torch.stack(starts, -2)


def _starts_at_once(first: torch.Tensor, arrivals: torch.Tensor) -> torch.Tensor:
    """`_starts` in as many steps as N has binary digits, each over all blocks: more work, and far fewer launches."""
    R, C = first.shape[-1], arrivals.shape[-1]
    own = F.pad(arrivals, (0, R - C), value=-1) if C < R else arrivals.topk(R, sorted=False).values
    # What block i and those before it have brought, 1, 2, 4 .. of them.
    found, reach = torch.cat([first.unsqueeze(-2), own], -2), 1
    while reach < found.shape[-2]:
        both = torch.cat([found[..., reach:, :], found[..., :-reach, :]], -1)
        found = torch.cat([found[..., :reach, :], both.topk(R, sorted=False).values], -2)
        reach *= 2
    return found


@torch.library.custom_op(
    "liger_ops::recall",
    mutates_args=(),
    schema=f"(Tensor score, Tensor there, int recall, int block) -> ({', '.join(['Tensor'] * 5)})",
)
def _recall(score, there, recall, block):
    R, C, T = recall, block, score.shape[1] - recall
    N, there = -(-T // C), there.transpose(1, 2)
    order, rank = _ranks(score.transpose(1, 2), there)
    # What fills the last block is below all others, and drives out nobody.
    arrivals = F.pad(rank[..., R:], (0, N * C - T), value=-1).unflatten(-1, (N, C))
    starts = (_starts_at_once if rank.is_cuda else _starts)(rank[..., :R], arrivals)
    losers = order.gather(-1, _contest(starts[:, :, :-1].clone(), arrivals).flatten(2)[..., :T])
    arrival = torch.arange(T, device=rank.device).expand_as(losers)
    lost = torch.full_like(rank, T).scatter_(-1, losers, arrival).masked_fill_(~there, 0)
    kept = order.gather(-1, starts[:, :, -1]).sort(-1).values
    members = order.gather(-1, starts[:, :, :-1].flatten(2))
    found = members, kept, lost, losers, there.gather(-1, losers)
    return tuple(x.transpose(1, 2).contiguous() for x in found)


@_recall.register_fake
def _(score, there, recall, block):
    B, S, H = score.shape
    lengths = (-(-(S - recall) // block) * recall, recall, S, S - recall)
    counts = [torch.empty(B, n, H, dtype=torch.long, device=score.device) for n in lengths]
    return (*counts, torch.empty_like(counts[-1], dtype=torch.bool))


def membership(score: torch.Tensor, there: torch.Tensor, recall: int, block: int) -> Membership:
    """Of S = R + T candidates, score and there [B,S,H], R = recall and blocks of `block` arrivals. T >= 1."""
    return Membership(*_recall(score.detach(), there, recall, block))


def _far(x: AttentionInputs, there: torch.Tensor) -> torch.Tensor:
    """Of the T tokens that leave the window what Recalled keeps as far [B,T,H,F]; there [B,T] marks those that may."""
    assert x.k_log is not None and x.score is not None
    (B, T, H, _), dtype = x.k_log.shape, x.k_log.dtype
    # Below all that is not there is nothing.
    score = x.score.detach().clamp(min=torch.finfo(x.score.dtype).min).to(dtype).unsqueeze(-1)
    mark = there.to(dtype).view(B, T, 1, 1).expand(B, T, H, 1)
    return torch.cat([x.k_log, score, mark] if x.g is None else [x.k_log, x.g.view(B, T, H, -1), score, mark], -1)


def _arrived(x: AttentionInputs, there: torch.Tensor) -> Recalled:
    """The T tokens that leave the window, of which there [B,T] marks those which are tokens, and no sinks."""
    T, S = x.q.shape[1], x.k.shape[1]
    left = slice(S - T - x.window, S - x.window)
    return Recalled(x.k[:, left], x.v[:, left], _far(x, there))


def _split(x: AttentionInputs, far: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """k_log and g of what Recalled keeps as far."""
    assert x.k_log is not None
    M = x.k_log.shape[-1]
    return far[..., :M], None if x.g is None else far[..., M] if x.g.ndim == 3 else far[..., M : 2 * M]


def _places(index: torch.Tensor) -> torch.Tensor:
    """index [B,N,H] of a token of each head -> its place among all heads of all tokens of its row."""
    H = index.shape[-1]
    return index * H + torch.arange(H, device=index.device)


def _take(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x [B,S,H,D] at places [B,N,H] -> [B,N,H,D], in whole rows, which is far faster than element by element."""
    # Not by len, which a trace would hold for the only batch there is.
    B, S, H = x.shape[:3]
    rows = torch.arange(B, device=x.device).view(-1, 1, 1) * (S * H) + places
    # Unlike that of index_select, its gradient has the same bits in every run on a GPU.
    return F.embedding(rows, x.reshape(B * S * H, -1))


def recalling(x: AttentionInputs, there: torch.Tensor, block: int) -> tuple[dict[str, torch.Tensor | None], Recalled]:
    """What the joint op takes in place of k_log and g and beside them, and what a state keeps afterwards."""
    assert x.recalled is not None
    candidates = Recalled(*(torch.cat(pair, 1) for pair in zip(x.recalled, _arrived(x, there), strict=True)))
    score, marks = candidates.far[..., -2].detach(), candidates.far[..., -1].detach() > 0
    R = x.recalled.k.shape[1]
    found = membership(score, marks, R, block)
    losers, members, kept = map(_places, (found.losers, found.members, found.kept))
    k_log, g = _split(x, _take(candidates.far, losers))
    given = dict(
        k_log=k_log,
        g=g,
        enters=found.enters,
        left_v=_take(candidates.v, losers),
        left_lost=found.lost[:, R:],
        held_k=_take(candidates.k, members),
        held_v=_take(candidates.v, members),
        held_lost=found.lost.gather(1, found.members),
    )
    return given, Recalled(*(_take(y, kept) for y in candidates))


class Step(NamedTuple):
    """What a single query sees: k [B,S+R,H,D] and v [B,S+R,H,V], shown [B,H,1,S+R] or not.

    k_log [B,H,M], g, value [B,H,V] and enters [B,H] are of the token that enters the recurrence, if there is one.
    """

    k: torch.Tensor
    v: torch.Tensor
    shown: torch.Tensor
    k_log: torch.Tensor
    g: torch.Tensor | None
    value: torch.Tensor
    enters: torch.Tensor
    recalled: Recalled


def step(x: AttentionInputs, enters: torch.Tensor, near: torch.Tensor) -> Step:
    """Of T = 1, where near [B,1,1,S] shows without recall, and enters [B,1] marks an arrival that is no sink.

    A token decoded notices each operation here.
    """
    assert x.recalled is not None
    (held_k, held_v, far), arrival, (B, _, H) = x.recalled, x.k.shape[1] - x.window - 1, x.k.shape[:3]
    R = held_k.shape[1]
    # Candidates side by side, the arrival last.
    k = torch.cat([x.k[:, :arrival], held_k, x.k[:, arrival:]], 1)
    v = torch.cat([x.v[:, :arrival], held_v, x.v[:, arrival:]], 1)
    far = torch.cat([far, _far(x, enters)], 1)
    marks = far[..., -1] > 0
    # The first of equal ones: the later a token, the longer it stays.
    loser = torch.where(marks, far[..., -2], -torch.inf).argmin(1, keepdim=True)
    order = torch.arange(R + 1, device=k.device).view(1, -1, 1)
    order = order + (order >= loser)
    # Those that stay, in order, then the one that does not.
    order[:, R:] = loser
    of_far = _places(order)
    of_keys = of_far + arrival * H
    if B > 1:
        row = torch.arange(B, device=k.device).view(-1, 1, 1)
        of_far, of_keys = of_far + row * (far.shape[1] * H), of_keys + row * (k.shape[1] * H)
    of_far, of_keys = of_far.flatten(), of_keys.flatten()
    k_after, v_after, far_after = (
        y.view(-1, y.shape[-1]).index_select(0, rows).view(B, R + 1, H, -1)
        for y, rows in ((k, of_keys), (v, of_keys), (far, of_far))
    )
    shows = marks.scatter_(1, loser, False).transpose(1, 2).unsqueeze(2)
    near = near.expand(-1, H, -1, -1)
    # A sink that leaves the window shows as before.
    here = near[..., arrival : arrival + 1] | shows[..., R:]
    near = torch.cat([near[..., :arrival], shows[..., :R], here, near[..., arrival + 1 :]], -1)
    gone = far_after[:, R]
    k_log, g = _split(x, gone)
    after = Recalled(k_after[:, :R], v_after[:, :R], far_after[:, :R])
    return Step(k, v, near, k_log, g, v_after[:, R], gone[..., -1] > 0, after)
