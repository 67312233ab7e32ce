"""Copies between [batch, time, heads, width] and the layouts that the chunked products want, all of them contiguous.

Shapes: B batch, T time, HQ query heads, H key/value heads, G query heads per key/value head, D width, N chunks of C.
Every function that packs returns a copy, even where the layout is already right: callers work on it in place.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F


def full_precision(function: Callable) -> Callable:
    """The function out of reach of autocast, which would halve the precision of some of its products and not of others.

    Its first tensor tells the device, an argument or a field of a record.
    """

    @wraps(function)
    def call(*args, **kwargs):
        first = next(x for x in (args or kwargs.values()) if isinstance(x, (torch.Tensor, tuple)))
        device = (first if isinstance(first, torch.Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call


def pack(x: torch.Tensor, num_kv_heads: int, size: int) -> torch.Tensor:
    """[B,T,HQ,D] -> [B,H,N,C,G,D], zero-padded."""
    T, N = x.shape[1], -(-x.shape[1] // size)
    x = x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
    x = F.pad(x, (0, 0, 0, 0, 0, N * size - T)) if N * size > T else x
    return x.clone(memory_format=torch.contiguous_format).unflatten(2, (N, size))


def unpack(x: torch.Tensor, length: int) -> torch.Tensor:
    """[B,H,N,C,G,D] -> a view [B,T,H,G,D]."""
    return x.flatten(2, 3).transpose(1, 2)[:, :length]


def head_major(x: torch.Tensor, after: int) -> torch.Tensor:
    """[B,T,H,...] -> [B,H,T+after,...], zero-padded."""
    x = x.transpose(1, 2)
    x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, after)) if after else x
    return x.clone(memory_format=torch.contiguous_format)


def head_major_ones(v: torch.Tensor, after: int) -> torch.Tensor:
    """[B,T,H,V] -> [B,H,T+after,V+1]: the last column is 1 and sums the weights; so is the padding."""
    return F.pad(v.transpose(1, 2), (0, 1, 0, after), value=1.0).contiguous()


def side_by_side(
    cu_seqlens: torch.Tensor, longest: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor] | None:
    """Packed [1,T,...] -> a row for each sequence [N,L,...], zeros behind it, and every token's place [T] in there.

    None for fewer than two sequences, one above `longest`, and lengths so uneven that zeros would be most of it.
    """
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    N, T = len(lengths), int(cu_seqlens[-1])
    L = int(lengths.max()) if N > 1 else T
    if N < 2 or longest < L or N * L > 2 * T:
        return None
    time = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.repeat_interleave(lengths)
    place = time - cu_seqlens[sequence] + L * sequence

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(N * L, *x.shape[2:]).index_copy(0, place, x.squeeze(0)).unflatten(0, (N, L))

    return rows, place
