"""Where decays of a chunk near what float32 holds: no bit of the past changes, and small numbers keep their digits.

Shapes: as in `liger_ops.chunk_gla`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import chunk_gla, naive_recurrence
from tests.ops.test_gated_linear_attention import distance, gradients, run
from tests.strategies import Case


# Log decays of a token: chunks that factor from their start, those that want a margin, and those from their middle.
@settings(max_examples=60)
@given(st.integers(0, 2**31), st.lists(st.sampled_from((0.01, 1.3, 2.4, 4.9)), min_size=3, max_size=3))
def test_no_strength_of_later_gates_changes_a_bit_of_the_past_or_of_its_gradients(seed, strengths):
    torch.manual_seed(seed)
    T = 17 + seed % 106
    cut = 1 + seed % (T - 1)
    q, k, v, do = (
        torch.randn(1, T, 4, 16),
        torch.randn(1, T, 2, 16),
        torch.randn(1, T, 2, 12),
        torch.randn(1, cut, 4, 12),
    )
    g = -strengths[0] * torch.rand(1, T, 2, 16)
    seen = []
    for strength in strengths[1:]:
        leaves = [x.clone() for x in (q, k, v, g)]
        for x in leaves[:3]:
            x[:, cut:] = 100 * torch.randn(x[:, cut:].shape)
        leaves[3][:, cut:] = -strength
        with torch.no_grad():
            alone, _ = chunk_gla(*leaves)
        o, _ = chunk_gla(*(x.requires_grad_() for x in leaves))
        assert torch.equal(o, alone)
        seen.append([x[:, :cut] for x in (o, *torch.autograd.grad(o[:, :cut], leaves, do))])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [17, 20, 1044])
def test_a_short_last_block_changes_no_bit_of_the_one_before(T):
    q, k, v = (torch.randn(1, T, 1, 8) for _ in range(3))
    g, cut = torch.full((1, T, 1, 8), -0.1), T // 16 * 16
    g[:, cut - 8 : cut] = -9.5
    before, _ = chunk_gla(q, k, v, g)
    g[:, cut:] = -70 / (T - cut)
    after, _ = chunk_gla(q, k, v, g)
    assert torch.equal(before[:, :cut], after[:, :cut])


def test_a_later_margin_loses_no_small_gradient():
    T = 48
    q, k, v, do = (torch.randn(1, T, 1, 4) for _ in range(4))
    k[:, 3:], do[:, T - 1 :] = 0.0, 0.0
    g = torch.full((1, T, 1, 4), -0.01)
    g[:, 4], g[:, 20] = -35.0, -30.0
    seen = []
    for last in (-0.01, -45.0):
        g[:, T - 1] = last
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g)]
        seen.append(torch.autograd.grad(chunk_gla(*leaves)[0], leaves, do))
    assert 0 < seen[0][0][:, 40].abs().max() < 1e-24
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a[:, : T - 1], b[:, : T - 1])


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_small_incoming_gradients_keep_their_digits(size):
    q, k, v, do = (torch.randn(1, 16, 1, 8) for _ in range(4))
    g = torch.full((1, 16, 1, 8), -0.01)
    g[:, 1] = -78.0
    exact, fast = ([x.to(t).requires_grad_() for x in (q, k, v, g)] for t in (torch.float64, torch.float32))
    wanted = torch.autograd.grad(naive_recurrence(*exact)[0], exact, size * do.double())
    for a, b in zip(torch.autograd.grad(chunk_gla(*fast)[0], fast, size * do), wanted, strict=True):
        assert distance(a, b, 0.0) <= 1e-6


@pytest.mark.parametrize("strength", [-10.0, -20.0, -40.0])
@pytest.mark.parametrize(("gate", "T"), [("head", 64), ("head", 2), ("channel", 2)])
def test_gates_that_are_all_strong_keep_their_own_small_gradients(gate, T, strength):
    q, k, v, state = torch.randn(2, T, 4, 8), torch.randn(2, T, 2, 8), torch.randn(2, T, 2, 6), torch.randn(2, 2, 8, 6)
    g = torch.full((2, T, 2) if gate == "head" else (2, T, 2, 8), strength)
    case = Case(q, k, v, g, state, None, False, gate)
    for dtype, bar in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        exact, fast = case.leaves(torch.float64), case.leaves(dtype)
        wanted, got = naive_recurrence(*exact[:4], initial_state=exact[4]), run(case, leaves=fast)
        weights = [torch.randn(x.shape) for x in wanted]
        far = gradients(got, fast, weights)[3], gradients(wanted, exact, weights)[3]
        assert distance(*far, 0.0) <= bar


def test_large_queries_and_keys_stay_finite_where_chunks_are_strong():
    q, k, v = 1e15 * torch.randn(1, 32, 1, 8), 1e15 * torch.randn(1, 32, 1, 8), torch.randn(1, 32, 1, 8)
    g = torch.full((1, 32, 1, 8), -0.01)
    g[:, 1], g[:, 17] = -41.0, -41.0
    wanted, _ = naive_recurrence(*(x.double() for x in (q, k, v, g)))
    assert distance(chunk_gla(q, k, v, g)[0], wanted) <= 1e-6
