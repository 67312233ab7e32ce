"""The Triton kernels under the interpreter: against float64, between guards, split, packed, permuted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops._triton import additive, launch
from tests.kernels.cases import Case, distances, exact, inputs, run, tuned
from tests.kernels.interpreter import mend_rounding, sanitized

mend_rounding()
BARS = dict(o=1e-6, last=1e-6, q=2e-6, k=2e-6, v=2e-6, g=1e-5, state=2e-6)


def check(case: Case, **launcher):
    x = case.tensors()
    far = distances(run(additive, case, x, **launcher), exact(case, x))
    assert all(d <= BARS[n] for n, d in far.items()), far


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    packed, chunk = draw(st.booleans()), draw(st.sampled_from([16, 32, 64]))
    return Case(
        B=draw(st.integers(1, 2)),
        T=draw(st.integers(1, 70)),
        H=draw(st.integers(1, 2)),
        G=draw(st.integers(1, 3)),
        K=draw(st.sampled_from([1, 16, 24, 40])),
        V=draw(st.sampled_from([1, 16, 40, 72])),
        gate=draw(st.sampled_from(["none", "head", "channel"])),
        size=draw(st.sampled_from([1e-4, 0.1, 1.4, 5.6, 30.0])),
        chunk=chunk,
        piece=draw(st.sampled_from([chunk, 2 * chunk, 1024])),
        lengths=(*draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)), 1) if packed else None,
    )


@settings(max_examples=25)
@given(cases())
def test_everything_matches_naive_float64(case):
    check(case)


# The cheapest first: a mutant runs until one of them kills it.
CLEAN = [
    Case(gate="channel", G=2, K=20, V=16, T=66, chunk=64, size=0.1),
    Case(gate="channel", K=20, V=40, T=68, chunk=16, piece=32, size=0.1),
    Case(gate="none", B=2, H=2, G=2, T=37, lengths=(5, 0, 32)),
    Case(gate="head", H=2, K=40, V=16, chunk=16, lengths=(0, 66), piece=16, size=0.1),
    Case(gate="head", G=2, K=40, V=72, T=36, chunk=16),
    Case(gate="channel", H=2, K=20, T=30, size=30.0),
    Case(gate="channel", G=2, K=40, lengths=(0, 33, 0, 7), size=0.1),
]


@pytest.mark.parametrize("case", CLEAN)
def test_no_program_leaves_its_place(case):
    with sanitized():
        check(case)


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 100.0, 1e4])
def test_gates_of_every_size(gate, size):
    check(Case(gate=gate, size=size, T=50, G=2))


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("size", [10.0, 30.0, 100.0])
def test_gates_that_are_strong_everywhere(gate, size):
    """Their gradients are far below what a last row keeps of itself, which is all of it."""
    case = Case(gate=gate, T=50, G=2, size=size)
    x = case.tensors()
    x["g"] -= size / 2
    far = distances(run(additive, case, x), exact(case, x))
    assert all(d <= BARS[n] for n, d in far.items()), far


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("depth", [20.0, 75.0])
def test_a_strong_gate_amid_weak_ones_blurs_no_pair_behind_it(gate, depth):
    """Behind it every running sum is long, and every decay between two rows is weak."""
    case = Case(gate=gate, T=50, G=2, size=0.05)
    x = case.tensors()
    x["g"][:, 3::16] -= depth
    far = distances(run(additive, case, x), exact(case, x))
    assert all(d <= BARS[n] for n, d in far.items()), far


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_minus_infinity_resets(gate):
    """What came before -inf is gone to the bit, and no gradient reaches it."""
    case = Case(gate=gate, T=50, size=0.1)
    x = case.tensors()
    x["g"][:, 21] = -torch.inf
    one = run(additive, case, x)
    y = {n: torch.cat([torch.randn_like(t[:, :21]), t[:, 21:]], 1) if n in "kv" else t for n, t in x.items()}
    other = run(additive, case, y)
    assert torch.equal(one["o"][:, 21:], other["o"][:, 21:])
    assert torch.equal(one["last"], other["last"])
    assert all(t.isfinite().all() for t in one.values())
    z = {n: t if n not in ("do", "dstate") else t.clone() for n, t in x.items()}
    z["do"][:, :21] = 0
    assert not run(additive, case, z)["v"][:, :21].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_halves_stay_near_their_rounding_floor(gate, dtype):
    """Against rounding the exact result once, the least that any kernel with this output can do."""
    case = Case(gate=gate, T=130, H=2, G=2, K=64, V=64, size=0.1, chunk=None, dtype=dtype)
    x = case.tensors()
    true, found = exact(case, x), run(additive, case, x)
    far = distances(found, true)
    for n in ("o", "q", "k", "v"):
        floor = distances({n: true[n].to(dtype)}, {n: true[n]})[n]
        assert far[n] <= 1.6 * floor, (n, far[n] / floor)
    assert far["last"] <= 5e-4
    assert far["state"] <= 2e-3
    assert gate == "none" or far["g"] <= 5e-3


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_tf32_when_pytorch_allows_it(gate):
    case = Case(gate=gate, T=70, K=64, V=64, size=0.1, chunk=64)
    x = case.tensors()
    far = distances(run(additive, case, x, precision=lambda dtype: "tf32"), exact(case, x))
    assert all(d <= (2e-3 if n == "g" else 5e-4) for n, d in far.items()), far
    assert far["o"] > 1e-5


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("size", [1.0, 4.5])
def test_the_future_changes_no_bit_of_the_past(gate, size):
    case, t = Case(gate=gate, T=60, G=2, size=size), 37
    x = case.tensors()
    y = {n: z if n in ("state", "dstate") or z is None else z.clone() for n, z in x.items()}
    for n in ("q", "k", "v", "do"):
        y[n][:, t:] = torch.randn_like(y[n][:, t:])
    if y["g"] is not None:
        y["g"][:, t:] = -size * torch.rand_like(y["g"][:, t:])
    before, after = run(additive, case, x), run(additive, case, y)
    assert torch.equal(before["o"][:, :t], after["o"][:, :t])
    assert torch.equal(before["q"][:, :t], after["q"][:, :t])


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_packed_split_and_permuted(gate):
    """Sequences apart give the bits of sequences packed; so does a batch in another order; and a cut changes little."""
    case = Case(gate=gate, B=3, T=45, G=2)
    x = case.tensors()
    whole = run(additive, case, x)
    turned = {n: None if t is None else t[[2, 0, 1]] for n, t in x.items()}
    for n, t in run(additive, case, turned).items():
        assert t is None or torch.equal(t, whole[n][[2, 0, 1]]), n
    packed = {n: t if t is None or "state" in n else t.flatten(0, 1).unsqueeze(0) for n, t in x.items()}
    for n, t in run(additive, case._replace(lengths=(45, 45, 45)), packed).items():
        assert t is None or torch.equal(t.flatten(), whole[n].flatten()), n
    state = x["state"]
    for part in ((0, 1), (1, 20), (20, 45)):
        piece = inputs(case, x).in_time(lambda y, rows=slice(*part): y[:, rows])
        o, state = additive.forward(piece._replace(state=state))
        assert distances({"o": o}, {"o": whole["o"][:, slice(*part)].double()})["o"] <= 1e-6
    assert distances({"s": state}, {"s": whole["last"].double()})["s"] <= 1e-6


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_every_configuration_may_run_before_the_chosen_one(gate):
    check(Case(gate=gate, K=72, V=40, G=2), launch=tuned)


@pytest.mark.parametrize(("name", "size"), [("q", 1e-8), ("q", 1e2), ("k", 1e-8), ("k", 1e8), ("do", 1e4), ("do", 1e8)])
def test_factored_blocks_bear_operands_of_any_size(name, size):
    """Decays that sum to -79 in a block of 16 rows are as far as inverses may reach."""
    case = Case(gate="channel", T=40, lengths=None)
    x = case.tensors()
    x["g"][:] = 0
    x["g"][:, 1::16] = -79.0
    x[name] *= size
    far = distances(run(additive, case, x), exact(case, x))
    assert all(d <= BARS[n] for n, d in far.items()), far


class Timer:
    """An event of a clock that stands still."""

    def __init__(self, enable_timing):
        self.record = self.synchronize = lambda: None
        self.elapsed_time = lambda end: 1.0


def test_what_leaves_different_bits_is_no_configuration(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Timer)
    x = torch.randn(40).bfloat16()
    assert launch._milliseconds(lambda: x.copy_(x.clone()), [x]) == 1.0
    assert launch._milliseconds(lambda: x[3].add_(torch.rand(())), [torch.ones(3), x]) == float("inf")


def test_precision_follows_either_way_of_asking_pytorch():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, wanted in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert launch.precision(torch.float32) == wanted
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert launch.precision(torch.bfloat16) == "tf32"
    assert launch.precision(torch.float16) == "tf32x3"
