"""The blocked window against the dense formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import naive_sliding_window_attention, sliding_window_attention


def distance(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)).item()


@st.composite
def shapes(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    H, G = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T = draw(st.integers(1, 150))
    window, sinks = draw(st.integers(1, 160)), draw(st.integers(0, 6))
    D = draw(st.integers(1, 20))
    return torch.randn(2, T, H * G, D), torch.randn(2, T, H, D), torch.randn(2, T, H, 12), window, sinks


@settings(max_examples=80)
@given(shapes())
def test_output_and_gradients_match_naive(case):
    *tensors, window, sinks = case
    exact = [x.double().requires_grad_() for x in tensors]
    fast = [x.clone().requires_grad_() for x in tensors]
    wanted, got = naive_sliding_window_attention(*exact, window, sinks), sliding_window_attention(*fast, window, sinks)
    assert distance(got, wanted) <= 1e-6
    weight = torch.randn(wanted.shape)
    grads = zip(
        torch.autograd.grad((got * weight).sum(), fast),
        torch.autograd.grad((wanted * weight).sum(), exact),
        strict=True,
    )
    for a, b in grads:
        assert (a.double() - b).norm() <= 5e-6 * b.norm() + 1e-5


@settings(max_examples=40)
@given(shapes(), st.data())
def test_last_queries_of_longer_keys(case, data):
    q, k, v, window, sinks = case
    last = data.draw(st.integers(1, q.shape[1]))
    whole = sliding_window_attention(q, k, v, window, sinks)
    assert torch.allclose(sliding_window_attention(q[:, -last:], k, v, window, sinks), whole[:, -last:], atol=1e-5)


@settings(max_examples=40)
@given(shapes(), st.integers(0, 40))
def test_left_padding_changes_nothing(case, padding):
    q, k, v, window, sinks = case
    alone, lse = sliding_window_attention(q, k, v, window, sinks, return_lse=True)
    padded = [torch.cat([torch.randn(2, padding, *x.shape[2:]), x], 1) for x in (q, k, v)]
    visible = torch.arange(padding + q.shape[1]).expand(2, -1) >= padding
    o, padded_lse = sliding_window_attention(*padded, window, sinks, visible=visible, return_lse=True)
    assert torch.isfinite(o).all()
    assert torch.allclose(o[:, padding:], alone, atol=1e-5)
    assert torch.allclose(padded_lse[:, padding:], lse, atol=1e-4)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale):
    q, k, v = torch.randn(2, 70, 4, 8), torch.randn(2, 70, 2, 8), torch.randn(2, 70, 2, 8)
    wanted = naive_sliding_window_attention(q.double(), k.double(), v.double(), 16, 3, scale)
    assert distance(sliding_window_attention(q, k, v, 16, 3, scale), wanted) <= 1e-6


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_bounds_the_scores(softcap):
    x = [3 * torch.randn(2, 70, h, 8) for h in (4, 2, 2)]
    exact, fast = [y.double().requires_grad_() for y in x], [y.clone().requires_grad_() for y in x]
    wanted = naive_sliding_window_attention(*exact, 16, 3, softcap=softcap)
    got = sliding_window_attention(*fast, 16, 3, softcap=softcap)
    assert distance(got, wanted) <= 1e-6
    assert distance(got, sliding_window_attention(*x, 16, 3)) > 0.01
    weight = torch.randn(wanted.shape)
    found = torch.autograd.grad((got * weight).sum(), fast)
    for a, b in zip(found, torch.autograd.grad((wanted * weight).sum(), exact), strict=True):
        assert (a.double() - b).norm() <= 5e-6 * b.norm()


def test_cost_is_linear_not_square():
    q, k, v = torch.randn(1, 100_000, 1, 2), torch.randn(1, 100_000, 1, 2), torch.randn(1, 100_000, 1, 2)
    assert torch.isfinite(sliding_window_attention(q, k, v, 16, 2)).all()


def test_bad_arguments_are_named():
    x = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="window: expected an integer >= 1"):
        sliding_window_attention(x, x, x, 0)
    for softcap in (0, -1.0, float("inf"), "30"):
        with pytest.raises(ValueError, match="softcap: expected a number > 0, or None"):
            sliding_window_attention(x, x, x, 4, softcap=softcap)
    with pytest.raises(ValueError, match="visible: expected a bool mask"):
        sliding_window_attention(x, x, x, 4, visible=torch.ones(1, 9))
    with pytest.raises(ValueError, match="k: expected at least as many tokens"):
        sliding_window_attention(x, x[:, :4], x[:, :4], 4)
