"""The ops as the compiler sees them: opaque, with fakes that tell shapes, and a backward of their own."""

import importlib.util

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import liger_ops
from liger_ops import (
    chunk_delta_rule,
    chunk_gla,
    chunk_gsa,
    chunk_kda,
    chunk_rwkv6,
    chunk_simple_gla,
    liger_attention,
    mlstm,
    sliding_window_attention,
)
from liger_ops._devices import on_triton

B, T, HQ, H, D = 2, 70, 4, 2, 8
# Shorter and longer than windows, blocks and chunks, and multiples of them.
LENGTHS = (40, 33, 5, 16, 17, 64, 70, 3, 2, 130)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def inputs(T=T):
    return leaf(B, T, HQ, D), leaf(B, T, H, D), leaf(B, T, H, D)


def gla(T=T):
    g = (-torch.rand(B, T, H, D)).requires_grad_()
    return lambda q, k, v, g: chunk_gla(q, k, v, g, output_final_state=True), (*inputs(T), g)


def simple_gla(T=T):
    g, state = (-torch.rand(B, T, H)).requires_grad_(), leaf(B, H, D, D)
    return lambda q, k, v, g, h: chunk_simple_gla(q, k, v, g, None, None, h, True), (*inputs(T), g, state)


def joint(T=T):
    q, k, v = leaf(B, T, HQ, D), leaf(B, T + 16, H, D), leaf(B, T + 16, H, D)
    features = leaf(B, T, HQ, D), leaf(B, T, H, D)
    g = (-torch.rand(B, T, H)).requires_grad_()
    return (
        lambda *x: liger_attention(*x, torch.ones(HQ), window=16, sinks=2, output_final_state=True),
        (q, k, v, *features, g),
    )


def recalling(T=T):
    """With tokens that stay exact, from a state that holds some."""
    (_, (q, k, v, q_log, k_log, g)), score = joint(T), torch.randn(B, T, H)
    held = leaf(B, 5, H, D), leaf(B, 5, H, D), torch.cat([torch.randn(B, 5, H, D + 2), torch.ones(B, 5, H, 1)], -1)
    held[2][..., D] = -1.0

    def run(q, k, v, q_log, k_log, g, score, h, held_k, held_v, far):
        options = dict(window=16, sinks=2, output_final_state=True, recall=5, score=score)
        given = (h, (held_k, held_v, far))
        o, (state, after) = liger_attention(q, k, v, q_log, k_log, g, torch.ones(HQ), initial_state=given, **options)
        return o, state, *after

    return run, (q, k, v, q_log, k_log, g, score, leaf(B, H, D, D + 1), *held)


def memory(T=T):
    gates = leaf(B, T, H), (-torch.rand(B, T, H)).requires_grad_()

    def run(*x):
        o, (C, n, _) = mlstm(*x, output_final_state=True)
        return o, torch.cat([C, n.unsqueeze(-1)], -1)

    return run, (*inputs(T), *gates)


def erasing(T=T):
    g, beta = (-torch.rand(B, T, H, D)).requires_grad_(), torch.rand(B, T, H).requires_grad_()

    def run(q, k, v, g, beta):
        return chunk_kda(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return run, (*inputs(T), g, beta)


def receptive(T=T):
    g, u = (-torch.rand(B, T, H, D)).requires_grad_(), leaf(HQ, D)
    return lambda q, k, v, g, u: chunk_rwkv6(q, k, v, g, u, output_final_state=True), (*inputs(T), g, u)


def slots(T=T):
    def run(*x):
        o, states = chunk_gsa(*x, output_final_state=True)
        return o, *states

    return run, (*inputs(T), leaf(B, T, H, 3))


def packed(T=T):
    q, k, v = (x[:1].detach().requires_grad_() for x in inputs(T))
    g, state, bounds = (-torch.rand(1, T, H, D)).requires_grad_(), leaf(4, H, D, D), torch.tensor([0, 1, 1, 2, T])

    def run(q, k, v, g, state, bounds):
        return chunk_gla(q, k, v, g, None, state, True, cu_seqlens=bounds)

    return run, (q, k, v, g, state, bounds)


def window(T=T):
    return lambda q, k, v: sliding_window_attention(q, k, v, 16, 4, return_lse=True), inputs(T)


def padded_window(T=T):
    """Behind what a cache holds, with padding."""
    k, v, visible = leaf(B, T + 18, H, D), leaf(B, T + 18, H, D), torch.rand(B, T + 18) > 0.3

    def run(q, k, v, visible):
        return sliding_window_attention(q, k, v, 16, 4, visible=visible, return_lse=True)

    return run, (leaf(B, T, HQ, D), k, v, visible)


CASES = {
    "gla": gla,
    "simple_gla": simple_gla,
    "joint": joint,
    "recalling": recalling,
    "mlstm": memory,
    "rwkv6": receptive,
    "gsa": slots,
    "packed": packed,
    "window": window,
    "padded_window": padded_window,
    "kda": erasing,
}


def compare(op, compiled, arguments):
    """Outputs and gradients of both, on the same numbers."""
    leaves = [x for x in arguments if x.requires_grad]
    wanted, got = op(*arguments), compiled(*arguments)
    weights = [torch.randn_like(x) for x in wanted]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), leaves)
        for out in (wanted, got)
    ]
    for a, b in zip((*wanted, *grads[0]), (*got, *grads[1]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ten_lengths_make_two_graphs(name):
    """The first length as it is, and any, forward and backward, with the same numbers as without the compiler."""
    torch._dynamo.reset()
    (op, _), counter = CASES[name](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    for length in LENGTHS:
        compare(op, compiled, CASES[name](length)[1])
    assert counter.frame_count <= 2


SAMPLES = {
    "window": lambda: (
        *(leaf(B, T, HQ, D), leaf(B, T + 16, H, D), leaf(B, T + 16, H, D)),
        *(leaf(B, H, 2, D), leaf(B, H, 2, D), torch.arange(2).expand(B, 2).contiguous()),
        *(torch.ones(B, T + 16, dtype=torch.bool), torch.zeros(0), 20, 0.3, 2.0, True),
    ),
    "recurrence": lambda: (
        *(*inputs(), (-torch.rand(B, T, H)).requires_grad_()),
        *(None, None, leaf(B, H, D, D), None, 0.3, 32, False),
    ),
    "recurrence, packed": lambda: (
        *(x[:1].detach().requires_grad_() for x in inputs()),
        *(None, (-torch.rand(1, T, H, D)).requires_grad_(), None, leaf(4, H, D, D)),
        *(torch.tensor([0, 40, 40, 41, T]), 0.3, 16, False),
    ),
    "recurrence, delta rule": lambda: (
        *(*inputs(), (-torch.rand(B, T, H, D)).requires_grad_(), None, torch.rand(B, T, H).requires_grad_()),
        *(leaf(B, H, D, D), None, 0.3, 16, False),
    ),
    "recurrence, delta rule, packed": lambda: (
        *(x[:1].detach().requires_grad_() for x in inputs()),
        *(None, None, torch.rand(1, T, H).requires_grad_(), leaf(4, H, D, D)),
        *(torch.tensor([0, 40, 40, 41, T]), 0.3, 32, False),
    ),
    "joint": lambda: (
        *(leaf(B, T, HQ, D), leaf(B, T + 16, H, D), leaf(B, T + 16, H, D)),
        *(leaf(B, H, 2, D), leaf(B, H, 2, D), torch.arange(2).expand(B, 2).contiguous()),
        *(leaf(B, T, HQ, D), leaf(B, T, H, D), None, torch.ones(H, 1, 1, HQ // H, 1)),
        *(torch.ones(B, T + 16, dtype=torch.bool), *[None] * 6, leaf(B, H, D, D + 1), 16, 32, 0, 0.3, 2.0),
    ),
    "joint, recalling": lambda: (
        *(leaf(B, T, HQ, D), leaf(B, T + 16, H, D), leaf(B, T + 16, H, D)),
        *(leaf(B, H, 2, D), leaf(B, H, 2, D), torch.arange(2).expand(B, 2).contiguous()),
        *(leaf(B, T, HQ, D), leaf(B, T, H, D), None, torch.ones(H, 1, 1, HQ // H, 1)),
        *(torch.ones(B, T + 16, dtype=torch.bool), torch.rand(B, T, H) > 0.3, leaf(B, T, H, D)),
        *(torch.randint(T, (B, T, H)), leaf(B, 15, H, D), leaf(B, 15, H, D), torch.randint(T, (B, 15, H))),
        *(leaf(B, H, D, D + 1), 16, 32, 5, 0.3, 2.0),
    ),
    "recall": lambda: (torch.randn(B, T + 5, H), torch.rand(B, T + 5, H) > 0.3, 5, 32),
    "units": lambda: (torch.randn(B, T, H), -torch.rand(B, T, H), torch.randn(B, H), None),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.liger_ops, name.split(",")[0]).default, SAMPLES[name]())


def test_a_second_derivative_names_itself():
    q, k, v = inputs()
    for o, _ in (chunk_simple_gla(q, k, v), chunk_delta_rule(q, k, v, torch.rand(B, T, H))):
        with pytest.raises(RuntimeError, match=r"liger_ops::recurrence\w*_backward: expected one differentiation"):
            torch.autograd.grad(o.square().sum(), q, create_graph=True)


# What PyTorch imports for it warns of itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_forward_mode_names_itself():
    """Nothing answers with a tangent of zero."""
    for name, case in (
        ("recurrence(_kernels)?", simple_gla),
        ("recurrence(_kernels)?", erasing),
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
