"""Elements beyond the 2^31st: tensors of which almost no page is ever touched."""

from functools import partial

import pytest
import torch
from triton import cdiv
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from liger_ops._inputs import KernelAttentionInputs, RecurrenceInputs
from liger_ops._torch.attention.window import find_sinks
from liger_ops._triton import additive, delta, joint, recurrent
from liger_ops._triton.launch import LAUNCHER, Chunks, launch, make_chunks
from liger_ops._triton.states import joins_kernel
from tests.kernels import test_delta
from tests.kernels.cases import Case, inputs, run
from tests.kernels.test_joint import make

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
        launch(joins_kernel, lambda c: (2, cdiv(K, c.BK), cdiv(V, c.BV)), given)
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


ROW, WIDTH = 30, 32
SEQUENCES = 2**31 // (ROW * WIDTH) + 2


def first_and_last(monkeypatch):
    """From here on only programs of the first and last of SEQUENCES equal sequences run."""
    call, shift = GridExecutor.__call__, [0, 0]

    def few(self, *args, **kwargs):
        grid, own = self.grid, self.grid[0] // SEQUENCES + 2
        shift[:] = (own, grid[0] - 2 * own) if grid[0] > SEQUENCES // 64 else (grid[0], 0)
        self.grid = (min(grid[0], 2 * own) if shift[1] else grid[0], *grid[1:])
        return call(self, *args, **kwargs)

    def place(x, y, z):
        interpreter_builder.grid_idx = (x if x < shift[0] else x + shift[1], y, z)

    monkeypatch.setattr(GridExecutor, "__call__", few)
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", place)


class Kept:
    """A gradient to which the sinks' is added, seen alone: what a whole one would touch is too much."""

    dtype = torch.float32

    def scatter_add_(self, _, index, new):
        self.new = new


def joint_kernels(x):
    """What each of the kernels of the joint softmax makes of it, by rows of the batch."""
    given = {n: x[n] for n in ("q", "k", "v", "rest", "q_log", "k_log", "g", "mix", "state")}
    call = joint.prepare(KernelAttentionInputs(**given, column=x["sinks"], window=5, scale=0.2))
    found, do = joint.forward(call, x["state"]), x["do"]
    rows = joint.Rows(found.top, found.lse, torch.empty_like(found.lse))
    dq, dq_log, d_mix, d_to = joint._queries(call, found, rows, do)
    back = joint._states(call, call.far.q_log, do, rows, x["dstate"], True)
    dk, dv = joint._near(call, rows, do)
    dk_log, d_behind, straddle = joint._far_keys(call, found, back, rows, do)
    within = joint._far_values(call, back.h, rows, do, dv)
    held = Kept(), Kept()
    joint._sinks(call, rows, do, *held)
    found = *found, rows.delta, *back, dq, dq_log, d_mix, dk, dv, dk_log, *(y.new for y in held)
    return found if x["g"] is None else (*found, d_to, d_behind, straddle, within)


@pytest.mark.parametrize("gate", [False, True])
def test_the_joint_softmax_beyond_32_bits(gate, monkeypatch):
    """The first and the last of very many sequences give the bits of the same two alone."""
    x = make(B=2, T=ROW, G=1, D=WIDTH, M=WIDTH, V=WIDTH, W=5, sinks=1, gate=gate)
    x["sinks"], x["rest"] = find_sinks(x["k"], 1, None)
    x = {n: y for n, y in x.items() if isinstance(y, torch.Tensor) or n == "g"}
    wanted = joint_kernels(x)

    def spread(y):
        far = torch.empty(SEQUENCES, *y.shape[1:], dtype=y.dtype)
        if not y.is_floating_point():
            # Programs of the next sequences run too, and read at the columns that stand there.
            far[:] = y[0]
        far[0], far[-1] = y[0], y[1]
        return far

    far = {n: y if y is None or n == "mix" else spread(y) for n, y in x.items()}
    assert min(far[n].numel() for n in ("q", "k", "v", "q_log", "k_log", "do", "state")) > 2**31
    first_and_last(monkeypatch)
    for n, (found, true) in enumerate(zip(joint_kernels(far), wanted, strict=True)):
        assert torch.equal(found[0], true[0]) and torch.equal(found[-1], true[1]), n
