"""The additive recurrence on chunks: states first, then every chunk by itself; forwards and backwards.

Shapes: B batch, T time, S = B * T tokens, N sequences, H key/value heads, HQ = G * H query heads, K key width,
V value width, C rows of a chunk.
"""

from typing import NamedTuple

import torch
from triton import cdiv, next_power_of_2

from liger_ops._triton import decays, gradients, outputs, pairs, states
from liger_ops._triton.launch import Chunks, Pieces, equal_chunks, launch, make_chunks, make_pieces, precision

_ROWS = 16
# Chains of states that fill no GPU are cut into pieces of so many tokens, which run side by side.
CHAINS, PIECE = 32, 1024


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
    decays: Decays
    chunks: Chunks
    pieces: Pieces | None
    constants: dict

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """H, G, K, V and the width of g."""
        H, K = self.k.shape[1:]
        return H, self.q.shape[1] // H, K, self.v.shape[2], 1 if self.g is None else self.g.shape[2]

    @property
    def per_channel(self) -> bool:
        return self.constants["PER_CHANNEL"]


def prepare(q, k, v, g, cu_seqlens, chunk) -> Call:
    chunk = chunk_size(q.dtype, chunk)
    B, T = q.shape[:2]
    per_channel = g is not None and g.ndim == 4
    if g is not None:
        g = g.float().contiguous().view(B * T, k.shape[2], -1)
    q, k, v = (x.contiguous().flatten(0, 1) for x in (q, k, v))
    where = equal_chunks(B, T, chunk, q.device) if cu_seqlens is None else make_chunks(cu_seqlens, T, chunk)
    few = len(where.sequences) * k.shape[1] <= CHAINS and 2 * PIECE * len(where.sequences) <= B * T
    pieces = make_pieces(where.sequences, B * T, PIECE, chunk) if few else None
    constants = dict(C=chunk, GATED=g is not None, PER_CHANNEL=per_channel, PRECISION=precision(q.dtype))
    constants |= dict(ALONE=False, STRICT=False)
    factors = Decays(q, q, q, q) if g is None else _decays(g, where.chunks, q, v, constants)
    return Call(q, k, v, g, factors, where, pieces, constants)


def _decays(g, table, q, v, constants) -> Decays:
    (S, H, KG), C, count = g.shape, constants["C"], len(table)
    to, behind, per_channel = torch.empty_like(g), torch.empty_like(g), constants["PER_CHANNEL"]
    e = g if per_channel else g.new_empty(S, H, C)
    fine = g.new_empty(count, H, C // _ROWS, dtype=torch.int32) if per_channel else g
    args = g, to, behind, e, fine, table, H, KG
    launch(decays.decays_kernel, lambda _: (count, H), q.shape[-1], v.shape[-1], *args, **constants, R=_ROWS)
    return Decays(to, behind, e, fine)


def _states(x: Call, k, v, first, scale=1.0, reverse=False):
    """The states that chunks start from [chunks,H,K,V], in either direction of time, and the last one."""
    H, _, K, V, KG = x.sizes
    kept = torch.bfloat16 if x.q.dtype == torch.bfloat16 else torch.float32
    h = k.new_empty(len(x.chunks.chunks), H, K, V, dtype=kept)
    last = torch.empty_like(first)

    def run(first, last, sequences, total=None):
        args = k, v, *x.decays[:2], first, h, last, x.q if total is None else total, sequences
        sizes = scale, H, k.shape[1] // H, K, V, KG
        constants = dict(x.constants, REVERSE=reverse, PART=total is not None)
        launch(states.states_kernel, grid(len(sequences)), K, V, *args, *sizes, **constants)

    def grid(count):
        return lambda c: (count * H, cdiv(K, c.BK), cdiv(V, c.BV))

    if x.pieces is None:
        run(first, last, x.chunks.sequences)
        return h, last
    bounds, owned = x.pieces
    part, start = (first.new_empty(len(bounds), H, K, V) for _ in range(2))
    total = first.new_empty(len(bounds), H, KG)
    run(part, part, bounds, total)
    args = part, total, first, start, last, owned, H, K, V, KG
    launch(states.joins_kernel, grid(len(first)), K, V, *args, **x.constants, REVERSE=reverse)
    run(start, part, bounds)
    return h, last


def _pairs(x: Call, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return x.q.new_empty(*x.q.shape[:2], x.constants["C"], dtype=kind)


def scores(x: Call, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """Per channel: the decayed scores of the pairs within chunks [S,HQ,C]; otherwise something that nobody reads."""
    if not x.per_channel:
        return x.q
    H, G, K, V, _ = x.sizes
    a, count = _pairs(x, kind), len(x.chunks.chunks)
    args = a, x.chunks.chunks, H, G, K
    heads = 2 if G % 2 == 0 else 1
    grid, constants = (count, H * G // heads), {**x.constants, "R": _ROWS, "HEADS": heads}
    launch(pairs.scores_kernel, lambda _: grid, K, V, x.q, x.k, x.g, *args, **constants)
    args = x.q, x.k, x.g, x.decays.fine, *args
    launch(pairs.own_scores_kernel, lambda _: (count, H * G), K, V, *args, **x.constants, R=_ROWS)
    return a


def forward(q, k, v, g, state, cu_seqlens, scale, chunk):
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], g [B,T,H] or [B,T,H,K] or None, state [N,H,K,V] -> o, last state."""
    x = prepare(q, k, v, g, cu_seqlens, chunk)
    h, last = _states(x, x.k, x.v, state.contiguous())
    o = v.new_empty(*q.shape[:3], v.shape[-1])
    read(x, h, scale, o)
    return o, last


def read(x: Call, h, scale, o):
    """Fills o [B,T,HQ,V] from the states h [chunks,H,K,V] that chunks start from, and their own rows."""
    H, G, K, V, KG = x.sizes
    args = x.q, x.k, x.v, x.decays.to, x.decays.e, h, scores(x), o, x.chunks.chunks, scale, H, G, K, V, KG
    launch(outputs.outputs_kernel, lambda c: (len(h), cdiv(V, c.BV), H * G), K, V, *args, **x.constants)


def values_gradient(x: Call, a, dh, do, scale, alone=False):
    """dv [S,H,V] like v, from the gradients dh [chunks,H,K,V] of states behind chunks and do [S,HQ,V], or do alone.

    a as `scores` gives it.
    """
    H, G, K, V, KG = x.sizes
    dv, count = torch.empty_like(x.v), len(x.chunks.chunks)
    args = x.q, x.k, do, x.decays.behind, x.decays.e, dh, a, dv, x.chunks.chunks, scale, H, G, K, V, KG
    constants = {**x.constants, "ALONE": alone}
    launch(outputs.values_kernel, lambda c: (count, cdiv(V, c.BV), H), K, V, *args, **constants)
    return dv


def backward(do, dstate, q, k, v, g, state, cu_seqlens, scale, chunk, gate_gradient):
    """The gradients of q, k, v, g (None unless gate_gradient) and the initial state."""
    x = prepare(q, k, v, g, cu_seqlens, chunk)
    do = do.contiguous().flatten(0, 1)
    h, _ = _states(x, x.k, x.v, state.contiguous())
    dh, dfirst = _states(x, x.q, do, dstate.contiguous(), scale, reverse=True)
    dq, dk, dg = differentiate(x, h, dh, do, scale, gate_gradient)
    dv = values_gradient(x, scores(x), dh, do, scale)
    dg = dg.view(g.shape).to(g.dtype) if gate_gradient else None
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), dg, dfirst


def values_forward(q, k, v, gv, state, cu_seqlens, scale, chunk):
    """`forward` with decays of value channels, gv [B,T,H,V].

    o_t = scale sum_s (q_t . k_s) exp(gv) v_s is the gradient of the queries of another recurrence: its keys are v, its
    values k, its output's gradient q, its state the transpose.
    """
    x = prepare(v.new_zeros(*q.shape[:3], v.shape[-1]), v, k, gv, cu_seqlens, chunk)
    h, last = _states(x, x.k, x.v, state.transpose(-1, -2).contiguous())
    o, _, _ = differentiate(x, h, h, q.contiguous().flatten(0, 1), scale, False)
    return o.view(*q.shape[:3], v.shape[-1]), last.transpose(-1, -2).contiguous()


def values_backward(do, dstate, q, k, v, gv, state, cu_seqlens, scale, chunk, gate_gradient):
    """The gradients of q, k, v, gv and the initial state of `values_forward`: those of that other recurrence."""
    first, dlast = (s.transpose(-1, -2).contiguous() for s in (state, dstate))
    other = do, v, k, gv, first, cu_seqlens, scale, chunk
    dq, _ = forward(*other)
    _, dv, dk, dgv, dfirst = backward(q, dlast, *other, gate_gradient)
    return dq, dk, dv, dgv, dfirst.transpose(-1, -2).contiguous()


def differentiate(x: Call, h, dh, do, scale, gate_gradient, kind=None):
    """The gradients of queries, keys and, if wanted, gates [S,H,1 or K]. That of the queries needs neither q nor dh.

    Those of queries and keys in dtype kind, or as they are.
    """
    H, G, K, V, KG = x.sizes
    tokens, count = len(x.q), len(h)
    da = _products(x, do, scale)
    own = _own_gradients(x, da) if x.per_channel else (x.q, x.k)
    dq, dk, dg = torch.empty_like(x.q, dtype=kind), torch.empty_like(x.k, dtype=kind), x.q
    if gate_gradient:
        # Per head a part for every block of channels, as many as the configuration has.
        dg = torch.empty_like(x.g) if x.per_channel else x.g.new_empty(cdiv(K, 16), tokens, H)
    table = x.chunks.chunks
    args = x.q, x.k, x.v, *x.decays[:2], h, dh, do, da, *own, dq, dk, dg, table, scale, tokens, H, G, K, V, KG
    config = launch(
        gradients.gradients_kernel,
        lambda c: (count, cdiv(K, c.BK), H),
        K,
        V,
        *args,
        **x.constants,
        GATE_GRADIENT=gate_gradient,
    )
    return dq, dk, dg if x.per_channel or not gate_gradient else dg[: cdiv(K, config.BK)].sum(0)


def _products(x: Call, do, scale) -> torch.Tensor:
    """The gradients [S,HQ,C] of scores within chunks; per head or without a gate, of the products they are made of."""
    H, G, K, V, _ = x.sizes
    da, count = _pairs(x), len(x.chunks.chunks)
    args = do, x.v, x.decays.e, da, x.chunks.chunks, scale, H, G, V
    launch(pairs.products_kernel, lambda _: (count, H * G), K, V, *args, **x.constants)
    return da


def _own_gradients(x: Call, da) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gradients of the scores within chunks make of queries and keys."""
    H, G, K, V, _ = x.sizes
    dq, dk = (torch.empty_like(y, dtype=torch.float32) for y in (x.q, x.k))
    args, count = (da, x.q, x.k, x.g, x.decays.fine, dq, dk, x.chunks.chunks, H, G, K), len(x.chunks.chunks)
    for kernel in (pairs.pairs_gradient_kernel, pairs.own_gradients_kernel):
        launch(kernel, lambda c: (count, cdiv(K, c.BK), H), K, V, *args, **x.constants, R=_ROWS)
    return dq, dk
