"""The joint softmax on chunks: states of what left the window first, then every chunk by itself.

Shapes: B batch, T queries, S keys, HQ = G * H query heads, H key/value heads, D width, M features, V value width,
W window, P sinks, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from triton import cdiv

from liger_ops._inputs import KernelAttentionInputs
from liger_ops._triton import decays, joint_far_gradients, joint_gradients, joint_outputs, joint_states, states
from liger_ops._triton.launch import (
    CHAINS,
    LAUNCHER,
    Chunks,
    Config,
    Launcher,
    Pieces,
    block,
    equal_chunks,
    equal_pieces,
)

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
    launcher: Launcher
    constants: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """B, T, S, W, H, G, D, M, V and P."""
        (B, T, HQ, D), (S, H) = self.q.shape, self.k.shape[1:3]
        sizes = dict(B=B, T=T, S=S, W=self.window, H=H, G=HQ // H, D=D, V=self.v.shape[3], P=self.column.shape[1])
        return sizes | dict(M=self.far.q_log.shape[3])

    @property
    def count(self) -> int:
        """Of chunks."""
        return len(self.chunks.chunks)

    @property
    def has_far(self) -> bool:
        return self.constants["FAR"]

    def launch(self, kernel: Any, grid: tuple | Callable[[Config], tuple[int, ...]], **more: Any) -> Config:
        """With everything that is here, by the names that kernels have for it, and `more` in its place or beside it."""
        named = dict(q=self.q, k=self.k, v=self.v, column=self.column, rest=self.rest, scale=self.scale)
        named |= self.far._asdict() | self.sizes | self.constants
        named |= dict(K=named["M"], chunks=self.chunks.chunks) | more
        where = grid if callable(grid) else lambda _: grid
        return self.launcher.launch(kernel, where, named)


class Rows(NamedTuple):
    """Of every query [B,T,HQ]: the largest score nearby and the log of all weights, both to base 2, and do . o."""

    top: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor


class States(NamedTuple):
    """h [chunks,H,M,V] and z [chunks,H,M] that chunks start from, and the last state [B,H,M,V+1]."""

    h: torch.Tensor
    z: torch.Tensor
    last: torch.Tensor


class Outputs(NamedTuple):
    """o [B,T,HQ,V], the last state [B,H,M,V+1], top and lse as `Rows` has them, h and z as `States`.

    Without a far part there are no states, and h and z are anything.
    """

    o: torch.Tensor
    last: torch.Tensor | None
    top: torch.Tensor
    lse: torch.Tensor
    h: torch.Tensor
    z: torch.Tensor


class Gradients(NamedTuple):
    """Of the tensors of the same names among `KernelAttentionInputs`; the first three of the window alone, the last
    three with recall."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_log: torch.Tensor | None = None
    k_log: torch.Tensor | None = None
    g: torch.Tensor | None = None
    mix: torch.Tensor | None = None
    state: torch.Tensor | None = None
    left_v: torch.Tensor | None = None
    held_k: torch.Tensor | None = None
    held_v: torch.Tensor | None = None


def prepare(x: KernelAttentionInputs, launcher: Launcher = LAUNCHER) -> Call:
    B, T, _, D = x.q.shape
    C = 64 if x.q.dtype == torch.bfloat16 else 32
    q, k, v, column, rest = (y.contiguous() for y in (x.q, x.k, x.v, x.column, x.rest.view(torch.int8)))
    where = equal_chunks(B, T, C, q.device)
    few = x.q_log is not None and B * k.shape[2] <= CHAINS and 2 * launcher.piece <= T
    pieces = equal_pieces(B, T, launcher.piece, C, q.device) if few else None
    # With tf32, Triton 3.6 lets Hopper's matrix units read beyond a kernel's shared memory.
    how = launcher.precision(q.dtype) if q.dtype == torch.bfloat16 else "ieee"
    constants = dict(C=C, PER_CHANNEL=False, GATED=x.g is not None, FAR=x.q_log is not None, PRECISION=how)
    constants |= dict(BD=block(D, 128), BP=block(column.shape[1], 128) if column.shape[1] else 0)
    call = Call(q, k, v, column, rest, Far(*[q] * 6), where, pieces, x.window, x.scale, launcher, constants)
    if x.q_log is None:
        return call
    logs = [y.contiguous() for y in (x.q_log, x.k_log, x.mix)]
    factors = [x.k_log] * 3 if x.g is None else _decays(call, x.g)
    return call._replace(far=Far(*logs, *factors))


def _decays(x: Call, g) -> list[torch.Tensor]:
    g = g.float().contiguous()
    to, behind, e = torch.empty_like(g), torch.empty_like(g), g.new_empty(*g.shape, x.constants["C"])
    given = dict(g=g, to=to, behind=behind, e=e, fine=g, KG=1, R=16)
    x.launch(decays.decays_kernel, (x.count, g.shape[2]), **given)
    return [to, behind, e]


def make_states(x: Call, first) -> States:
    return _states(x, x.far.k_log, x.v, Rows(*[x.far.mix] * 3), first.contiguous(), False)


def _states(x: Call, logs, v, rows: Rows, first, reverse: bool) -> States:
    """Only the reverse reads rows."""
    H, M, V = (x.sizes[n] for n in ("H", "M", "V"))
    h = first.new_empty(x.count, H, M, V, dtype=torch.bfloat16 if x.v.dtype == torch.bfloat16 else torch.float32)
    z, last = first.new_empty(x.count, H, M), torch.empty_like(first)

    def run(first, last, sequences, total=None):
        given = dict(logs=logs, v=v, first=first, h=h, z=z, last=last, total=z if total is None else total)
        given |= rows._asdict() | dict(sequences=sequences, R=logs.shape[2] // H, REVERSE=reverse)
        x.launch(joint_states.far_states_kernel, grid(len(sequences), V), **given, PART=total is not None)

    def grid(count, width):
        return lambda c: (count * H, cdiv(M, c.BK), cdiv(width, c.BV))

    if x.pieces is None:
        run(first, last, x.chunks.sequences)
        return States(h, z, last)
    bounds, owned = x.pieces
    part, start = (first.new_empty(len(bounds), H, M, V + 1) for _ in range(2))
    total = first.new_empty(len(bounds), H, 1)
    run(part, part, bounds, total)
    given = dict(part=part, total=total, first=first, start=start, last=last, pieces=owned, V=V + 1, KG=1)
    x.launch(states.joins_kernel, grid(len(first), V + 1), **given, REVERSE=reverse)
    run(start, part, bounds)
    return States(h, z, last)


def _by_heads(x: Call, kernel: Any, **given: Any) -> None:
    """Launches a kernel for every chunk and head of the query, or two heads where registers allow it."""
    G, H = x.sizes["G"], x.sizes["H"]
    heads = 1 if G % 2 or x.constants["PRECISION"] == "ieee" else _TOGETHER[kernel.fn.__name__]
    x.launch(kernel, (H * G // heads * x.count,), **given, HEADS=heads)


def forward(x: Call, state: torch.Tensor | None) -> Outputs:
    """Without a far part the state stays as it is."""
    o = x.q.new_empty(*x.q.shape[:3], x.v.shape[3])
    top, lse = (x.q.new_empty(x.q.shape[:3], dtype=torch.float32) for _ in range(2))
    h, z, last = make_states(x, state) if x.has_far else (x.q, x.q, state)
    step = _STEP if x.window >= _WIDE and x.constants["PRECISION"] != "ieee" else 1
    _by_heads(x, joint_outputs.joint_kernel, h=h, z=z, o=o, top=top, lse=lse, STEP=step, APART=_APART)
    return Outputs(o, last, top, lse, h, z)


def backward(x: Call, do: torch.Tensor, dstate: torch.Tensor | None, found: Outputs) -> Gradients:
    """do and dstate are the gradients of what `forward` has found."""
    do = do.contiguous()
    rows = Rows(found.top, found.lse, torch.empty_like(found.lse))
    dq, dq_log, d_mix, d_to = _queries(x, found, rows, do)
    dk, dv = _near(x, rows, do)
    if x.column.shape[1]:
        _sinks(x, rows, do, dk, dv)
    if not x.has_far:
        return Gradients(dq, dk, dv)
    back = _states(x, x.far.q_log, do, rows, dstate.contiguous(), True)
    dk_log, d_behind, straddle = _far_keys(x, found, back, rows, do)
    within = _far_values(x, back.h, rows, do, dv)
    dg = _gates(x, d_to, d_behind, straddle, within) if x.constants["GATED"] else None
    return Gradients(dq, dk, dv, dq_log, dk_log, dg, d_mix.sum((0, 1)), back.last)


def _queries(x: Call, found: Outputs, rows: Rows, do) -> tuple[torch.Tensor, ...]:
    """dq, dq_log and, of each row [B,T,HQ], the gradient of its mix and of the log of what the state gives it.

    It also fills rows.delta.
    """
    dq = torch.empty_like(x.q)
    dq_log = torch.empty_like(x.far.q_log) if x.has_far else dq
    d_mix, d_to = (torch.empty_like(rows.top) for _ in range(2))
    given = dict(o=found.o.contiguous(), do=do, h=found.h, z=found.z) | rows._asdict()
    given |= dict(dq=dq, dq_log=dq_log, d_mix=d_mix, d_to=d_to)
    _by_heads(x, joint_gradients.queries_kernel, **given)
    return dq, dq_log, d_mix, d_to


def _near(x: Call, rows: Rows, do) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv of the keys of windows; 0 for the others."""
    B, S, H, _ = x.k.shape
    keys = _KEYS if x.constants["PRECISION"] != "ieee" else x.constants["C"]
    dk, dv = torch.empty_like(x.k), torch.empty_like(x.v)
    given = dict(do=do, dk=dk, dv=dv, C=keys, K=keys) | rows._asdict()
    x.launch(joint_gradients.near_kernel, (H * B * cdiv(S, keys),), **given)
    return dk, dv


def _sinks(x: Call, rows: Rows, do, dk, dv) -> None:
    """Puts the gradients of the sinks, which no window has, into dk and dv."""
    (B, S, H, D), V, P = x.k.shape, x.v.shape[3], x.column.shape[1]
    count = cdiv(x.q.shape[1], x.constants["C"] * _SUMMED)
    parts = [rows.lse.new_empty(B, count, H, P, width) for width in (D, V)]
    given = dict(do=do, dk=parts[0], dv=parts[1], K=D, N=_SUMMED) | rows._asdict()
    x.launch(joint_gradients.sinks_kernel, (count * H * B,), **given)
    # Of columns that a row has not got, zeros.
    index = x.column.clamp(max=S - 1)[:, :, None, None].expand(-1, -1, H, -1)
    for grad, part in zip((dk, dv), parts, strict=True):
        new = part.sum(1).transpose(1, 2).to(grad.dtype)
        grad.scatter_add_(1, index.expand(-1, -1, -1, new.shape[3]), new)


def _far_keys(x: Call, found: Outputs, back: States, rows: Rows, do) -> tuple[torch.Tensor, ...]:
    """dk_log, and of the logs of what rows leave in the state [B,T,H], and of what stays in it [chunks,H]."""
    B, T, H, M = x.far.k_log.shape
    dk_log, d_behind = torch.empty_like(x.far.k_log), do.new_empty(cdiv(M, 16), B, T, H, dtype=torch.float32)
    straddle = d_behind.new_empty(cdiv(M, 16), x.count, H)
    given = dict(h=found.h, z=found.z, dh=back.h, dz=back.z, do=do) | rows._asdict()
    given |= dict(dk_log=dk_log, d_behind=d_behind, straddle=straddle)
    kernel = joint_far_gradients.far_keys_kernel
    config = x.launch(kernel, lambda c: (cdiv(M, c.BK) * H * x.count,), **given)
    used = cdiv(M, config.BK)
    return dk_log, d_behind[:used].sum(0), straddle[:used].sum(0)


def _far_values(x: Call, dh, rows: Rows, do, dv) -> torch.Tensor:
    """Adds to dv; dg of pairs within chunks [B,T,H]."""
    B, T, H, _ = x.far.k_log.shape
    dg = do.new_empty(B, T, H, dtype=torch.float32)
    given = dict(dh=dh, do=do, dv=dv, dg=dg) | rows._asdict()
    x.launch(joint_far_gradients.far_values_kernel, (H * x.count,), **given)
    return dg


def _gates(x: Call, d_to, d_behind, straddle, within) -> torch.Tensor:
    """dg [B,T,H]: the gate of a row decays what came before it on its way to this row and to later ones."""
    B, T, H, G, C = *(x.sizes[n] for n in ("B", "T", "H", "G")), x.constants["C"]
    N = cdiv(T, C)

    def chunked(y):
        return F.pad(y, (0, 0, 0, N * C - T)).view(B, N, C, H)

    later = chunked(d_to.view(B, T, H, G).sum(3)).flip(2).cumsum(2).flip(2)
    earlier = F.pad(chunked(d_behind).cumsum(2), (0, 0, 1, 0))[:, :, :C]
    ends = torch.arange(1, N + 1, device=d_to.device).mul_(C).clamp_(max=T).sub_(1)
    whole = (straddle.view(B, N, H) * x.far.to[:, ends]).unsqueeze(2)
    return (later + earlier + whole).flatten(1, 2)[:, :T] + within
