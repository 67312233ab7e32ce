"""The additive recurrence on chunks: states first, then every chunk by itself; forwards and backwards.

Shapes: B batch, T time, S = B * T tokens, N sequences, H key/value heads, HQ = G * H query heads, K key width,
V value width, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton import cdiv, next_power_of_2

from liger_ops._inputs import Gradients, RecurrenceInputs
from liger_ops._triton import decays, gradients, outputs, pairs, states
from liger_ops._triton.launch import (
    CHAINS,
    LAUNCHER,
    Chunks,
    Config,
    Launcher,
    Pieces,
    equal_chunks,
    make_chunks,
    make_pieces,
)

_ROWS = 16


def chunk_size(dtype: torch.dtype, wanted: int | None) -> int:
    """A power of two from 16 to 64, beyond which shared memory runs out.

    Unless told: 64, or 32 where products finer than tf32 fill registers.
    """
    return (64 if dtype == torch.bfloat16 else 32) if wanted is None else min(max(next_power_of_2(wanted), 16), 64)


class Decays(NamedTuple):
    """Factors of rows [S,H,1 or K], from the chunk's start and to its end; per head those of its pairs, e [S,H,C].

    Per channel fine [chunks,H,C//16]: in which blocks they may divide.
    """

    to: torch.Tensor
    behind: torch.Tensor
    e: torch.Tensor
    fine: torch.Tensor


class Call(NamedTuple):
    """Contiguous q [S,HQ,K], k [S,H,K], v [S,H,V], g [S,H,1 or K] or None, where chunks lie, and the constants.

    Without a gate no kernel reads decays, and they may be anything.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    scale: float
    decays: Decays
    chunks: Chunks
    pieces: Pieces | None
    launcher: Launcher
    constants: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """H, G, K, V and the width KG of g."""
        H, K = self.k.shape[1:]
        KG = 1 if self.g is None else self.g.shape[2]
        return dict(H=H, G=self.q.shape[1] // H, K=K, V=self.v.shape[2], KG=KG)

    @property
    def count(self) -> int:
        """Of chunks."""
        return len(self.chunks.chunks)

    @property
    def per_channel(self) -> bool:
        return self.constants["PER_CHANNEL"]

    def launch(self, kernel: Any, grid: tuple | Callable[[Config], tuple[int, ...]], **more: Any) -> Config:
        """With everything that is here, by the names that kernels have for it, and `more` in its place or beside it."""
        to, behind, e, fine = self.decays
        own = dict(q=self.q, k=self.k, v=self.v, g=self.g, scale=self.scale, chunks=self.chunks.chunks)
        named = {**own, "to": to, "behind": behind, "e": e, "fine": fine, **self.sizes, **self.constants, **more}
        where = grid if callable(grid) else lambda _: grid
        return self.launcher.launch(kernel, where, named)


def prepare(x: RecurrenceInputs, launcher: Launcher) -> Call:
    chunk, (B, T) = chunk_size(x.q.dtype, x.chunk), x.q.shape[:2]
    g = None if x.g is None else x.g.float().contiguous().view(B * T, x.k.shape[2], -1)
    q, k, v = (y.contiguous().flatten(0, 1) for y in (x.q, x.k, x.v))
    where = equal_chunks(B, T, chunk, q.device) if x.cu_seqlens is None else make_chunks(x.cu_seqlens, T, chunk)
    few = x.sequences * k.shape[1] <= CHAINS and 2 * launcher.piece * x.sequences <= B * T
    pieces = make_pieces(where.sequences, B * T, launcher.piece, chunk) if few else None
    constants = dict(C=chunk, R=_ROWS, GATED=g is not None, PER_CHANNEL=x.per_channel, ALONE=False, STRICT=False)
    constants |= dict(PRECISION=launcher.precision(q.dtype))
    call = Call(q, k, v, g, x.scale, Decays(q, q, q, q), where, pieces, launcher, constants)
    return call if g is None else call._replace(decays=_decays(call, g))


def _decays(x: Call, g: torch.Tensor) -> Decays:
    (S, H, _), C = g.shape, x.constants["C"]
    to, behind = torch.empty_like(g), torch.empty_like(g)
    e = g if x.per_channel else g.new_empty(S, H, C)
    fine = g.new_empty(x.count, H, C // _ROWS, dtype=torch.int32) if x.per_channel else g
    found = Decays(to, behind, e, fine)
    x.launch(decays.decays_kernel, (x.count, H), **found._asdict())
    return found


def _states(x: Call, k, v, first, scale=1.0, reverse=False) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that chunks start from [chunks,H,K,V], in either direction of time, and the last one.

    k [S,H*R,K] and v [S,H*R,V] are what enters.
    """
    H, K, V, KG = (x.sizes[n] for n in ("H", "K", "V", "KG"))
    kept = torch.bfloat16 if x.q.dtype == torch.bfloat16 else torch.float32
    h = k.new_empty(x.count, H, K, V, dtype=kept)
    last = torch.empty_like(first)

    def run(first, last, sequences, total=None):
        more = dict(k=k, v=v, first=first, h=h, last=last, sequences=sequences, scale=scale, REVERSE=reverse)
        more |= dict(total=x.q if total is None else total, PART=total is not None, R=k.shape[1] // H)
        x.launch(states.states_kernel, grid(len(sequences)), **more)

    def grid(count):
        return lambda c: (count * H, cdiv(K, c.BK), cdiv(V, c.BV))

    if x.pieces is None:
        run(first, last, x.chunks.sequences)
        return h, last
    bounds, owned = x.pieces
    part, start = (first.new_empty(len(bounds), H, K, V) for _ in range(2))
    total = first.new_empty(len(bounds), H, KG)
    run(part, part, bounds, total)
    more = dict(part=part, total=total, first=first, start=start, last=last, pieces=owned, REVERSE=reverse)
    x.launch(states.joins_kernel, grid(len(first)), **more)
    run(start, part, bounds)
    return h, last


def _pairs(x: Call, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return x.q.new_empty(*x.q.shape[:2], x.constants["C"], dtype=kind)


def channel_scores(x: Call, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """Per channel: the decayed scores of the pairs within chunks [S,HQ,C]; otherwise something that nobody reads."""
    if not x.per_channel:
        return x.q
    a, HQ = _pairs(x, kind), x.q.shape[1]
    heads = 2 if x.sizes["G"] % 2 == 0 else 1
    x.launch(pairs.scores_kernel, (x.count, HQ // heads), a=a, HEADS=heads)
    x.launch(pairs.own_scores_kernel, (x.count, HQ), a=a)
    return a


def forward(x: RecurrenceInputs, launcher: Launcher = LAUNCHER) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B,T,HQ,V] like v, and the last state [N,H,K,V]."""
    call = prepare(x, launcher)
    h, last = _states(call, call.k, call.v, x.state.contiguous())
    o = x.v.new_empty(*x.q.shape[:3], x.v.shape[-1])
    read(call, h, o)
    return o, last


def read(x: Call, h: torch.Tensor, o: torch.Tensor) -> None:
    """Fills o [B,T,HQ,V] from the states h [chunks,H,K,V] that chunks start from, and their own rows."""
    V, HQ = x.sizes["V"], x.q.shape[1]
    x.launch(outputs.outputs_kernel, lambda c: (x.count, cdiv(V, c.BV), HQ), h=h, a=channel_scores(x), o=o)


def values_gradient(x: Call, a, dh, do, alone: bool = False) -> torch.Tensor:
    """dv [S,H,V] like v, from the gradients dh [chunks,H,K,V] of states behind chunks and do [S,HQ,V], or do alone.

    a as `channel_scores` gives it.
    """
    H, V, dv = x.sizes["H"], x.sizes["V"], torch.empty_like(x.v)
    x.launch(
        outputs.values_gradient_kernel,
        lambda c: (x.count, cdiv(V, c.BV), H),
        **dict(do=do, dh=dh, a=a, dv=dv, ALONE=alone),
    )
    return dv


def backward(
    x: RecurrenceInputs, do: torch.Tensor, dstate: torch.Tensor, gate: bool, launcher: Launcher = LAUNCHER
) -> Gradients:
    """Of q, k, v and the initial state, and of g if the gate's is wanted."""
    call = prepare(x, launcher)
    do = do.contiguous().flatten(0, 1)
    h, _ = _states(call, call.k, call.v, x.state.contiguous())
    dh, dfirst = _states(call, call.q, do, dstate.contiguous(), x.scale, reverse=True)
    dq, dk, dg = differentiate(call, h, dh, do, gate)
    dv = values_gradient(call, channel_scores(call), dh, do)
    dg = None if dg is None else dg.view(x.g.shape).to(x.g.dtype)
    return Gradients(dq.view(x.q.shape), dk.view(x.k.shape), dv.view(x.v.shape), dg, state=dfirst)


def _transposed(x: RecurrenceInputs, q: torch.Tensor) -> RecurrenceInputs:
    """With queries q, the recurrence whose queries' gradient is what decays of value channels let x read.

    o_t = scale sum_s (q_t . k_s) exp(gv) v_s: its keys are v, its values k, its output's gradient is x.q, its state the
    transpose.
    """
    return x._replace(q=q, k=x.v, v=x.k, g=x.gv, gv=None, state=x.state.transpose(-1, -2).contiguous())


def value_gated_forward(x: RecurrenceInputs, launcher: Launcher = LAUNCHER) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` with decays gv of value channels."""
    other = _transposed(x, x.v.new_zeros(*x.q.shape[:3], x.v.shape[-1]))
    call = prepare(other, launcher)
    h, last = _states(call, call.k, call.v, other.state)
    o, _, _ = differentiate(call, h, h, x.q.contiguous().flatten(0, 1), False)
    return o.view(other.q.shape), last.transpose(-1, -2).contiguous()


def value_gated_backward(
    x: RecurrenceInputs, do: torch.Tensor, dstate: torch.Tensor, gate: bool, launcher: Launcher = LAUNCHER
) -> Gradients:
    """Of q, k, v and the initial state, and of gv if the gate's is wanted: those of that other recurrence."""
    other = _transposed(x, do)
    dq, _ = forward(other, launcher)
    found = backward(other, x.q, dstate.transpose(-1, -2).contiguous(), gate, launcher)
    dfirst = found.state.transpose(-1, -2).contiguous()
    return Gradients(q=dq, k=found.v, v=found.k, gv=found.g, state=dfirst)


def differentiate(
    x: Call, h, dh, do, gate: bool, kind: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of queries, keys and, if wanted, gates [S,H,1 or K]. That of the queries needs neither q nor dh.

    Those of queries and keys in dtype kind, or as they are.
    """
    S, H, K = x.k.shape
    da = _products(x, do)
    dq_own, dk_own = _own_gradients(x, da) if x.per_channel else (x.q, x.k)
    dq, dk, dg = torch.empty_like(x.q, dtype=kind), torch.empty_like(x.k, dtype=kind), x.q
    if gate:
        # Per head a part for every block of channels, as many as the configuration has.
        dg = torch.empty_like(x.g) if x.per_channel else x.g.new_empty(cdiv(K, 16), S, H)
    given = dict(h=h, dh=dh, do=do, da=da, dq_own=dq_own, dk_own=dk_own, S=S, GATE_GRADIENT=gate)
    config = x.launch(gradients.gradients_kernel, lambda c: (x.count, cdiv(K, c.BK), H), **given, dq=dq, dk=dk, dg=dg)
    if not gate:
        return dq, dk, None
    return dq, dk, dg if x.per_channel else dg[: cdiv(K, config.BK)].sum(0)


def _products(x: Call, do) -> torch.Tensor:
    """The gradients [S,HQ,C] of scores within chunks; per head or without a gate, of the products they are made of."""
    da = _pairs(x)
    x.launch(pairs.products_kernel, (x.count, x.q.shape[1]), x=do, y=x.v, a=da)
    return da


def _own_gradients(x: Call, da) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gradients of the scores within chunks make of queries and keys."""
    _, H, K = x.k.shape
    dq, dk = (torch.empty_like(y, dtype=torch.float32) for y in (x.q, x.k))
    for kernel in (pairs.pairs_gradient_kernel, pairs.own_gradients_kernel):
        x.launch(kernel, lambda c: (x.count, cdiv(K, c.BK), H), da=da, dq=dq, dk=dk)
    return dq, dk
