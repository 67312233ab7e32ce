"""The delta rule against the naive one in float64, and the identities it must keep."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import liger_ops
from liger_ops import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    naive_delta_rule,
)
from tests.ops.test_gated_linear_attention import distance, gradients
from tests.strategies import MAGNITUDES, decay

NAMES = ("q", "k", "v", "beta", "g", "state")
BARS = dict(o=5e-6, q=5e-6, k=5e-6, v=5e-6, beta=5e-6, g=1e-5, state=5e-6)


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None
    state: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def leaves(self, dtype=torch.float32) -> list[torch.Tensor | None]:
        tensors = (getattr(self, n) for n in NAMES)
        return [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]


def keys(kind: str, *shape: int) -> torch.Tensor:
    """Of length 1: in every direction, or all but parallel."""
    k = torch.randn(shape)
    return F.normalize(k if kind == "spread" else torch.randn(shape[-1]) + 1e-3 * k, dim=-1)


def strengths(size: float, *shape: int) -> torch.Tensor:
    """Between 0 and 2: anywhere for a size of -1, within a thousandth of the size otherwise."""
    x = torch.rand(shape)
    return 2 * x if size < 0 else (size - 1e-3 * x).clamp(min=0)


def run(case: Case, leaves=None, **options):
    q, k, v, beta, g, state = case.leaves() if leaves is None else leaves
    options |= dict(initial_state=state, output_final_state=True, cu_seqlens=case.cu_seqlens)
    if g is None:
        return chunk_delta_rule(q, k, v, beta, **options)
    return (chunk_kda if g.ndim == 4 else chunk_gated_delta_rule)(q, k, v, g, beta, **options)


def summands(case: Case, weights: list[torch.Tensor]) -> float:
    """Size of what a head's gate gradient sums over channels: next to parallel keys they cancel, as do its digits."""
    *tensors, g, state = case.leaves(torch.float64)
    g = g.detach().unsqueeze(-1).repeat(1, 1, 1, case.k.shape[-1]).requires_grad_()
    outputs = naive_delta_rule(*tensors, g, initial_state=state, cu_seqlens=case.cu_seqlens)
    return gradients(outputs, [g], weights)[0].abs().sum(-1).norm().item()


def check(case: Case, parallel=False, **options):
    fast, exact = case.leaves(), case.leaves(torch.float64)
    got = run(case, fast, **options)
    wanted = naive_delta_rule(*exact[:5], initial_state=exact[5], cu_seqlens=case.cu_seqlens)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert distance(a, b) <= BARS["o"]
    if not case.q.numel():
        return
    weights = [torch.randn(x.shape) for x in wanted]
    names = [n for n, x in zip(NAMES, exact, strict=True) if x is not None]
    for n, a, b in zip(names, gradients(got, fast, weights), gradients(wanted, exact, weights), strict=True):
        assert torch.isfinite(a).all(), n
        floor = summands(case, weights) if parallel and n == "g" and a.ndim == 3 else 0.0
        assert distance(a, b, max(floor, 1e-6)) <= BARS[n], n


@st.composite
def cases(draw, packed=None, magnitudes=MAGNITUDES, max_length=70):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    gate, magnitude = draw(st.sampled_from(["none", "head", "channel"])), draw(st.sampled_from(magnitudes))
    # Heads of keys, of values for each, and of queries: more than values, or as many as keys.
    HK, GV = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    H = HK * GV
    HQ = draw(st.sampled_from([HK, H, 2 * H, 3 * H]))
    # A key of one channel erases all there is, and what is left is a rounding.
    K, V = draw(st.integers(2, 24)), draw(st.integers(1, 24))
    packed = draw(st.booleans()) if packed is None else packed
    if packed:
        lengths = draw(st.lists(st.integers(0, max_length // 2), min_size=1, max_size=4))
        B, T, N = 1, sum(lengths), len(lengths)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
    else:
        B, T = draw(st.integers(1, 2)), draw(st.integers(1, max_length))
        N, bounds = B, None
    k = keys("spread", B, T, HK, K)
    beta = strengths(draw(st.sampled_from([-1.0, 0.0, 1.0, 2.0])), B, T, H)
    state = torch.randn(N, H, K, V) if draw(st.booleans()) else None
    g = decay(gate, magnitude, B, T, H, K)
    return Case(torch.randn(B, T, HQ, K), k, torch.randn(B, T, H, V), beta, g, state, bounds)


@settings(max_examples=100)
@given(cases())
def test_output_state_and_every_gradient_match_naive_float64(case):
    check(case)


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("lengths", [(40, 33, 0, 50), (150, 1, 0, 2), (300, 520), (0, 0), ()])
def test_packed_sequences_that_are_alike_uneven_long_or_empty(gate, lengths):
    T, H, K, V = sum(lengths), 2, 12, 10
    bounds, state = torch.tensor([0, *lengths]).cumsum(0).int(), torch.randn(len(lengths), H, K, V)
    tensors = torch.randn(1, T, 4, K), keys("spread", 1, T, H, K), torch.randn(1, T, H, V), strengths(-1.0, 1, T, H)
    check(Case(*tensors, decay(gate, -1.0, 1, T, H, K), state, bounds))


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("kind", ["spread", "parallel"])
@pytest.mark.parametrize("size", [-1.0, 1.0, 2.0])
def test_keys_and_strengths_at_their_extremes_over_several_chunks(gate, kind, size):
    B, T, H, K, V = 1, 200, 2, 32, 20
    g = decay(gate, -1e-3, B, T, H, K)
    q, k, v, beta = torch.randn(B, T, 4, K), keys(kind, B, T, H, K), torch.randn(B, T, H, V), strengths(size, B, T, H)
    check(Case(q, k, v, beta, g), parallel=kind == "parallel")


@pytest.mark.parametrize("gate", ["head", "channel"])
@pytest.mark.parametrize("magnitude", [-1.0, -5.0, -30.0, -100.0, -1e4, -torch.inf])
def test_gates_of_every_size(gate, magnitude):
    B, T, H, K, V = 1, 100, 2, 16, 20
    g = decay(gate, magnitude, B, T, H, K)
    k, beta = keys("parallel", B, T, H, K), strengths(2.0, B, T, H)
    check(Case(torch.randn(B, T, 4, K), k, torch.randn(B, T, H, V), beta, g), parallel=True)


@settings(max_examples=60)
@given(cases(packed=False, max_length=100), st.data())
def test_split_anywhere_equals_whole(case, data):
    cut = data.draw(st.integers(0, case.q.shape[1]))
    whole, final = run(case)
    parts, state = [], case.state
    for part in (slice(0, cut), slice(cut, None)):
        tensors = (getattr(case, n) for n in NAMES[:5])
        o, state = run(Case(*(None if x is None else x[:, part] for x in tensors), state))
        parts.append(o)
    assert distance(torch.cat(parts, 1), whole) <= 2e-6
    assert distance(state, final) <= 2e-6


@settings(max_examples=60)
@given(cases(packed=True))
def test_packed_equals_separate(case):
    packed, states = run(case)
    for n, (a, b) in enumerate(itertools.pairwise(case.cu_seqlens.tolist())):
        tensors = [getattr(case, name) for name in NAMES[:5]]
        state = None if case.state is None else case.state[n : n + 1]
        o, final = run(Case(*(None if x is None else x[:, a:b] for x in tensors), state))
        assert distance(o, packed[:, a:b]) <= 1e-6
        assert distance(final, states[n : n + 1]) <= 1e-6


@settings(max_examples=40)
@given(cases(packed=False), st.sampled_from((16, 32, 64, 128)))
def test_chunk_size_changes_nothing(case, size):
    for a, b in zip(run(case, chunk_size=size), run(case, chunk_size=24), strict=True):
        assert distance(a, b) <= 2e-6


@settings(max_examples=40)
@given(cases(packed=False, magnitudes=(0.0, -1e-4, -1.39)), st.data())
def test_the_future_changes_no_bit_of_the_past(case, data):
    cut = data.draw(st.integers(1, case.q.shape[1]))
    before, _ = run(case)
    with torch.no_grad():
        for x in (case.q, case.k, case.v, case.beta):
            x[:, cut:] *= torch.rand_like(x[:, cut:])
    after, _ = run(case)
    assert torch.equal(before[:, :cut], after[:, :cut])


@settings(max_examples=30)
@given(cases(packed=False))
def test_batch_rows_in_another_order_have_the_same_bits(case):
    order = torch.randperm(case.q.shape[0])
    moved = Case(*(None if (x := getattr(case, n)) is None else x[order] for n in NAMES))
    for a, b in zip(run(moved), run(case), strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_half_precision_stays_at_its_rounding_floor(gate, dtype):
    B, T, H, K, V = 2, 100, 2, 16, 16
    tensors = torch.randn(B, T, 4, K), keys("spread", B, T, H, K), torch.randn(B, T, H, V), strengths(-1, B, T, H)
    q, k, v, beta = (x.to(dtype) for x in tensors)
    g = decay(gate, -0.1, B, T, H, K)
    o, state = run(Case(q, k, v, beta, g), (q, k, v, beta, g, None))
    wanted, final = naive_delta_rule(*(None if x is None else x.double() for x in (q, k, v, beta, g)))
    assert o.dtype == dtype and state.dtype == torch.float32
    assert distance(o, wanted) <= 1.6 * distance(wanted.to(dtype), wanted)
    assert distance(state, final) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 2, 40])
def test_gradients_of_shared_heads_are_rounded_once(dtype, T):
    """Values whose gradients nearly cancel in the key and the query that they share."""
    q, k = torch.randn(1, T, 1, 16).to(dtype), keys("spread", 1, T, 1, 16).to(dtype)
    v, do = torch.randn(1, T, 1, 8), torch.randn(1, T, 1, 8)
    v, do = (torch.cat([x, y + 0.1 * torch.randn_like(x)], 2).to(dtype) for x, y in ((v, v), (do, -do)))
    beta, found = torch.rand(1, T, 1).to(dtype).expand(1, T, 2), []
    for op, kind in ((chunk_delta_rule, dtype), (naive_delta_rule, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad(op(*leaves, beta.to(kind))[0], leaves, do.to(kind)))
    for got, wanted in zip(*found, strict=True):
        assert distance(got, wanted) <= 1.1 * distance(wanted.to(dtype), wanted)


def test_a_strength_of_one_replaces_and_of_two_reflects():
    k = F.normalize(torch.randn(8), dim=-1)
    held, new = torch.randn(4), torch.randn(4)
    state = torch.outer(k, held).view(1, 1, 8, 4)
    for beta, wanted in ((0.0, held), (1.0, new), (2.0, 2 * new - held)):
        one = k.view(1, 1, 1, 8)
        o, _ = fused_recurrent_delta_rule(one, one, new.view(1, 1, 1, 4), torch.full((1, 1, 1), beta), 1.0, state)
        assert torch.allclose(o.view(-1), wanted, atol=1e-6)


def test_minus_infinity_is_an_exact_reset():
    q, k, v = torch.randn(1, 40, 2, 8), keys("spread", 1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    beta, g = strengths(-1, 1, 40, 2), -torch.rand(1, 40, 2)
    g[:, 21] = -torch.inf
    whole, _ = chunk_gated_delta_rule(q, k, v, g, beta)
    k[:, :21], v[:, :21] = keys("spread", 1, 21, 2, 8), 1e6
    changed, _ = chunk_gated_delta_rule(q, k, v, g, beta)
    assert torch.equal(whole[:, 21:], changed[:, 21:])


def test_no_rows_and_no_tokens():
    for B, T in ((0, 9), (2, 0)):
        x, beta = torch.randn(B, T, 2, 8), torch.rand(B, T, 2)
        o, state = chunk_delta_rule(x, x, x, beta, output_final_state=True)
        assert o.shape == (B, T, 2, 8) and torch.equal(state, torch.zeros(B, 2, 8, 8))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_twenty_thousand_steps_do_not_drift(strength):
    T, K = 20_000, 4
    k, v = keys("spread", 1, T, 1, K), torch.randn(1, T, 1, 2)
    beta = strengths(strength, 1, T, 1)
    # Reflections keep every rounding, and what they add, for ever.
    g = torch.full((1, T, 1), -1e-4)
    with torch.no_grad():
        _, state = chunk_gated_delta_rule(k, k, v, g, beta, output_final_state=True)
        h, exact = torch.zeros(K, 2, dtype=torch.float64), [x[0, :, 0].double() for x in (k, v, beta, g)]
        for k_t, v_t, beta_t, g_t in zip(*exact, strict=True):
            h = h * g_t.exp()
            h += torch.outer(k_t, beta_t * (v_t - k_t @ h))
    assert distance(state[0, 0], h) <= 2e-4


def test_nothing_depends_on_strides_or_on_what_else_wants_a_gradient():
    case = Case(
        *(torch.randn(2, 3, 50, 8).transpose(1, 2) for _ in range(3)), torch.rand(2, 3, 50).transpose(1, 2), None
    )
    case = replace(case, k=F.normalize(case.k, dim=-1))
    wanted, _ = naive_delta_rule(*(getattr(case, n).double() for n in NAMES[:4]))
    k = case.k.requires_grad_()
    o, _ = liger_ops.chunk_delta_rule(case.q, k, case.v, case.beta)
    assert distance(o, wanted) <= 5e-6
    assert torch.isfinite(torch.autograd.grad(o.square().sum(), k)[0]).all()
