"""Elements beyond the 2^31st: tensors of which almost no page is ever touched."""

from functools import partial

import pytest
import torch
from triton import cdiv
from triton.runtime.interpreter import GridExecutor

from liger_ops._inputs import RecurrenceInputs
from liger_ops._triton import additive, delta, recurrent
from liger_ops._triton.launch import LAUNCHER, Chunks, launch, make_chunks
from liger_ops._triton.states import joins_kernel
from tests.kernels import test_delta
from tests.kernels.cases import Case, inputs, run

TOKENS, LENGTHS = 2**27 + 100, (20, 40)


def at_both_ends(case, tensors, run, monkeypatch):
    """Two sequences at the two ends of 2^31 elements give the bits of the same two side by side."""
    early, gap = LENGTHS[0], TOKENS - sum(LENGTHS)
    wanted = run(case, tensors)

    def chunks(*_):
        near = make_chunks(case.cu_seqlens(), sum(LENGTHS), 16)
        starts, bounds = near.chunks.clone(), near.sequences.clone()
        starts[starts[:, 0] >= early, 0] += gap
        bounds[1, :2] += gap
        return Chunks(starts, bounds)

    def spread(y):
        far = torch.empty(1, TOKENS, *y.shape[2:], dtype=y.dtype)
        far[:, :early], far[:, early + gap :] = y[:, :early], y[:, early:]
        return far

    # On the CPU the interpreter would copy every storage onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(additive, "equal_chunks", chunks)
    far = {n: y if y is None or "state" in n else spread(y) for n, y in tensors.items()}
    assert far["q"].numel() > 2**31
    for n, y in run(case._replace(lengths=None), far).items():
        if y is None or n in ("last", "state"):
            assert y is None or torch.equal(y, wanted[n]), n
        else:
            assert torch.equal(torch.cat([y[:, :early], y[:, early + gap :]], 1), wanted[n]), n


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_offsets_beyond_32_bits(gate, monkeypatch):
    case = Case(K=16, V=16, gate=gate, chunk=16, lengths=LENGTHS, size=3.0, piece=TOKENS)
    at_both_ends(case, case.tensors(), partial(run, additive), monkeypatch)


def corrections(case, x):
    """What the delta rule's own kernels make of it: products with the inverse, states, errors."""
    call, beta = delta._prepare(inputs(case, x), LAUNCHER)
    _, m = delta._inverse(call, beta)
    rows, taken = delta._mixed(call, m, call.v, beta), delta._mixed(call, m, call.k, beta, decayed=True)
    back = delta._mixed(call, m, call.k, beta, -1.0, transposed=True, decayed=True)
    forth = delta._states(call, rows, taken, beta, x["state"])
    other = delta._states(call, rows, back, beta, x["dstate"], x["do"].flatten(0, 1), 0.3)
    found = dict(rows=rows, taken=taken, back=back, e=forth.e, u=forth.u, w=other.e)
    return {n: y.unsqueeze(0) for n, y in found.items()} | dict(last=forth.last, state=other.last)


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_corrections_beyond_32_bits(gate, monkeypatch):
    case = test_delta.Case(K=16, V=16, gate=gate, chunk=16, lengths=LENGTHS)
    at_both_ends(case, case.tensors(), corrections, monkeypatch)


ROWS, K, V = 2**31 // (128 * 128) + 40, 128, 128


def far(rows: dict[int, torch.Tensor]) -> torch.Tensor:
    """States [ROWS,1,K,V] of which only these rows are ever touched."""
    x = torch.empty(ROWS, 1, K, V)
    assert x.numel() > 2**31
    for n, row in rows.items():
        x[n] = row
    return x


@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_beyond_32_bits(reverse, monkeypatch):
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    part, total, first = torch.randn(4, 1, K, V), torch.rand(4, 1, K), torch.randn(2, 1, K, V)
    places = [0, 1, ROWS - 2, ROWS - 1]

    def run(part, total, owned):
        start, last = torch.empty_like(part), torch.empty_like(first)
        given = dict(part=part, total=total, first=first, start=start, last=last, pieces=torch.tensor(owned))
        given |= dict(H=1, K=K, V=V, KG=K, GATED=True, PER_CHANNEL=True, REVERSE=reverse)
        launch(joins_kernel, lambda c: (2, cdiv(K, c.BK), cdiv(V, c.BV)), **given)
        return start, last

    wanted, last = run(part, total, [[0, 2], [2, 2]])
    spread = torch.empty(ROWS, 1, K)
    spread[places] = total
    found, other = run(far(dict(zip(places, part, strict=True))), spread, [[0, 2], [ROWS - 2, 2]])
    assert torch.equal(found[places], wanted) and torch.equal(other, last)


def test_pools_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    q, k, v, state = torch.randn(1, 1, 1, K), torch.randn(1, 1, 1, K), torch.randn(1, 1, 1, V), torch.randn(1, 1, K, V)
    pool = far({ROWS - 1: state[0]})
    o = recurrent.forward(RecurrenceInputs(q, k, v, state=pool, scale=0.1), pool, torch.tensor([ROWS - 1]))
    wanted = recurrent.forward(RecurrenceInputs(q, k, v, state=state, scale=0.1), state, torch.tensor([0]))
    assert torch.equal(o, wanted) and torch.equal(pool[ROWS - 1], state[0])
