"""Blocked causal window attention with sinks: cost linear in T, with the log-sum-exp of every row.

Shapes: B batch, T queries, S keys (the queries are the last T of them), HQ query heads, H key/value heads, G query
heads per key/value head, D width, W window, P sinks, N blocks of C queries, L = W - 1 + C keys in reach of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

_BLOCK = 32
SEGMENT = 512
_MASKED = -1e30


class Sinks(NamedTuple):
    """The first visible keys of each row: k [B,H,P,D], v [B,H,P,V], column [B,P] (S where a row has fewer)."""

    k: torch.Tensor
    v: torch.Tensor
    column: torch.Tensor


def take_sinks(
    k: torch.Tensor, v: torch.Tensor, count: int, visible: torch.Tensor | None
) -> tuple[Sinks, torch.Tensor]:
    """The sinks of k [B,S,H,D], v [B,S,H,V], and the mask [B,S] of the keys left to the window."""
    B, S, H = k.shape[:3]
    columns = torch.arange(S, device=k.device).expand(B, S)
    rest = torch.ones(B, S, dtype=torch.bool, device=k.device) if visible is None else visible
    column = columns[:, : min(count, S)]
    if visible is not None and count:
        seen = torch.where(visible, columns, S)
        column = seen.topk(min(count, S), dim=1, largest=False, sorted=True).values
    column = F.pad(column, (0, count - column.shape[1]), value=S)
    if count:
        last = column.masked_fill(column == S, -1).amax(1, keepdim=True)
        rest = rest & (columns > last)
    index = column.clamp(max=max(S - 1, 0))[:, :, None, None].expand(-1, -1, H, -1)
    picked = (x.gather(1, index.expand(-1, -1, -1, x.shape[-1])).transpose(1, 2) for x in (k, v))
    return Sinks(*picked, column), rest


def _blocks(x: torch.Tensor, sinks: torch.Tensor, count: int, size: int, length: int) -> torch.Tensor:
    """[B,H,(count-1)*size+length,D] and [B,H,P,D] -> [B,H,count,P+length,D]: the sinks, then a block's reach."""
    x = x.unfold(2, length, size).transpose(-1, -2)
    return torch.cat([sinks.unsqueeze(2).expand(-1, -1, count, -1, -1), x], 3)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rest: torch.Tensor,
    sinks: Sinks,
    start: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,D] whose first query stands at column `start`, over the W - 1 + T keys that end with its last one.

    k [B,W-1+T,H,D], v, rest [B,W-1+T] -> o [B,T,HQ,V], lse [B,T,HQ].
    """
    B, T, HQ, _ = q.shape
    H, window, C = k.shape[2], k.shape[1] - T + 1, min(_BLOCK, T)
    N, L = -(-T // C), window - 1 + C
    G, short = HQ // H, -(-T // C) * C - T
    if short:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, short)) for x in (q, k, v))
        rest = F.pad(rest, (0, short))
    r, c = torch.arange(C, device=q.device)[:, None], torch.arange(L, device=q.device)[None]
    near = (c >= r) & (c < r + window) & rest.unfold(1, L, C)[:, :, None]
    rows = torch.arange(start, start + N * C, device=q.device).view(1, N, C, 1)
    open_ = torch.cat([sinks.column[:, None, None] <= rows, near], -1)
    bias = q.new_zeros(()).masked_fill(~open_, _MASKED)[:, None, :, None]

    q = q.view(B, N, C, H, G, -1).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)
    k = _blocks((k * scale).transpose(1, 2), sinks.k * scale, N, C, L)
    v = _blocks(v.transpose(1, 2), sinks.v, N, C, L)
    scores = (q @ k.transpose(-1, -2)).unflatten(3, (G, C)).add_(bias).flatten(3, 4)
    p = scores.softmax(-1)
    # The largest weight never underflows, and this is cheaper than a second pass of exponentials.
    lse = scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    o, lse = (x.unflatten(3, (G, C)).permute(0, 2, 4, 1, 3, 5).reshape(B, N * C, HQ, -1)[:, :T] for x in (p @ v, lse))
    return o, lse.squeeze(-1)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int,
    scale: float,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V], visible [B,S] bool -> o [B,T,HQ,V], lse [B,T,HQ] in float32."""
    dtype, T, S = q.dtype, q.shape[1], k.shape[1]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if T == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(q.shape[:3], dtype=work)
    q, k, v = q.to(work), k.to(work), v.to(work)
    window = min(window, S)
    held, rest = take_sinks(k, v, sinks, visible)
    lead = max(T + window - 1 - S, 0)
    if lead:
        k, v, rest = F.pad(k, (0, 0, 0, 0, lead, 0)), F.pad(v, (0, 0, 0, 0, lead, 0)), F.pad(rest, (lead, 0))
    first = S + lead - T - window + 1
    parts = []
    for s in range(0, T, SEGMENT):
        e = min(s + SEGMENT, T)
        keys = slice(first + s, first + e + window - 1)
        parts.append(attend(q[:, s:e], k[:, keys], v[:, keys], rest[:, keys], held, S - T + s, scale))
    o, lse = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return o.to(dtype), lse
