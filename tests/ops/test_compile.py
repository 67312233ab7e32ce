"""The ops as the compiler sees them: opaque, with fakes that tell shapes, and a backward of their own."""

import importlib.util

import pytest
import torch
from torch.autograd import forward_ad

import liger_ops
from liger_ops import (
    chunk_delta_rule,
    chunk_gla,
    chunk_kda,
    chunk_simple_gla,
    liger_attention,
    mlstm,
    sliding_window_attention,
)
from liger_ops._packed import on_triton

B, T, HQ, H, D = 2, 70, 4, 2, 8


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def inputs():
    return leaf(B, T, HQ, D), leaf(B, T, H, D), leaf(B, T, H, D)


def gla():
    g = (-torch.rand(B, T, H, D)).requires_grad_()
    return lambda q, k, v, g: chunk_gla(q, k, v, g, output_final_state=True), (*inputs(), g)


def simple_gla():
    g, state = (-torch.rand(B, T, H)).requires_grad_(), leaf(B, H, D, D)
    return lambda q, k, v, g, h: chunk_simple_gla(q, k, v, g, None, None, h, True), (*inputs(), g, state)


def joint():
    q, k, v = leaf(B, T, HQ, D), leaf(B, T + 16, H, D), leaf(B, T + 16, H, D)
    features = leaf(B, T, HQ, D), leaf(B, T, H, D)
    g = (-torch.rand(B, T, H)).requires_grad_()
    return (
        lambda *x: liger_attention(*x, torch.ones(HQ), window=16, sinks=2, output_final_state=True),
        (q, k, v, *features, g),
    )


def memory():
    gates = leaf(B, T, H), (-torch.rand(B, T, H)).requires_grad_()

    def run(*x):
        o, (C, n, _) = mlstm(*x, output_final_state=True)
        return o, torch.cat([C, n.unsqueeze(-1)], -1)

    return run, (*inputs(), *gates)


def erasing():
    g, beta = (-torch.rand(B, T, H, D)).requires_grad_(), torch.rand(B, T, H).requires_grad_()

    def run(q, k, v, g, beta):
        return chunk_kda(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return run, (*inputs(), g, beta)


def packed():
    q, k, v = (x[:1].detach().requires_grad_() for x in inputs())
    g, state, bounds = (-torch.rand(1, T, H, D)).requires_grad_(), leaf(4, H, D, D), torch.tensor([0, 40, 40, 41, T])

    def run(q, k, v, g, state):
        return chunk_gla(q, k, v, g, None, state, True, cu_seqlens=bounds)

    return run, (q, k, v, g, state)


def window():
    return lambda q, k, v: sliding_window_attention(q, k, v, 16, 2, return_lse=True), inputs()


CASES = {
    "gla": gla,
    "simple_gla": simple_gla,
    "joint": joint,
    "mlstm": memory,
    "packed": packed,
    "window": window,
    "kda": erasing,
}


@pytest.mark.parametrize("name", CASES)
def test_fullgraph(name):
    """One graph, forward and backward, with the same numbers as without the compiler."""
    op, leaves = CASES[name]()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    wanted, got = op(*leaves), compiled(*leaves)
    weights = [torch.randn_like(x) for x in wanted]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), leaves)
        for out in (wanted, got)
    ]
    for a, b in zip((*wanted, *grads[0]), (*got, *grads[1]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_another_length_compiles_again():
    compiled = torch.compile(chunk_gla, fullgraph=True, backend="aot_eager")
    for length in (33, 70, 71):
        q, k, v = (torch.randn(1, length, 2, D) for _ in range(3))
        assert torch.equal(compiled(q, k, v, -v.abs())[0], chunk_gla(q, k, v, -v.abs())[0])


SAMPLES = {
    "window": lambda: (
        *(leaf(B, T, HQ, D), leaf(B, T + 16, H, D), leaf(B, T + 16, H, D)),
        *(leaf(B, H, 2, D), leaf(B, H, 2, D), torch.arange(2).expand(B, 2).contiguous()),
        *(torch.ones(B, T + 16, dtype=torch.bool), torch.zeros(0), 20, 0.3, 2.0, True),
    ),
    "recurrence": lambda: (
        *(*inputs(), (-torch.rand(B, T, H)).requires_grad_()),
        *(None, None, leaf(B, H, D, D), None, 0.3, 32),
    ),
    "recurrence, packed": lambda: (
        *(x[:1].detach().requires_grad_() for x in inputs()),
        *(None, (-torch.rand(1, T, H, D)).requires_grad_(), None, leaf(4, H, D, D)),
        *(torch.tensor([0, 40, 40, 41, T]), 0.3, 16),
    ),
    "recurrence, delta rule": lambda: (
        *(*inputs(), (-torch.rand(B, T, H, D)).requires_grad_(), None, torch.rand(B, T, H).requires_grad_()),
        *(leaf(B, H, D, D), None, 0.3, 16),
    ),
    "recurrence, delta rule, packed": lambda: (
        *(x[:1].detach().requires_grad_() for x in inputs()),
        *(None, None, torch.rand(1, T, H).requires_grad_(), leaf(4, H, D, D)),
        *(torch.tensor([0, 40, 40, 41, T]), 0.3, 32),
    ),
    "joint": lambda: (
        *(leaf(B, T, HQ, D), leaf(B, T + 16, H, D), leaf(B, T + 16, H, D)),
        *(leaf(B, H, 2, D), leaf(B, H, 2, D), torch.arange(2).expand(B, 2).contiguous()),
        *(leaf(B, T, HQ, D), leaf(B, T, H, D), None, torch.ones(H, 1, 1, HQ // H, 1)),
        *(torch.ones(B, T + 16, dtype=torch.bool), leaf(B, H, D, D + 1), 16, 32, 0.3, 2.0),
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.liger_ops, name.split(",")[0]).default, SAMPLES[name]())


def test_a_second_derivative_names_itself():
    q, k, v = inputs()
    o, _ = chunk_simple_gla(q, k, v)
    with pytest.raises(RuntimeError, match=r"liger_ops::(recurrence|packed)_backward: expected one differentiation"):
        torch.autograd.grad(o.square().sum(), q, create_graph=True)
    o, _ = chunk_delta_rule(q, k, v, torch.rand(B, T, H))
    with pytest.raises(RuntimeError, match=r"liger_ops::(recurrence|packed)_backward: expected one differentiation"):
        torch.autograd.grad(o.square().sum(), q, create_graph=True)


# What PyTorch imports for it warns of itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_forward_mode_names_itself():
    """Nothing answers with a tangent of zero."""
    for name, case in (
        ("recurrence|packed", simple_gla),
        ("recurrence|packed", erasing),
        ("window", window),
        ("joint", joint),
    ):
        op, leaves = case()
        q, *others = (x.detach() for x in leaves)
        with forward_ad.dual_level():
            with pytest.raises(RuntimeError, match=f"liger_ops::({name}): expected reverse-mode differentiation"):
                op(forward_ad.make_dual(q, q), *others)
            assert op(q, *others)[0].isfinite().all()


def test_every_op_is_in_one_library():
    assert liger_ops.__name__ == "liger_ops"
    assert {"joint", "recurrence", "window"} <= set(dir(torch.ops.liger_ops))


def test_the_choice_of_a_backend_is_traced():
    """Remote stands for a GPU's tensor, which alone asks whether Triton is there."""

    class Remote:
        is_cuda, dtype = True, torch.float32

    compiled = torch.compile(lambda x: -x if on_triton(Remote) else x, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == (-1 if importlib.util.find_spec("triton") else 1)
