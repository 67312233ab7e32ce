"""Chunks outermost, so that a scan steps through one block, and query heads before tokens, so that scores are square.

Shapes: B batch, T time, H key/value heads, G query heads per key/value head, N chunks of C tokens, K key width, V value
width: q [N,B,H,G,C,K], k [N,B,H,C,K], v [N,B,H,C,V], states [N+1,B,H,K,V].
"""

import itertools

import torch
import torch.nn.functional as F

# A matrix of chunks starts at a multiple of 64 bytes if this divides its size: kernels of products choose by that, and
# so would round one batch row in another way than the next.
ALIGNED = 16


def rows(chunk: int, length: int) -> int:
    """Rows of a chunk: `chunk` of them, or `length` if that is less, rounded up to what is aligned."""
    return -(-min(chunk, length) // ALIGNED) * ALIGNED


def chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B,T,...] -> a view [B,N,C,...] if T is a multiple of C, of a zero-padded copy otherwise."""
    short = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short)) if short else x
    return x.unflatten(1, (-1, size))


def outermost(x: torch.Tensor) -> torch.Tensor:
    """[B,N,C,H,...] -> [N,B,H,C,...], and [B,N,C,H,G,D] -> [N,B,H,G,C,D], a view."""
    return x.permute(1, 0, 3, 4, 2, 5) if x.ndim == 6 else x.permute(1, 0, 3, 2, *range(4, x.ndim))


def fill(out: torch.Tensor, x: torch.Tensor, scale: float = 1.0) -> None:
    """out [B,T,H,...] = x * scale, x as `outermost` has it, without its padding."""
    time = 4 if x.ndim == 6 else 3
    size, T = x.shape[time], out.shape[1]
    whole, rest = T // size, T % size
    torch.mul(x[:whole], scale, out=outermost(out[:, : whole * size].unflatten(1, (whole, size))))
    if rest:
        torch.mul(x[whole:].narrow(time, 0, rest), scale, out=outermost(out[:, whole * size :].unsqueeze(1)))


def packed(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def matrices(x: torch.Tensor) -> torch.Tensor:
    """[N,B,H,...] -> one batch of matrices; query heads of a key head count as rows."""
    return (x.flatten(3, 4) if x.ndim == 6 else x).flatten(0, 2)


def causal_products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[N,B,H,G,C,C], zero where a key comes after its query, whatever was there: infinite, not a number."""
    return torch.bmm(matrices(q), matrices(k).transpose(1, 2)).view(*q.shape[:5], -1).tril_()


def states(
    x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor | None, state: torch.Tensor, reverse: bool = False
) -> torch.Tensor:
    """x^T y of each chunk, like keys and values, and `keep` [N,B,H,1 or K,1] of the state beside it.

    The states around chunks [N+1,B,H,K,V], from `state` before the first to the end, or from behind the last back.
    """
    found = x.new_empty(len(x) + 1, *state.shape)
    start, rest = (found[-1], found[:-1]) if reverse else (found[0], found[1:])
    start.copy_(state)
    torch.bmm(matrices(x).transpose(1, 2), matrices(y), out=rest.flatten(0, 2))
    order = -1 if reverse else 1
    each = found.unbind()[::order]
    if keep is None:
        for old, new in itertools.pairwise(each):
            new += old
    else:
        for (old, new), kept in zip(itertools.pairwise(each), keep.unbind()[::order], strict=True):
            new.addcmul_(kept, old)
    return found
