"""The delta rule's kernels under the interpreter: against float64, between guards, split, packed, permuted."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import naive_delta_rule
from liger_ops._triton import delta
from liger_ops._triton.launch import LAUNCHER
from tests.kernels.cases import distances, inputs, run, tuned
from tests.kernels.interpreter import mend_rounding, sanitized
from tests.ops.test_delta_rule import keys, strengths
from tests.strategies import decay

mend_rounding()
LEAVES = ("q", "k", "v", "beta", "g", "state")
BARS = dict(o=5e-6, last=5e-6, q=5e-6, k=5e-6, v=5e-6, beta=5e-6, g=1e-5, state=5e-6)


class Case(NamedTuple):
    """One draw: sizes, gate and its size, kind of keys, strength, chunk, dtype, lengths of packed sequences, pieces."""

    B: int = 1
    T: int = 40
    H: int = 1
    G: int = 1
    K: int = 20
    V: int = 24
    gate: str = "none"
    size: float = 0.1
    kind: str = "spread"
    strength: float = -1.0
    chunk: int | None = 32
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    piece: int = LAUNCHER.piece

    def tensors(self) -> dict[str, torch.Tensor | None]:
        B, T = (self.B, self.T) if self.lengths is None else (1, sum(self.lengths))
        N, H, HQ = B if self.lengths is None else len(self.lengths), self.H, self.H * self.G
        q, v, do = torch.randn(B, T, HQ, self.K), torch.randn(B, T, H, self.V), torch.randn(B, T, HQ, self.V)
        k, beta = keys(self.kind, B, T, H, self.K), strengths(self.strength, B, T, H)
        q, k, v, do = (x.to(self.dtype) for x in (q, k, v, do))
        state, dstate = torch.randn(2, N, H, self.K, self.V)
        g = decay(self.gate, -self.size, B, T, H, self.K)
        return dict(q=q, k=k, v=v, beta=beta, g=g, state=state, do=do, dstate=dstate)

    def cu_seqlens(self) -> torch.Tensor | None:
        return None if self.lengths is None else torch.tensor([0, *self.lengths]).cumsum(0)


def exact(case: Case, x: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    leaves = {n: x[n].double().requires_grad_() for n in LEAVES if x[n] is not None}
    *inputs, state = (leaves.get(n) for n in LEAVES)
    o, last = naive_delta_rule(*inputs, initial_state=state, cu_seqlens=case.cu_seqlens())
    grads = torch.autograd.grad((o, last), list(leaves.values()), (x["do"].double(), x["dstate"].double()))
    return dict(o=o.detach(), last=last.detach(), **dict(zip(leaves, grads, strict=True)))


def check(case: Case, **launcher):
    x = case.tensors()
    far = distances(run(delta, case, x, **launcher), exact(case, x))
    assert all(d <= BARS[n] for n, d in far.items()), far


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    packed = draw(st.booleans())
    return Case(
        B=draw(st.integers(1, 2)),
        T=draw(st.integers(1, 70)),
        H=draw(st.integers(1, 2)),
        G=draw(st.integers(1, 3)),
        K=draw(st.sampled_from([2, 16, 24, 40])),
        V=draw(st.sampled_from([1, 16, 40, 72])),
        gate=draw(st.sampled_from(["none", "head", "channel"])),
        size=draw(st.sampled_from([1e-4, 0.1, 1.4, 5.6, 30.0])),
        strength=draw(st.sampled_from([-1.0, 0.0, 1.0, 2.0])),
        chunk=draw(st.sampled_from([16, 32, 64])),
        lengths=(*draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)), 1) if packed else None,
    )


@settings(max_examples=10)
@given(cases())
def test_everything_matches_naive_float64(case):
    check(case)


CLEAN = [
    Case(gate="channel", G=2, lengths=(0, 33, 0, 7)),
    Case(gate="head", H=2, K=40, V=40, T=36, chunk=16),
    Case(gate="none", B=2, G=2, T=70, V=16, chunk=64),
]


@pytest.mark.parametrize("case", CLEAN)
def test_no_program_leaves_its_place(case):
    with sanitized():
        check(case)


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("strength", [-1.0, 1.0, 2.0])
def test_parallel_keys_at_every_strength(gate, strength):
    check(Case(T=150, K=32, gate=gate, size=1e-3, kind="parallel", strength=strength))


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("size", [5.0, 20.0, 30.0, 100.0, 1e4])
def test_gates_of_every_size(gate, size):
    check(Case(gate=gate, size=size, T=50, G=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize(("kind", "strength"), [("spread", -1.0), ("parallel", 2.0)])
def test_halves_stay_near_their_rounding_floor(gate, dtype, kind, strength):
    """Against rounding the exact result once, the least that any kernel with this output can do."""
    case = Case(gate=gate, T=130, G=2, K=64, V=64, kind=kind, strength=strength, chunk=None, dtype=dtype)
    x = case.tensors()
    true, found = exact(case, x), run(delta, case, x)
    far = distances(found, true)
    for n in ("o", "q", "k", "v"):
        floor = distances({n: true[n].to(dtype)}, {n: true[n]})[n]
        assert far[n] <= 2 * floor, (n, far[n] / floor)
    assert far["last"] <= 5e-4 and far["state"] <= 2e-3


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_tf32_when_pytorch_allows_it(gate):
    case = Case(gate=gate, T=70, K=64, V=64, chunk=64)
    x = case.tensors()
    far = distances(run(delta, case, x, precision=lambda dtype: "tf32"), exact(case, x))
    assert all(d <= (2e-3 if n in ("g", "beta") else 1e-3) for n, d in far.items()), far
    assert far["o"] > 1e-5


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_the_future_changes_no_bit_of_the_past(gate):
    case, t = Case(gate=gate, T=60, G=2, size=1.0), 37
    x = case.tensors()
    y = {n: z if n in ("state", "dstate") or z is None else z.clone() for n, z in x.items()}
    for n in ("q", "k", "v", "beta", "do"):
        y[n][:, t:] = y[n][:, t:] * torch.rand_like(y[n][:, t:])
    if y["g"] is not None:
        y["g"][:, t:] = -torch.rand_like(y["g"][:, t:])
    before, after = run(delta, case, x), run(delta, case, y)
    for n in ("o", "q"):
        assert torch.equal(before[n][:, :t], after[n][:, :t]), n


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_packed_split_and_permuted(gate):
    """Sequences apart give the bits of sequences packed; so does a batch in another order; and a cut changes little."""
    case = Case(gate=gate, B=3, T=45, G=2)
    x = case.tensors()
    whole = run(delta, case, x)
    turned = {n: None if t is None else t[[2, 0, 1]] for n, t in x.items()}
    for n, t in run(delta, case, turned).items():
        assert torch.equal(t, whole[n][[2, 0, 1]]), n
    packed = {n: t if t is None or "state" in n else t.flatten(0, 1).unsqueeze(0) for n, t in x.items()}
    for n, t in run(delta, case._replace(lengths=(45, 45, 45)), packed).items():
        assert torch.equal(t.flatten(), whole[n].flatten()), n
    state = x["state"]
    for part in ((0, 1), (1, 20), (20, 45)):
        piece = inputs(case, x).in_time(lambda y, rows=slice(*part): y[:, rows])
        o, state = delta.forward(piece._replace(state=state))
        assert distances({"o": o}, {"o": whole["o"][:, slice(*part)].double()})["o"] <= 1e-6
    assert distances({"s": state}, {"s": whole["last"].double()})["s"] <= 1e-6


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_minus_infinity_resets(gate):
    """What came before -inf is gone to the bit, and no gradient reaches it."""
    case = Case(gate=gate, T=50)
    x = case.tensors()
    x["g"][:, 21] = -torch.inf
    one = run(delta, case, x)
    y = {n: torch.cat([torch.randn_like(t[:, :21]), t[:, 21:]], 1) if n == "v" else t for n, t in x.items()}
    other = run(delta, case, y)
    assert torch.equal(one["o"][:, 21:], other["o"][:, 21:]) and torch.equal(one["last"], other["last"])
    assert all(t.isfinite().all() for t in one.values())


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_every_configuration_may_run_before_the_chosen_one(gate):
    check(Case(gate=gate, K=72, V=40, G=2), launch=tuned)
