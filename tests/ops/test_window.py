"""The blocked window and the joint op against dense formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import liger_attention, naive_sliding_window_attention, sliding_window_attention


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


def test_cost_is_linear_not_square():
    q, k, v = torch.randn(1, 100_000, 1, 2), torch.randn(1, 100_000, 1, 2), torch.randn(1, 100_000, 1, 2)
    assert torch.isfinite(sliding_window_attention(q, k, v, 16, 2)).all()


def dense_joint(q, k, v, q_log, k_log, g, mix, window, sinks):
    """Everything as T x T matrices in float64: token j is near, a sink, or far under its features and decay."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    near = (j <= i) & ((i - j < window) | (j < sinks))
    far = (i - j >= window) & (j >= sinks)
    scores = torch.einsum("bihk,bjhk->bhij", q, k.repeat_interleave(G, 2)) * q.shape[-1] ** -0.5
    a = scores.exp() * near
    decay = torch.zeros(*k_log.shape[:1], k_log.shape[2], T, T, dtype=q.dtype)
    if g is not None:
        # Row i has let in tokens up to i - window, each under its own decay.
        cum = torch.where(torch.arange(T).view(1, T, 1) < sinks, 0.0, g).cumsum(1)
        at = (torch.arange(T) - window).clamp(min=0)
        decay = (cum[:, at][:, :, None] - cum[:, None]).permute(0, 3, 1, 2)
    features = torch.einsum("bihm,bjhm->bhij", q_log.exp(), k_log.exp().repeat_interleave(G, 2))
    b = features * decay.exp().repeat_interleave(G, 1) * far * mix.view(-1, 1, 1)
    w = a + b
    return torch.einsum("bhij,bjhv->bihv", w / w.sum(-1, keepdim=True), v.repeat_interleave(G, 2))


@settings(max_examples=40)
@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 5), st.booleans(), st.integers(0, 2**31))
def test_joint_op_is_one_softmax(T, window, sinks, gated, seed):
    torch.manual_seed(seed)
    B, H, HQ, D = 2, 2, 4, 8
    q, k, v = torch.randn(B, T, HQ, D), torch.randn(B, T, H, D), torch.randn(B, T, H, D)
    q_log, k_log = torch.randn(B, T, HQ, 6), torch.randn(B, T, H, 6)
    g = -torch.rand(B, T, H) if gated else None
    mix = torch.rand(HQ)
    wanted = dense_joint(
        *(x.double() for x in (q, k, v, q_log, k_log)), None if g is None else g.double(), mix.double(), window, sinks
    )
    pad = [torch.cat([torch.randn(B, window, H, D), x], 1) for x in (k, v)]
    visible = torch.arange(window + T).expand(B, -1) >= window
    leaving = torch.cat([torch.randn(B, window, H, 6), k_log], 1)[:, :T]
    gates = None if g is None else torch.cat([-torch.rand(B, window, H), g], 1)[:, :T]
    o, state = liger_attention(
        q, *pad, q_log, leaving, gates, mix, window=window, sinks=sinks, visible=visible, output_final_state=True
    )
    assert state.shape == (B, H, 6, D + 1)
    assert distance(o, wanted) <= 2e-6


def test_joint_op_survives_extreme_features():
    x = torch.randn(1, 80, 2, 8)
    k = torch.cat([torch.zeros(1, 4, 2, 8), x], 1)
    for size in (1e4, -1e4):
        log = torch.full((1, 80, 2, 6), size)
        o, _ = liger_attention(x, k, k, log, log, None, window=4)
        assert torch.isfinite(o).all()


def test_bad_arguments_are_named():
    x = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="window: expected an integer >= 1"):
        sliding_window_attention(x, x, x, 0)
    with pytest.raises(ValueError, match="visible: expected a bool mask"):
        sliding_window_attention(x, x, x, 4, visible=torch.ones(1, 9))
    with pytest.raises(ValueError, match="k: expected at least as many tokens"):
        sliding_window_attention(x, x[:, :4], x[:, :4], 4)
    with pytest.raises(ValueError, match="k: expected at least T"):
        liger_attention(x, x, x, x, x, None, window=4)
