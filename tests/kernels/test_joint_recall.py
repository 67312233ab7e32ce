"""The joint softmax with recall on kernels: against PyTorch in float64, in pieces, between guards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import liger_attention
from liger_ops._inputs import KernelAttentionInputs
from liger_ops._triton import joint_recall
from tests.kernels.cases import distances
from tests.kernels.interpreter import mend_rounding, sanitized
from tests.kernels.test_joint import check, make, on_kernels

mend_rounding()
LEAVES = "q", "k", "v", "q_log", "k_log", "g", "mix"
# Those of the window and of what is far, whose backwards have some in common.
NEAR = {"joint_kernel", "queries_kernel", "near_kernel"}
FAR = {"far_states_kernel", "far_keys_kernel", "far_values_kernel"}


def make_recalling(recall=5, cut=None, ties=False, **sizes):
    """Arguments of two calls, the second from row `cut` on, or of one for 0; with ties, scores of few values."""
    x = make(**sizes)
    B, T, H = x["k_log"].shape[:3]
    score = torch.randint(3, (B, T, H)).float() if ties else torch.randn(B, T, H)
    widths = x["k"].shape[3], x["v"].shape[3], x["k_log"].shape[3] + (x["g"] is not None) + 2
    held = {f"d_{n}": torch.randn(B, recall, H, width) for n, width in zip(("k", "v", "far"), widths, strict=True)}
    if x["visible"] is not None:
        # Of a hidden query nothing is defined.
        x["do"] *= x["visible"][:, -T:, None, None]
    return x | held | dict(recall=recall, score=score, cut=T // 2 if cut is None else cut)


def run(x, dtype=None):
    """Output, last state, what is recalled and every gradient, in a dtype if one is named."""
    x = {n: y.to(dtype) if dtype and isinstance(y, torch.Tensor) and y.is_floating_point() else y for n, y in x.items()}
    leaves = {n: x[n].clone().requires_grad_() for n in LEAVES if x[n] is not None}
    T, S, cut = x["q"].shape[1], x["k"].shape[1], x["cut"]
    outs, state = [], None
    for rows in (slice(0, cut), slice(cut, T)) if cut else (slice(0, T),):
        keys = slice(0, S - T + rows.stop)
        whole = {n: y[:, keys if n in "kv" else rows] if cut else y for n, y in leaves.items() if n != "mix"}
        args = [whole.get(n) for n in LEAVES[:-1]]
        o, state = liger_attention(
            *args,
            leaves["mix"],
            **{n: x[n] for n in ("window", "sinks", "recall")},
            score=x["score"][:, rows],
            visible=None if x["visible"] is None else x["visible"][:, keys],
            initial_state=state,
            output_final_state=True,
        )
        outs.append(o)
    o, (last, recalled) = torch.cat(outs, 1), state
    if x["visible"] is not None:
        o = o * x["visible"][:, -T:, None, None]
    seen = dict(o=o, last=last) | {f"held_{n}": y for n, y in zip(("k", "v", "far"), recalled, strict=True)}
    given = [x[n].to(y.dtype) for n, y in zip(("do", "dstate", "d_k", "d_v", "d_far"), seen.values(), strict=True)]
    grads = torch.autograd.grad(list(seen.values()), list(leaves.values()), given)
    return {n: y.detach() for n, y in seen.items()} | dict(zip(leaves, grads, strict=True))


@st.composite
def cases(draw):
    """A seed and arguments of `make_recalling`."""
    T = draw(st.integers(2, 90))
    return draw(st.integers(0, 2**31)), dict(
        T=T,
        cut=draw(st.integers(1, T - 1)),
        recall=draw(st.sampled_from([1, 5, 40])),
        ties=draw(st.booleans()),
        B=draw(st.integers(1, 2)),
        H=draw(st.integers(1, 2)),
        D=draw(st.sampled_from([1, 16])),
        M=draw(st.sampled_from([1, 16])),
        V=draw(st.sampled_from([1, 16])),
        W=draw(st.sampled_from([1, 5, 32, 70])),
        sinks=draw(st.integers(0, 3)),
        ahead=draw(st.sampled_from([0, 9])),
        gate=draw(st.booleans()),
        hidden=draw(st.sampled_from([0, 7, 40])),
    )


@settings(max_examples=4)
@given(cases())
def test_everything_matches_float64(drawn):
    torch.manual_seed(drawn[0])
    case = make_recalling(**drawn[1])
    with pytest.MonkeyPatch.context() as patch:
        names = on_kernels(patch)
        found = run(case)
        assert set(names) >= NEAR | FAR
        # Two parts a call.
        assert names.count("joint_kernel") == 4
        check(found, run(case, torch.float64), 3e-6)


def test_no_program_leaves_its_place(monkeypatch):
    on_kernels(monkeypatch)
    x = make_recalling(T=70, B=2, hidden=5, ahead=3, W=24, recall=20)
    with sanitized():
        found = run(x)
    check(found, run(x, torch.float64), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_near_their_rounding_floor(dtype, monkeypatch):
    """Against rounding the exact result once; what is far and what is near are rounded apart."""
    on_kernels(monkeypatch)
    x = make_recalling(T=130, H=2, D=64, M=64, V=64, W=64, recall=32, cut=70, dtype=dtype)
    true, found = run(x, torch.float64), run(x)
    halves = ("o", "q", "k", "v", "held_k", "held_v")
    assert all(y.dtype == (dtype if n in halves else torch.float32) for n, y in found.items())
    far, floor = distances(found, true), distances({n: y.to(dtype) for n, y in true.items()}, true)
    assert all(far[n] <= 2.5 * floor[n] for n in ("o", "q", "k", "v")), {n: far[n] / floor[n] for n in far if floor[n]}
    assert all(far[n] <= 4 * floor[n] for n in far if n != "mix" and floor[n]), {n: far[n] / floor[n] for n in far}


def test_features_saturate_as_in_pytorch(monkeypatch):
    on_kernels(monkeypatch)
    x = make_recalling(T=50, sinks=3)
    x["q_log"][:, ::3] += 60
    x["k_log"][:, ::4, :, ::2] += 40
    true, found = run(x, torch.float64), run(x)
    assert not found["q_log"][:, ::3][x["q_log"][:, ::3] > 45].any()
    check(found, true, 2e-6)


def test_the_future_changes_no_bit_of_the_past(monkeypatch):
    on_kernels(monkeypatch)
    x, t = make_recalling(T=140, W=20, recall=12, cut=1), 100
    y = {n: z.clone() if isinstance(z, torch.Tensor) else z for n, z in x.items()}
    for n in ("q", "k", "v", "q_log", "do"):
        later = slice(x[n].shape[1] - 140 + t, None)
        y[n][:, later] = torch.randn_like(y[n][:, later])
    for n in ("k_log", "g", "score"):
        y[n][:, t:] = -torch.rand_like(y[n][:, t:])
    assert torch.equal(run(x)["o"][:, :t], run(y)["o"][:, :t])


def test_few_blocks_at_once_are_as_all(monkeypatch):
    on_kernels(monkeypatch)
    x = make_recalling(T=150, H=2, recall=30)
    whole = run(x)
    monkeypatch.setattr(joint_recall, "_SCORES", 1)
    for n, y in run(x).items():
        assert (y - whole[n]).norm() <= 1e-6 * whole[n].norm(), n


def test_autocast_changes_no_bit(monkeypatch):
    on_kernels(monkeypatch)
    x = make_recalling(T=40)
    wanted = run(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x)
    assert all(torch.equal(y, wanted[n]) for n, y in found.items())


def test_the_compiler_sees_one_op(monkeypatch):
    on_kernels(monkeypatch)
    x = make_recalling(T=70, cut=0)
    wanted = run(x)
    compiled = torch.compile(liger_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setitem(globals(), "liger_attention", compiled)
    assert all(torch.equal(y, wanted[n]) for n, y in run(x).items())


def test_the_op_keeps_the_rules_of_the_library(monkeypatch):
    on_kernels(monkeypatch)
    x = make(T=70, W=8)
    H, R, N = 1, 3, 2
    record = KernelAttentionInputs(
        **{n: x[n] for n in ("q", "k", "v", "q_log", "k_log", "g", "mix", "state")},
        column=torch.tensor([[0, 1]]),
        rest=torch.arange(x["k"].shape[1])[None] > 1,
        window=8,
        scale=0.2,
        left_v=torch.randn(1, 70, H, x["v"].shape[3]),
        left_lost=torch.randint(70, (1, 70, H)),
        held_k=torch.randn(1, N * R, H, x["k"].shape[3]),
        held_v=torch.randn(1, N * R, H, x["v"].shape[3]),
        held_lost=torch.randint(70, (1, N * R, H)),
    )
    given = [y.requires_grad_() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for y in record]
    torch.library.opcheck(torch.ops.liger_ops.recall_kernels.default, tuple(given))
    o, *_ = torch.ops.liger_ops.recall_kernels(*given)
    with pytest.raises(RuntimeError, match="liger_ops::recall_kernels_backward"):
        torch.autograd.grad(o.sum(), given[0], create_graph=True)
