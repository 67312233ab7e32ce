"""The joint softmax and the window on kernels: against PyTorch in float64, between guards, split, packed, permuted."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import _devices, _joint, liger_attention, sliding_window_attention
from liger_ops._inputs import AttentionInputs
from liger_ops._triton import joint
from liger_ops._triton.launch import LAUNCHER, launch
from tests.kernels.cases import distances
from tests.kernels.interpreter import mend_rounding, sanitized

mend_rounding()
LEAVES = ("q", "k", "v", "q_log", "k_log", "g", "mix", "state")


def make(
    B=1, T=40, H=1, G=2, D=20, M=18, V=24, W=32, sinks=2, ahead=0, gate=True, size=1.0, hidden=0, dtype=torch.float32
):
    """Tensors by name, with `ahead` keys before the window of the first query and `hidden` ones from the first on."""
    S, HQ = ahead + W + T, H * G
    x = dict(q=torch.randn(B, T, HQ, D), k=torch.randn(B, S, H, D), v=torch.randn(B, S, H, V))
    x = {n: y.to(dtype) for n, y in x.items()}
    x |= dict(q_log=size * torch.randn(B, T, HQ, M), k_log=size * torch.randn(B, T, H, M))
    x |= dict(g=-torch.rand(B, T, H) if gate else None, mix=torch.rand(HQ), state=torch.rand(B, H, M, V + 1))
    x |= dict(do=torch.randn(B, T, HQ, V).to(dtype), dstate=torch.randn(B, H, M, V + 1), window=W, sinks=sinks)
    # Rows of a batch begin at different tokens.
    first = torch.arange(B)[:, None] * 3 + hidden
    return x | dict(visible=torch.arange(S) >= first if hidden else None)


def run(x, dtype=None):
    """Output, last state and every gradient of the op, in a dtype if one is named."""
    x = {n: y.to(dtype) if dtype and isinstance(y, torch.Tensor) and y.is_floating_point() else y for n, y in x.items()}
    leaves = {n: None if x[n] is None else x[n].clone().requires_grad_() for n in LEAVES}
    *args, state = leaves.values()
    options = {n: x[n] for n in ("window", "sinks", "visible")}
    o, last = liger_attention(*args, **options, initial_state=state, output_final_state=True)
    wanted = {n: y for n, y in leaves.items() if y is not None}
    grads = torch.autograd.grad((o, last), list(wanted.values()), (x["do"], x["dstate"]))
    return dict(o=o.detach(), last=last.detach()) | dict(zip(wanted, grads, strict=True))


def run_window(x, dtype=None):
    leaves = {n: (x[n].to(dtype) if dtype else x[n].clone()).requires_grad_() for n in ("q", "k", "v")}
    options = {n: x[n] for n in ("window", "sinks", "visible")}
    o = sliding_window_attention(*leaves.values(), **options)
    grads = torch.autograd.grad(o, list(leaves.values()), x["do"].to(o.dtype))
    o = o.detach()
    if x["visible"] is not None:
        # What a row has that sees nothing is finite, and no more is said of it.
        o = o * x["visible"][:, -o.shape[1] :, None, None]
    return dict(o=o) | dict(zip(leaves, grads, strict=True))


def on_kernels(monkeypatch, **launcher):
    """The names of the kernels that are launched from here on, by a launcher of these fields."""
    names = []

    def counted(kernel, grid, named):
        names.append(kernel.fn.__name__)
        return launch(kernel, grid, named)

    by = LAUNCHER._replace(launch=counted, **launcher)
    monkeypatch.setattr(joint, "prepare", partial(joint.prepare, launcher=by))
    monkeypatch.setattr(_devices, "on_triton", lambda q: q.dtype != torch.float64)
    return names


def check(found, true, bar=1e-6):
    """Weights divide out, so that a gradient may cancel: small against the largest is small enough."""
    floor = max(y.norm().item() for n, y in true.items() if n not in ("o", "last"))
    for n, y in true.items():
        off = (found[n].double() - y).norm().item()
        assert off <= bar * max(y.norm().item(), (0 if n in ("o", "last") else 0.1 * floor)), (n, off / y.norm().item())


@st.composite
def cases(draw):
    """A seed and arguments of `make`."""
    return draw(st.integers(0, 2**31)), dict(
        B=draw(st.integers(1, 2)),
        T=draw(st.integers(2, 40)),
        H=draw(st.integers(1, 2)),
        G=draw(st.integers(1, 2)),
        D=draw(st.sampled_from([1, 16, 24])),
        M=draw(st.sampled_from([1, 16, 40])),
        V=draw(st.sampled_from([1, 16, 24])),
        W=draw(st.sampled_from([1, 5, 32, 64, 70])),
        sinks=draw(st.integers(0, 3)),
        ahead=draw(st.sampled_from([0, 1, 9])),
        gate=draw(st.booleans()),
        size=draw(st.sampled_from([0.1, 1.0, 4.0])),
        hidden=draw(st.sampled_from([0, 1, 7, 40])),
    )


@settings(max_examples=6)
@given(cases(), st.sampled_from([32, 1024]))
def test_everything_matches_float64(drawn, piece):
    torch.manual_seed(drawn[0])
    case = make(**drawn[1])
    with pytest.MonkeyPatch.context() as patch:
        names = on_kernels(patch, piece=piece)
        # Keys that a hidden query alone sees have no defined gradient: let none be asked for.
        if case["visible"] is not None:
            S, T = case["k"].shape[1], case["q"].shape[1]
            case["do"] *= case["visible"][:, S - T :, None, None]
        check(run(case), run(case, torch.float64), 2e-6)
        assert {"joint_kernel", "queries_kernel", "near_kernel", "far_keys_kernel", "far_values_kernel"} <= set(names)
        del names[:]
        check(run_window(case), run_window(case, torch.float64), 2e-6)
        assert {"joint_kernel", "queries_kernel", "near_kernel"} <= set(names) and "far_keys_kernel" not in names


CLEAN = [
    dict(T=35, sinks=3, hidden=5, B=2, ahead=4),
    dict(T=66, H=2, G=3, M=40, W=40, gate=False),
    dict(T=33, G=4, W=5, sinks=0, V=16, D=16),
]


@pytest.mark.parametrize("case", CLEAN)
def test_no_program_leaves_its_place(case, monkeypatch):
    on_kernels(monkeypatch)
    x = make(**case)
    if x["visible"] is not None:
        x["do"] *= x["visible"][:, -x["q"].shape[1] :, None, None]
    with sanitized():
        found, alone = run(x), run_window(x)
    check(found, run(x, torch.float64), 2e-6)
    check(alone, run_window(x, torch.float64), 2e-6)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_near_their_rounding_floor(dtype, gate, monkeypatch):
    """Against rounding the exact result once, the least that any kernel with this output can do."""
    on_kernels(monkeypatch)
    x = make(T=130, H=2, D=64, M=64, V=64, W=64, gate=gate, dtype=dtype)
    true, found = run(x, torch.float64), run(x)
    assert all(found[n].dtype == (dtype if n in "oqkv" else torch.float32) for n in found)
    far, floor = distances(found, true), distances({n: y.to(dtype) for n, y in true.items()}, true)
    # Values are rounded twice, as near ones and as a whole.
    assert all(far[n] <= (2.5 if n == "v" else 1.6) * floor[n] for n in "oqkv"), {n: far[n] / floor[n] for n in "oqkv"}
    assert all(far[n] <= 4 * floor[n] for n in far if n != "mix"), {n: far[n] / floor[n] for n in far}


def test_features_saturate_as_in_pytorch(monkeypatch):
    on_kernels(monkeypatch)
    x = make(T=50, sinks=3)
    x["q_log"][:, ::3] += 60
    x["k_log"][:, ::4, :, ::2] += 40
    true, found = run(x, torch.float64), run(x)
    assert not found["k_log"][:, ::4, :, ::2][x["k_log"][:, ::4, :, ::2] > 30].any()
    assert not found["q_log"][:, ::3][x["q_log"][:, ::3] > 45].any()
    check(found, true, 2e-6)


def test_the_future_changes_no_bit_of_the_past(monkeypatch):
    on_kernels(monkeypatch)
    x, t = make(T=70, ahead=3), 41
    y = {n: z.clone() if isinstance(z, torch.Tensor) else z for n, z in x.items()}
    for n in ("q", "k", "v", "q_log", "do"):
        later = slice(x[n].shape[1] - 70 + t, None)
        y[n][:, later] = torch.randn_like(y[n][:, later])
    for n in ("k_log", "g"):
        y[n][:, t:] = -torch.rand_like(y[n][:, t:])
    before, after = run(x), run(y)
    for n in ("o", "q", "q_log"):
        assert torch.equal(before[n][:, :t], after[n][:, :t]), n
    before, after = run_window(x), run_window(y)
    assert torch.equal(before["o"][:, :t], after["o"][:, :t])


def test_rows_of_a_batch_keep_their_bits(monkeypatch):
    on_kernels(monkeypatch)
    x = make(B=3, T=45, hidden=4)
    turned = {n: y[[2, 0, 1]] if isinstance(y, torch.Tensor) and n not in ("mix",) else y for n, y in x.items()}
    whole = run(x)
    for n, y in run(turned).items():
        assert n == "mix" or torch.equal(y, whole[n][[2, 0, 1]]), n


def test_split_sequences_agree(monkeypatch):
    """A text in two calls, the window's keys handed on."""
    on_kernels(monkeypatch)
    x, cut = make(T=60, W=32, sinks=2, ahead=2), 23
    args = ("q", "k", "v", "q_log", "k_log", "g")
    whole, last = liger_attention(*(x[n] for n in args), x["mix"], window=32, sinks=2, output_final_state=True)
    first = {n: x[n][:, : x[n].shape[1] - 60 + cut] for n in args}
    second = {n: x[n] if n in "kv" else x[n][:, cut:] for n in args}
    o, state = liger_attention(*first.values(), x["mix"], window=32, sinks=2, output_final_state=True)
    options = dict(window=32, sinks=2, initial_state=state, output_final_state=True)
    p, state = liger_attention(*second.values(), x["mix"], **options)
    found, true = dict(o=torch.cat([o, p], 1), last=state), dict(o=whole.double(), last=last.double())
    assert all(d <= 1e-6 for d in distances(found, true).values())


@pytest.mark.parametrize("case", ["softcap", "channel", "wide", "sinks", "float64", "lse"])
def test_what_kernels_do_not_serve_is_left_to_pytorch(case, monkeypatch):
    names = on_kernels(monkeypatch)
    x = make(D=136 if case == "wide" else 8, sinks=17 if case == "sinks" else 1, T=20)
    if case == "float64":
        x = {n: y.double() if isinstance(y, torch.Tensor) else y for n, y in x.items()}
    g = -torch.rand_like(x["k_log"]) if case == "channel" else x["g"]
    options = dict(window=x["window"], sinks=x["sinks"], softcap=3.0 if case == "softcap" else None)
    o, _ = liger_attention(*(x[n] for n in ("q", "k", "v", "q_log", "k_log")), g, x["mix"], **options)
    assert o.isfinite().all() and (names == [] or case == "lse")
    del names[:]
    if case != "channel":
        o, _ = sliding_window_attention(*(x[n] for n in ("q", "k", "v")), **options, return_lse=True)
        assert o.isfinite().all() and names == []


def test_the_log_of_the_denominator(monkeypatch):
    x = make(T=37, hidden=3)
    args, options = (x["q"], x["k"], x["v"], x["window"], x["sinks"]), dict(visible=x["visible"], return_lse=True)
    wanted = sliding_window_attention(*args, **options)
    names = on_kernels(monkeypatch)
    with torch.no_grad():
        found = sliding_window_attention(*args, **options)
    assert names == ["joint_kernel"]
    seen = x["visible"][:, -37:]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b)[seen].norm() <= 1e-6 * b[seen].norm()


def test_the_compiler_sees_one_op(monkeypatch):
    on_kernels(monkeypatch)
    x = make(T=33)
    column, rest = torch.tensor([[0, 1]]), torch.arange(x["k"].shape[1])[None] > 1
    leaves = [x[n].requires_grad_() for n in LEAVES]
    args = *leaves[:3], column, rest, x["window"], 0.2
    torch.library.opcheck(torch.ops.liger_ops.window_kernels.default, args)
    torch.library.opcheck(torch.ops.liger_ops.joint_kernels.default, (*args, *leaves[3:]))
    x = {n: y.detach() if isinstance(y, torch.Tensor) else y for n, y in x.items()}
    wanted = run(x)
    compiled = torch.compile(liger_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setitem(globals(), "liger_attention", compiled)
    assert all(torch.equal(y, wanted[n]) for n, y in run(x).items())


def test_a_second_derivative_names_itself(monkeypatch):
    on_kernels(monkeypatch)
    x = make(T=8)
    q = x["q"].requires_grad_()
    o, _ = liger_attention(*(x[n] for n in ("q", "k", "v", "q_log", "k_log", "g", "mix")), window=32)
    with pytest.raises(RuntimeError, match="liger_ops::joint_kernels_backward"):
        torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="liger_ops::window_kernels_backward"):
        torch.autograd.grad(sliding_window_attention(q, x["k"], x["v"], 5).sum(), q, create_graph=True)
    assert _joint.serves(AttentionInputs(q, x["k"], x["v"], window=5, sinks=0, scale=1.0, softcap=0.0))
