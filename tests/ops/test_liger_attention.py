"""The joint softmax against its token-by-token definition in float64: outputs, every gradient, states, masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import (
    liger_attention,
    naive_liger_attention,
    naive_sliding_window_attention,
    sliding_window_attention,
)
from liger_ops._torch.attention import window as blocked
from tests.ops.test_window import distance

NAMES = ("q", "k", "v", "q_log", "k_log", "g", "mix")


@st.composite
def cases(draw):
    """Tensors by name, window, sinks, and the floats of scores in a segment, small enough for several segments."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    B, H, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T, D, V, M = draw(st.integers(1, 130)), draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 7))
    gate = draw(st.sampled_from(["none", "head", "channel"]))
    size = draw(st.sampled_from([1e-4, 0.1, 1.4, 8.0]))
    x = dict(
        q=torch.randn(B, T, H * G, D),
        k=torch.randn(B, T, H, D),
        v=torch.randn(B, T, H, V),
        q_log=torch.randn(B, T, H * G, M),
        k_log=torch.randn(B, T, H, M),
        mix=torch.rand(H * G),
    )
    if gate != "none":
        x["g"] = -size * torch.rand(B, T, H, M) if gate == "channel" else -size * torch.rand(B, T, H)
    return x, draw(st.integers(1, 70)), draw(st.integers(0, 5)), draw(st.sampled_from([1, 20_000, 1 << 20]))


def run(x, window, sinks, lead=0, **options):
    """The op on a text of T tokens after `lead` hidden ones: what a layer does, with a random, hidden past."""
    B, T = x["k"].shape[:2]

    def shift(y):
        return torch.cat([torch.randn(B, lead + window, *y.shape[2:], dtype=y.dtype), y], 1)

    def hide(y):
        return y if not lead else torch.cat([torch.randn(B, lead, *y.shape[2:], dtype=y.dtype), y], 1)

    k, v, k_log = shift(x["k"]), shift(x["v"]), shift(x["k_log"])[:, : lead + T]
    g = x.get("g")
    g = None if g is None else torch.cat([-torch.rand(B, lead + window, *g.shape[2:], dtype=g.dtype), g], 1)
    visible = torch.arange(lead + window + T).expand(B, -1) >= lead + window
    g = None if g is None else g[:, : lead + T]
    shared = dict(window=window, sinks=sinks, visible=visible, output_final_state=True, **options)
    o, state = liger_attention(hide(x["q"]), k, v, hide(x["q_log"]), k_log, g, x["mix"], **shared)
    return o[:, lead:], state


@settings(max_examples=80, deadline=None)
@given(cases())
def test_output_and_every_gradient_match_naive_float64(case):
    x, window, sinks, floats = case
    exact = {n: y.double().requires_grad_() for n, y in x.items()}
    fast = {n: y.clone().requires_grad_() for n, y in x.items()}
    wanted, last = naive_liger_attention(**exact, window=window, sinks=sinks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_SCORES", floats)
        got, state = run(fast, window, sinks)
        with torch.no_grad():
            assert distance(run(fast, window, sinks)[0], wanted) <= 2e-6
        assert distance(got, wanted) <= 2e-6
        assert distance(state, last) <= 2e-6
        weight = torch.randn(wanted.shape)
        names = [n for n in NAMES if n in x]
        leaves = [[y[n] for n in names] for y in (fast, exact)]
        a = torch.autograd.grad((got * weight).sum(), leaves[0], allow_unused=True)
        b = torch.autograd.grad((wanted * weight).sum(), leaves[1], allow_unused=True)
    floor = max(y.norm().item() for y in b if y is not None)
    for name, found, true in zip(names, a, b, strict=True):
        found, true = (torch.zeros(()) if y is None else y for y in (found, true))
        # Weights divide out, so that a gradient may cancel: small against the largest is small enough.
        assert (found.double() - true).norm() <= 1e-5 * true.norm() + 1e-6 * floor, name


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap_bounds_the_scores_nearby(softcap):
    x = dict(
        q=3 * torch.randn(2, 60, 4, 8),
        k=3 * torch.randn(2, 60, 2, 8),
        v=torch.randn(2, 60, 2, 5),
        q_log=torch.randn(2, 60, 4, 6),
        k_log=torch.randn(2, 60, 2, 6),
        mix=torch.rand(4),
    )
    exact = {n: y.double().requires_grad_() for n, y in x.items()}
    fast = {n: y.clone().requires_grad_() for n, y in x.items()}
    wanted, _ = naive_liger_attention(**exact, window=9, sinks=2, softcap=softcap)
    got, _ = run(fast, 9, 2, softcap=softcap)
    assert distance(got, wanted) <= 2e-6
    assert distance(got, naive_liger_attention(**exact, window=9, sinks=2)[0]) > 0.01
    weight = torch.randn(wanted.shape)
    names = list(x)
    found = torch.autograd.grad((got * weight).sum(), [fast[n] for n in names])
    true = torch.autograd.grad((wanted * weight).sum(), [exact[n] for n in names])
    for name, a, b in zip(names, found, true, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm(), name
    past = {n: torch.cat([torch.zeros_like(x[n][:, :9]), x[n]], 1) for n in ("k", "v", "k_log")}
    visible = torch.arange(69).expand(2, -1) >= 9
    leaving, before = past["k_log"][:, :60], None
    options = dict(window=9, sinks=2, softcap=softcap, output_final_state=True)
    args = x["q"][:, :59], past["k"][:, :68], past["v"][:, :68], x["q_log"][:, :59], leaving[:, :59], None, x["mix"]
    _, before = liger_attention(*args, visible=visible[:, :68], **options)
    args = x["q"][:, 59:], past["k"], past["v"], x["q_log"][:, 59:], leaving[:, 59:], None, x["mix"]
    with torch.no_grad():
        one, _ = liger_attention(*args, visible=visible, initial_state=before, **options)
    assert distance(one, wanted[:, 59:]) <= 1e-5


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 40))
def test_hidden_tokens_change_nothing(case, lead):
    x, window, sinks, _ = case
    alone, state = run(x, window, sinks)
    padded, padded_state = run(x, window, sinks, lead)
    assert distance(padded, alone.double()) <= 2e-6
    assert distance(padded_state, state.double()) <= 2e-6


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_the_future_changes_no_bit_of_the_past(case, data):
    x, window, sinks, _ = case
    T = x["q"].shape[1]
    t = data.draw(st.integers(0, T - 1))
    changed = {n: y if n == "mix" else torch.cat([y[:, :t], torch.randn_like(y[:, t:])], 1) for n, y in x.items()}
    if "g" in x:
        changed["g"] = torch.cat([x["g"][:, :t], -torch.rand_like(x["g"][:, t:]) * x["g"].abs().amax()], 1)
    torch.manual_seed(0)
    before = run(x, window, sinks)[0][:, :t]
    torch.manual_seed(0)
    after = run(changed, window, sinks)[0][:, :t]
    assert torch.equal(after, before)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 9))
def test_a_single_token_equals_the_last_of_many(case, lead):
    x, window, sinks, _ = case
    # A single output may cancel to almost nothing, where float32 says little.
    x = {n: y.double() for n, y in x.items()}
    whole, state = run(x, window, sinks, lead)
    T, last = x["q"].shape[1], {n: y if n == "mix" else y[:, -1:] for n, y in x.items()}
    B = len(x["q"])
    past = {n: torch.randn(B, lead + window, *x[n].shape[2:], dtype=torch.float64) for n in ("k", "v", "k_log")}
    keys = {n: torch.cat([past[n], x[n]], 1) for n in past}
    g = (
        torch.cat([-torch.ones(B, lead + window, *x["g"].shape[2:], dtype=torch.float64), x["g"]], 1)
        if "g" in x
        else None
    )
    visible = torch.arange(lead + window + T).expand(B, -1) >= lead + window
    shared = dict(window=window, sinks=sinks, output_final_state=True)
    before = None
    if lead + T > 1:
        part = slice(0, lead + T - 1)
        q, q_log = (
            torch.cat([torch.randn(B, lead, *x[n].shape[2:], dtype=torch.float64), x[n]], 1)[:, part]
            for n in ("q", "q_log")
        )
        gates = None if g is None else g[:, part]
        k, v = keys["k"][:, :-1], keys["v"][:, :-1]
        args = (q, k, v, q_log, keys["k_log"][:, part], gates, x["mix"])
        before = liger_attention(*args, visible=visible[:, :-1], **shared)[1]
    leaving = keys["k_log"][:, lead + T - 1 : lead + T]
    gates = None if g is None else g[:, lead + T - 1 : lead + T]
    with torch.no_grad():
        args = (last["q"], keys["k"], keys["v"], last["q_log"], leaving, gates, x["mix"])
        o, after = liger_attention(*args, visible=visible, initial_state=before, **shared)
    assert distance(o, whole[:, -1:]) <= 1e-12
    assert distance(after, state) <= 1e-12


def test_mix_zero_is_the_window_alone():
    x = dict(q=torch.randn(2, 90, 4, 8), k=torch.randn(2, 90, 2, 8), v=torch.randn(2, 90, 2, 8), mix=torch.zeros(4))
    x |= dict(q_log=torch.randn(2, 90, 4, 6), k_log=torch.randn(2, 90, 2, 6), g=-torch.rand(2, 90, 2))
    assert distance(run(x, 16, 3)[0], sliding_window_attention(x["q"], x["k"], x["v"], 16, 3).double()) <= 1e-6


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_scores_stay_exact(size):
    """Sinks that beat every key in the window by hundreds, and the reverse, next to features of no weight."""
    x = dict(q=torch.randn(1, 70, 2, 8), k=torch.randn(1, 70, 1, 8) * size, v=torch.randn(1, 70, 1, 4))
    x |= dict(mix=torch.ones(2), q_log=torch.randn(1, 70, 2, 4), k_log=torch.full((1, 70, 1, 4), -200.0))
    wanted = naive_sliding_window_attention(*(x[n].double() for n in "qkv"), 16, 3)
    assert distance(run(x, 16, 3)[0], wanted) <= 2e-5 * size / 30


@pytest.mark.parametrize("height", [11.0, 20.0])
def test_large_features_under_strong_decays(height):
    x = dict(q=torch.randn(1, 70, 2, 8), k=torch.randn(1, 70, 1, 8), v=torch.randn(1, 70, 1, 4), mix=torch.ones(2))
    x |= dict(q_log=torch.randn(1, 70, 2, 4), k_log=height + torch.rand(1, 70, 1, 4))
    x["g"] = torch.full((1, 70, 1, 4), -4.9)
    fast, exact = ({n: y.to(t).requires_grad_() for n, y in x.items()} for t in (torch.float32, torch.float64))
    got, wanted = run(fast, 16, 3)[0], naive_liger_attention(**exact, window=16, sinks=3)[0]
    assert distance(got, wanted) <= 2e-6
    weight = torch.randn(got.shape)
    for n in ("q_log", "k_log", "v"):
        a, b = (
            torch.autograd.grad((o * weight).sum(), y[n], retain_graph=True)[0]
            for o, y in ((got, fast), (wanted, exact))
        )
        assert distance(a, b) <= 1e-4, n


def test_extreme_features_stay_finite():
    x = torch.randn(1, 80, 2, 8)
    k = torch.cat([torch.zeros(1, 4, 2, 8), x], 1)
    for size in (1e4, -1e4):
        log = torch.full((1, 80, 2, 6), size)
        o, _ = liger_attention(x, k, k, log, log, None, window=4)
        assert torch.isfinite(o).all()


def test_inputs_are_left_as_they_were():
    """One key/value head: its layout is already the packed one, where an in-place step would reach the caller."""
    x = dict(q=torch.randn(1, 64, 1, 8), k=torch.randn(1, 68, 1, 8), v=torch.randn(1, 68, 1, 8))
    x |= dict(q_log=torch.randn(1, 64, 1, 6), k_log=torch.randn(1, 64, 1, 6), g=-torch.rand(1, 64, 1))
    kept = {n: y.clone() for n, y in x.items()}
    with torch.no_grad():
        liger_attention(**x, window=4, sinks=2)
    assert all(torch.equal(y, kept[n]) for n, y in x.items())


def test_bad_arguments_are_named():
    x = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="k: expected at least T"):
        liger_attention(x, x, x, x, x, None, window=4)
    k = torch.randn(1, 13, 2, 8)
    mixes = (-1.0, "a", True, 1j, torch.inf, -torch.ones(2), torch.tensor([1.0, torch.nan]), torch.ones(2) * 1j)
    others = (("q_log", None), ("softcap", True), ("scale", True), ("scale", torch.tensor(torch.nan)), ("sinks", 2**63))
    for name, value in (*(("mix", mix) for mix in mixes), *others):
        options = dict(q_log=x, mix=1.0) | {name: value}
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            liger_attention(x, k, k, k_log=x, g=None, window=4, **options)
