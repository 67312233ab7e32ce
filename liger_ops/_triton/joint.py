"""The joint softmax on chunks: states of what left the window first, then every chunk by itself.

Shapes: B batch, T queries, S keys, HQ = G * H query heads, H key/value heads, D width, M features, V value width,
W window, P sinks, C rows of a chunk.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from triton import cdiv

from liger_ops._triton import decays, joint_far_gradients, joint_gradients, joint_outputs, joint_states, states
from liger_ops._triton.additive import CHAINS, PIECE
from liger_ops._triton.launch import Chunks, Pieces, block, equal_chunks, launch, make_pieces, precision

# Query heads of a group, if it is even, that one program takes.
_TOGETHER = {"joint_kernel": 2, "queries_kernel": 1}
# Keys that one program takes of a window's, and chunks of them that an inner step of a wide window does.
_KEYS, _STEP, _WIDE = 64, 1, 512
# Whether what is near in the chunk that leaves has a product of its own.
_APART = False
# Chunks of queries whose sums for the sinks one program makes.
_SUMMED = 8


class Far(NamedTuple):
    """What left the window: q_log [B,T,HQ,M], k_log [B,T,H,M], mix [HQ], factors to, behind [B,T,H] and e [B,T,H,C]."""

    q_log: torch.Tensor
    k_log: torch.Tensor
    mix: torch.Tensor
    to: torch.Tensor
    behind: torch.Tensor
    e: torch.Tensor


class Call(NamedTuple):
    """Contiguous q [B,T,HQ,D], k [B,S,H,D], v [B,S,H,V], the sinks' columns [B,P], rest [B,S], what kernels share.

    rest marks the keys that are neither hidden nor sinks. Without a far part, far holds tensors that nobody reads.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    column: torch.Tensor
    rest: torch.Tensor
    far: Far
    chunks: Chunks
    pieces: Pieces | None
    window: int
    scale: float
    constants: dict

    @property
    def heads(self) -> tuple[int, int]:
        """H and G."""
        return self.k.shape[2], self.q.shape[2] // self.k.shape[2]

    @property
    def lengths(self) -> tuple[int, int, int]:
        """T, S and W."""
        return self.q.shape[1], self.k.shape[1], self.window

    @property
    def widths(self) -> tuple[int, int, int]:
        """D, M and V."""
        return self.q.shape[3], self.far.q_log.shape[3], self.v.shape[3]


def prepare(q, k, v, far, column, rest, window, scale) -> Call:
    """far: q_log, k_log, g and mix, or None."""
    (B, T, _, D), H = q.shape, k.shape[2]
    C = 64 if q.dtype == torch.bfloat16 else 32
    q, k, v, column, rest = (x.contiguous() for x in (q, k, v, column, rest.view(torch.int8)))
    where, gated = equal_chunks(B, T, C, q.device), far is not None and far[2] is not None
    few = far is not None and B * H <= CHAINS and 2 * PIECE <= T
    pieces = _equal_pieces(B, T, PIECE, C, q.device) if few else None
    # With tf32, Triton 3.6 lets Hopper's matrix units read beyond a kernel's shared memory.
    how = precision(q.dtype) if q.dtype == torch.bfloat16 else "ieee"
    constants = dict(C=C, PER_CHANNEL=False, GATED=gated, FAR=far is not None, PRECISION=how)
    constants |= dict(BD=block(D, 128), BP=block(column.shape[1], 128) if column.shape[1] else 0)
    if far is None:
        far = Far(q, q, q, q, q, q)
    else:
        q_log, k_log, g, mix = far
        factors = _decays(g, where.chunks, constants) if gated else (k_log,) * 3
        far = Far(q_log.contiguous(), k_log.contiguous(), mix.contiguous(), *factors)
    return Call(q, k, v, column, rest, far, where, pieces, window, scale, constants)


def _equal_pieces(B, T, most, C, device) -> Pieces:
    """The pieces of B sequences of T tokens; kept as `equal_chunks` are."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (_kept_pieces.__wrapped__ if capturing else _kept_pieces)(B, T, most, C, device)


@functools.lru_cache(64)
def _kept_pieces(B, T, most, C, device) -> Pieces:
    return make_pieces(equal_chunks(B, T, C, device).sequences, B * T, most, C)


def _decays(g, table, constants) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g, (H, C) = g.float().contiguous(), (g.shape[2], constants["C"])
    to, behind, e = torch.empty_like(g), torch.empty_like(g), g.new_empty(*g.shape, C)
    args = g, to, behind, e, g, table, H, 1
    launch(decays.decays_kernel, lambda _: (len(table), H), 1, 1, *args, **constants, R=16)
    return to, behind, e


def make_states(x: Call, first) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h [chunks,H,M,V] and z [chunks,H,M] that chunks start from, and the last state [B,H,M,V+1]."""
    return _states(x, x.far.k_log, x.v, (x.far.mix,) * 3, first.contiguous(), False)


def _states(x: Call, logs, v, rows, first, reverse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows: top, lse and delta [B,T,HQ], which only the reverse reads."""
    (H, _), (_, M, V), count = x.heads, x.widths, len(x.chunks.chunks)
    h = first.new_empty(count, H, M, V, dtype=torch.bfloat16 if x.v.dtype == torch.bfloat16 else torch.float32)
    z, last = first.new_empty(count, H, M), torch.empty_like(first)

    def run(first, last, sequences, total=None):
        part = total is not None
        args = logs, v, *rows, x.far.mix, x.rest, x.far.to, x.far.behind, first, h, z, last, total if part else z
        sizes = sequences, *x.lengths, H, logs.shape[2] // H, M, V
        constants = dict(x.constants, REVERSE=reverse, PART=part)
        launch(joint_states.far_states_kernel, grid(len(sequences), V), M, V, *args, *sizes, **constants)

    def grid(count, width):
        return lambda c: (count * H, cdiv(M, c.BK), cdiv(width, c.BV))

    if x.pieces is None:
        run(first, last, x.chunks.sequences)
        return h, z, last
    bounds, owned = x.pieces
    part, start = (first.new_empty(len(bounds), H, M, V + 1) for _ in range(2))
    total = first.new_empty(len(bounds), H, 1)
    run(part, part, bounds, total)
    args = part, total, first, start, last, owned, H, M, V + 1, 1
    launch(states.joins_kernel, grid(len(first), V + 1), M, V + 1, *args, **x.constants, REVERSE=reverse)
    run(start, part, bounds)
    return h, z, last


def _by_heads(x: Call, kernel, *args, **constants) -> None:
    """Launches a kernel for every chunk and head of the query, or two heads where registers allow it."""
    (H, G), (_, M, V) = x.heads, x.widths
    heads = 1 if G % 2 or x.constants["PRECISION"] == "ieee" else _TOGETHER[kernel.fn.__name__]
    count = H * G // heads * len(x.chunks.chunks)
    launch(kernel, lambda _: (count,), M, V, *args, **x.constants, **constants, HEADS=heads)


def forward(x: Call, state) -> tuple[torch.Tensor, ...]:
    """o [B,T,HQ,V], the last state [B,H,M,V+1], and of every row the largest score nearby and the log of all weights.

    Logs to base 2 [B,T,HQ]. Then the states h and z that chunks start from, for the backward pass. Without a far part
    the state stays as it is and there are none.
    """
    o = x.q.new_empty(*x.q.shape[:3], x.v.shape[3])
    top, lse = (x.q.new_empty(x.q.shape[:3], dtype=torch.float32) for _ in range(2))
    h, z, last = make_states(x, state) if x.constants["FAR"] else (x.q, x.q, state)
    far = x.far
    args = x.q, x.k, x.v, far.q_log, far.k_log, far.to, far.e, h, z, x.rest, x.column, far.mix, o, top, lse
    sizes = x.scale, *x.lengths, *x.heads, *x.widths, x.column.shape[1]
    step = _STEP if x.window >= _WIDE and x.constants["PRECISION"] != "ieee" else 1
    _by_heads(x, joint_outputs.joint_kernel, *args, *sizes, STEP=step, APART=_APART)
    return o, last, top, lse, h, z


def backward(x: Call, h, z, do, dstate, o, top, lse) -> list[torch.Tensor | None]:
    """The gradients of q, k, v and, with a far part, of q_log, k_log, g or None, mix and state."""
    do, far = do.contiguous(), x.constants["FAR"]
    rows = top, lse, torch.empty_like(lse)
    dq, dq_log, d_mix, d_to = _queries(x, h, z, rows, o.contiguous(), do)
    dk, dv = _near(x, *rows[1:], do)
    if x.column.shape[1]:
        _sinks(x, *rows[1:], do, dk, dv)
    if not far:
        return [dq, dk, dv]
    dh, dz, dfirst = _states(x, x.far.q_log, do, rows, dstate.contiguous(), True)
    dk_log, d_behind, straddle = _far_keys(x, h, z, dh, dz, rows, do)
    within = _far_values(x, dh, rows, do, dv)
    dg = _gates(x, d_to, d_behind, straddle, within) if x.constants["GATED"] else None
    return [dq, dk, dv, dq_log, dk_log, dg, d_mix.sum((0, 1)), dfirst]


def _queries(x: Call, h, z, rows, o, do) -> tuple[torch.Tensor, ...]:
    """dq, dq_log and, of each row [B,T,HQ], the gradient of its mix and of the log of what the state gives it.

    It also fills the third of the rows, delta.
    """
    top, lse, delta = rows
    far, dq = x.far, torch.empty_like(x.q)
    dq_log = torch.empty_like(far.q_log) if x.constants["FAR"] else dq
    d_mix, d_to = (torch.empty_like(lse) for _ in range(2))
    args = x.q, x.k, x.v, far.q_log, far.k_log, far.to, far.e, h, z, x.rest, x.column, far.mix, top, lse, o, do
    sizes = x.scale, *x.lengths, *x.heads, *x.widths, x.column.shape[1]
    _by_heads(x, joint_gradients.queries_kernel, *args, delta, dq, dq_log, d_mix, d_to, *sizes)
    return dq, dq_log, d_mix, d_to


def _near(x: Call, lse, delta, do) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv of the keys of windows; 0 for the others."""
    (H, G), (D, _, V), (B, S) = x.heads, x.widths, x.k.shape[:2]
    keys = _KEYS if x.constants["PRECISION"] != "ieee" else x.constants["C"]
    dk, dv = torch.empty_like(x.k), torch.empty_like(x.v)
    args = x.q, x.k, x.v, x.rest, lse, delta, do, dk, dv, x.scale, *x.lengths, H, G, D, V
    constants = dict(x.constants, C=keys)
    launch(joint_gradients.near_kernel, lambda _: (H * B * cdiv(S, keys),), keys, V, *args, **constants)
    return dk, dv


def _sinks(x: Call, lse, delta, do, dk, dv) -> None:
    """Puts the gradients of the sinks, which no window has, into dk and dv."""
    (H, G), (D, _, V), (B, P), C = x.heads, x.widths, x.column.shape, x.constants["C"]
    T, S, _ = x.lengths
    count = cdiv(T, C * _SUMMED)
    parts = [lse.new_empty(B, count, H, P, width) for width in (D, V)]
    args = x.q, x.k, x.v, x.column, lse, delta, do, *parts, x.scale, T, S, H, G, D, V, P
    launch(joint_gradients.sinks_kernel, lambda _: (count * H * B,), D, V, *args, **x.constants, N=_SUMMED)
    # Of columns that a row has not got, zeros.
    index = x.column.clamp(max=S - 1)[:, :, None, None].expand(-1, -1, H, -1)
    for grad, part in zip((dk, dv), parts, strict=True):
        new = part.sum(1).transpose(1, 2).to(grad.dtype)
        grad.scatter_add_(1, index.expand(-1, -1, -1, new.shape[3]), new)


def _far_keys(x: Call, h, z, dh, dz, rows, do) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dk_log, and of the logs of what rows leave in the state [B,T,H], and of what stays in it [chunks,H]."""
    far, (H, G), (_, M, V), count = x.far, x.heads, x.widths, len(x.chunks.chunks)
    B, T, blocks = *x.q.shape[:2], cdiv(M, 16)
    dk_log, d_behind = torch.empty_like(far.k_log), do.new_empty(blocks, B, T, H, dtype=torch.float32)
    straddle = d_behind.new_empty(blocks, count, H)
    args = x.v, far.q_log, far.k_log, far.behind, far.e, h, z, dh, dz, x.rest, far.mix, *rows, do
    sizes = B, *x.lengths, H, G, M, V
    kernel = joint_far_gradients.far_keys_kernel
    config = launch(
        kernel, lambda c: (cdiv(M, c.BK) * H * count,), M, V, *args, dk_log, d_behind, straddle, *sizes, **x.constants
    )
    used = cdiv(M, config.BK)
    return dk_log, d_behind[:used].sum(0), straddle[:used].sum(0)


def _far_values(x: Call, dh, rows, do, dv) -> torch.Tensor:
    """Adds to dv; dg of pairs within chunks [B,T,H]."""
    far, (H, G), (_, M, V), count = x.far, x.heads, x.widths, len(x.chunks.chunks)
    dg = do.new_empty(*x.q.shape[:2], H, dtype=torch.float32)
    args = x.v, far.q_log, far.k_log, far.behind, far.e, dh, x.rest, far.mix, *rows, do, dv, dg
    kernel = joint_far_gradients.far_values_kernel
    launch(kernel, lambda _: (H * count,), M, V, *args, *x.lengths, H, G, M, V, **x.constants)
    return dg


def _gates(x: Call, d_to, d_behind, straddle, within) -> torch.Tensor:
    """dg [B,T,H]: the gate of a row decays what came before it on its way to this row and to later ones."""
    (B, T), (H, G), C = x.q.shape[:2], x.heads, x.constants["C"]
    N = cdiv(T, C)

    def chunked(y):
        return F.pad(y, (0, 0, 0, N * C - T)).view(B, N, C, H)

    later = chunked(d_to.view(B, T, H, G).sum(3)).flip(2).cumsum(2).flip(2)
    earlier = F.pad(chunked(d_behind).cumsum(2), (0, 0, 1, 0))[:, :, :C]
    ends = torch.arange(1, N + 1, device=d_to.device).mul_(C).clamp_(max=T).sub_(1)
    whole = (straddle.view(B, N, H) * x.far.to[:, ends]).unsqueeze(2)
    return (later + earlier + whole).flatten(1, 2)[:, :T] + within
