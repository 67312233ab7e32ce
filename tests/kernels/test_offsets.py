"""Elements beyond the 2^31st: tensors of which almost no page is ever touched."""

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from liger_ops._triton import additive
from liger_ops._triton.launch import Chunks, make_chunks
from tests.kernels.cases import Case, run

TOKENS, LENGTHS = 2**27 + 100, (20, 40)


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_offsets_beyond_32_bits(gate, monkeypatch):
    """Two sequences at the two ends of 2^31 elements give the bits of the same two side by side."""
    case = Case(K=16, V=16, gate=gate, chunk=16, lengths=LENGTHS, size=3.0)
    x, early = case.tensors(), LENGTHS[0]
    wanted = run(additive, case, x)
    gap = TOKENS - sum(LENGTHS)

    def chunks(*_):
        near = make_chunks(case.cu_seqlens(), sum(LENGTHS), 16)
        starts, bounds = near.chunks.clone(), near.sequences.clone()
        starts[starts[:, 0] >= early, 0] += gap
        bounds[1, :2] += gap
        return Chunks(starts, bounds)

    def spread(y):
        far = torch.empty(1, TOKENS, *y.shape[2:])
        far[:, :early], far[:, early + gap :] = y[:, :early], y[:, early:]
        return far

    # On the CPU the interpreter would copy every storage onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(additive, "equal_chunks", chunks)
    far = {n: y if y is None or "state" in n else spread(y) for n, y in x.items()}
    assert far["q"].numel() > 2**31
    for n, y in run(additive, case._replace(lengths=None), far).items():
        if y is None or n in ("last", "state"):
            assert y is None or torch.equal(y, wanted[n]), n
        else:
            assert torch.equal(torch.cat([y[:, :early], y[:, early + gap :]], 1), wanted[n]), n
