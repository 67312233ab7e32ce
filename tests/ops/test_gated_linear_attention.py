"""The chunked recurrence against the naive one in float64, and the identities it must keep."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import chunk_gla, chunk_simple_gla, fused_recurrent_gla, naive_recurrence
from tests.strategies import MAGNITUDES, Case, cases, decay


def run(case: Case, dtype=torch.float32, leaves=None, **options):
    q, k, v, g, state = leaves if leaves is not None else case.leaves(dtype)
    shared = dict(
        initial_state=state, output_final_state=True, normalize=case.normalize, cu_seqlens=case.cu_seqlens, **options
    )
    if case.gate == "channel":
        return chunk_gla(q, k, v, g, **shared)
    if case.gate == "head":
        return chunk_simple_gla(q, k, v, g, **shared)
    if case.gate == "fixed":
        return chunk_simple_gla(q, k, v, g_gamma=g, **shared)
    return chunk_simple_gla(q, k, v, **shared)


def distance(got: torch.Tensor, wanted: torch.Tensor, floor: float = 1e-6) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=floor)).item()


def gradients(outputs, leaves, weights):
    loss = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, [x for x in leaves if x is not None])


@settings(max_examples=150)
@given(cases())
def test_output_state_and_every_gradient_match_naive_float64(case):
    exact, fast = case.leaves(torch.float64), case.leaves(torch.float32)
    wanted = naive_recurrence(*exact[:4], initial_state=exact[4], normalize=case.normalize, cu_seqlens=case.cu_seqlens)
    got = run(case, leaves=fast)
    assert got[1].dtype == torch.float32
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert distance(a, b) <= 1e-6
    if case.q.numel() == 0:
        return
    weights = [torch.randn(x.shape) for x in wanted]
    names = [n for n, x in zip("qkvgh", exact, strict=True) if x is not None]
    pairs = list(zip(names, gradients(got, fast, weights), gradients(wanted, exact, weights), strict=True))
    # Scaling q or k changes no normalised output: such gradients are differences that may cancel to nothing.
    floor = max(b.norm().item() for _, _, b in pairs) if case.normalize else 1e-6
    for name, a, b in pairs:
        assert torch.isfinite(a).all(), name
        assert distance(a, b, floor) <= (1e-5 if name == "g" else 2e-6), name


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("gate", ["channel", "head", "fixed"])
def test_strong_gates_over_several_chunks(gate, magnitude):
    B, T, H, K = 2, 150, 2, 16
    q, k, v = torch.randn(B, T, 4, K), torch.randn(B, T, H, K), torch.randn(B, T, H, 20)
    case = Case(q, k, v, decay(gate, magnitude, B, T, H, K), None, None, False, gate)
    wanted = naive_recurrence(*(None if x is None else x.double() for x in (q, k, v, case.g)))
    for dtype, bar in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        for a, b in zip(run(case, dtype), wanted, strict=True):
            assert distance(a, b) <= bar


def test_minus_infinity_is_an_exact_reset():
    q, k, v = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    g = -torch.rand(1, 40, 2, 8)
    g[:, 21] = -float("inf")
    whole, _ = chunk_gla(q, k, v, g)
    k[:, :21], v[:, :21] = torch.randn(1, 21, 2, 8), 1e6
    changed, _ = chunk_gla(q, k, v, g)
    assert torch.equal(whole[:, 21:], changed[:, 21:])


@settings(max_examples=60)
@given(cases(packed=False, max_length=100), st.data())
def test_split_anywhere_equals_whole(case, data):
    cut = data.draw(st.integers(0, case.q.shape[1]))
    whole, final = run(case)
    parts, state = [], case.initial_state
    for part in (slice(0, cut), slice(cut, None)):
        g = case.g if case.g is None or case.g.ndim == 1 else case.g[:, part]
        piece = Case(case.q[:, part], case.k[:, part], case.v[:, part], g, state, None, case.normalize, case.gate)
        o, state = run(piece)
        parts.append(o)
    assert distance(torch.cat(parts, 1), whole) <= 1e-6
    assert distance(state, final) <= 1e-6


@settings(max_examples=60)
@given(cases(packed=True))
def test_packed_equals_separate(case):
    packed, states = run(case)
    bounds = case.cu_seqlens.tolist()
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        g = case.g if case.g is None or case.g.ndim == 1 else case.g[:, a:b]
        state = None if case.initial_state is None else case.initial_state[n : n + 1]
        alone = Case(case.q[:, a:b], case.k[:, a:b], case.v[:, a:b], g, state, None, case.normalize, case.gate)
        o, final = run(alone)
        assert distance(o, packed[:, a:b]) <= 1e-6
        assert distance(final, states[n : n + 1]) <= 1e-6


@settings(max_examples=40)
@given(cases(packed=False), st.sampled_from((16, 32, 64, 128)))
def test_chunk_size_changes_nothing(case, size):
    for a, b in zip(run(case, chunk_size=size), run(case, chunk_size=24), strict=True):
        assert distance(a, b) <= 1e-6


@settings(max_examples=40)
@given(cases(packed=False, magnitudes=(0.0, -1e-4, -1.39)), st.data())
def test_the_future_changes_no_bit_of_the_past(case, data):
    cut = data.draw(st.integers(1, case.q.shape[1]))
    before, _ = run(case)
    with torch.no_grad():
        for x in (case.q, case.k, case.v):
            x[:, cut:] += torch.rand_like(x[:, cut:])
    after, _ = run(case)
    assert torch.equal(before[:, :cut], after[:, :cut])


@pytest.mark.parametrize("shape", [(1, 0), (0, 5)])
def test_a_loss_of_nothing_has_gradients(shape):
    leaves = [torch.randn(*shape, 2, 4, requires_grad=True) for _ in range(3)]
    for x in torch.autograd.grad(chunk_simple_gla(*leaves)[0].sum(), leaves):
        assert x.shape == (*shape, 2, 4)


@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_gradients_over_several_segments_match_naive_float64(gate):
    B, T, H, K, V = 2, 1100, 2, 16, 12
    g = None if gate == "none" else -0.05 * torch.rand(B, T, H, *([K] if gate == "channel" else []))
    q, k, v, state = (torch.randn(B, *rest) for rest in ((T, 4, K), (T, H, K), (T, H, V), (H, K, V)))
    case = Case(q, k, v, g, state, None, False, gate)
    exact, fast = case.leaves(torch.float64), case.leaves(torch.float32)
    wanted, got = naive_recurrence(*exact[:4], initial_state=exact[4]), run(case, leaves=fast)
    weights = [torch.randn(x.shape) for x in wanted]
    for a, b in zip(gradients(got, fast, weights), gradients(wanted, exact, weights), strict=True):
        assert distance(a, b) <= 1e-6


@settings(max_examples=80)
@given(cases(packed=False))
def test_batch_rows_in_another_order_have_the_same_bits(case):
    order = torch.randperm(case.q.shape[0])
    moved = [x if x is None or x.ndim == 1 else x[order] for x in (case.q, case.k, case.v, case.g, case.initial_state)]
    seen = []
    for each, place in ((case, order), (Case(*moved, None, case.normalize, case.gate), slice(None))):
        leaves = each.leaves(torch.float32)
        outputs = run(each, leaves=leaves)
        found = [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves[:3])]
        seen.append([x.detach()[place] for x in found])
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_half_precision_stays_at_its_rounding_floor(gate, dtype):
    B, T, H, K = 2, 100, 2, 16
    tensors = [torch.randn(B, T, 4, K), torch.randn(B, T, H, K), torch.randn(B, T, H, 16)]
    q, k, v = (x.to(dtype) for x in tensors)
    g = decay(gate, -0.1, B, T, H, K)
    o, state = run(Case(q, k, v, g, None, None, False, gate), leaves=(q, k, v, g, None))
    wanted, final = naive_recurrence(*(None if x is None else x.double() for x in (q, k, v, g)))
    floor = distance(wanted.to(dtype), wanted)
    assert o.dtype == dtype and state.dtype == torch.float32
    assert distance(o, wanted) <= 1.6 * floor
    assert distance(state, final) <= 1e-6


def test_non_contiguous_inputs_and_partial_gradients():
    q, k, v = (torch.randn(2, 3, 50, 8).transpose(1, 2) for _ in range(3))
    g = -torch.rand(2, 50, 3)
    wanted, _ = naive_recurrence(q.double(), k.double(), v.double(), g.double())
    k.requires_grad_()
    o, _ = chunk_simple_gla(q, k, v, g)
    assert distance(o, wanted) <= 1e-6
    (grad,) = torch.autograd.grad(o.square().sum(), k)
    assert torch.isfinite(grad).all()


def bad(**changes):
    arguments = dict(
        q=torch.randn(2, 9, 4, 8), k=torch.randn(2, 9, 2, 8), v=torch.randn(2, 9, 2, 8), g=-torch.rand(2, 9, 2, 8)
    )
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.randn(2, 9, 8)), r"q: expected \[batch, time, heads, width\]"),
        (dict(q=torch.randn(2, 9, 3, 8)), "q: expected a positive multiple of"),
        (dict(k=torch.randn(2, 8, 2, 8)), "k: expected"),
        (dict(v=torch.randn(2, 9, 3, 8)), "v: expected"),
        (dict(v=torch.randn(2, 9, 2, 8, dtype=torch.float64)), "v: expected torch.float32 as q"),
        (dict(g=torch.rand(2, 9, 2, 8) + 0.1), "g: expected log decays <= 0"),
        (dict(g=-torch.rand(2, 9, 2)), "g: expected shape"),
        (dict(initial_state=torch.randn(2, 2, 8, 9)), "initial_state: expected shape"),
        (dict(cu_seqlens=torch.tensor([0, 9])), "cu_seqlens: expected batch 1"),
        (dict(cu_seqlens_cpu=torch.tensor([0, 9])), "cu_seqlens: expected the bounds of cu_seqlens_cpu"),
        (dict(initial_state=torch.randn(8), state_v_first=True), r"initial_state: expected \[N, H, V, K\]"),
        (dict(q=torch.randn(2, 9, 4, 0), k=torch.randn(2, 9, 2, 0)), "q: expected a width of at least 1"),
        (dict(chunk_size=0), "chunk_size: expected an integer"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        chunk_gla(**bad(**changes))


def test_cu_seqlens_must_rise():
    x = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens: expected bounds that rise"):
        chunk_simple_gla(x, x, x, cu_seqlens=torch.tensor([0, 5, 3, 9]))


def test_large_keys_under_strong_gates_keep_their_gradients():
    """A factored chunk would reach beyond float32 here, at first in the gradients only."""
    q, k, v = (torch.randn(1, 32, 1, 4) for _ in range(3))
    for size in (1e4, 1e8):
        leaves = [x.clone().requires_grad_() for x in (q, k * size, v, torch.full((1, 32, 1, 4), -4.95))]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        o, wanted = chunk_gla(*leaves)[0], naive_recurrence(*exact)[0]
        assert distance(o, wanted) <= 1e-6
        weight = torch.randn(o.shape)
        for a, b in zip(
            torch.autograd.grad((o * weight).sum(), leaves),
            torch.autograd.grad((wanted * weight).sum(), exact),
            strict=True,
        ):
            assert distance(a, b) <= 1e-5


@pytest.mark.parametrize("depth", [1.0, 39.0, 45.0, 75.0, 90.0, 1e4])
@pytest.mark.parametrize("gate", ["channel", "head", "value"])
def test_a_strong_gate_amid_weak_ones_blurs_no_pair_behind_it(gate, depth):
    """Behind it every running sum is long, and every decay between two rows is weak."""
    T, H, D = 50, 2, 20
    q, k, v = torch.randn(1, T, 2 * H, D), torch.randn(1, T, H, D), torch.randn(1, T, H, D)
    g = -0.05 * torch.rand(1, T, H, *([] if gate == "head" else [D]))
    g[:, 3::16] -= depth
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    if gate == "value":
        got = fused_recurrent_gla(*leaves[:3], gv=leaves[3])[0]
        wanted = naive_recurrence(*exact[:3], gv=exact[3])[0]
    else:
        op = chunk_gla if gate == "channel" else chunk_simple_gla
        got, wanted = op(*leaves)[0], naive_recurrence(*exact)[0]
    assert distance(got, wanted) <= 1e-6
    weights = [torch.randn(wanted.shape)]
    for name, a, b in zip("qkvg", gradients([got], leaves, weights), gradients([wanted], exact, weights), strict=True):
        assert distance(a, b) <= (1e-5 if name == "g" else 2e-6), name


def test_no_rows_at_all():
    x = torch.randn(0, 9, 2, 8)
    o, state = chunk_simple_gla(x, x, x, output_final_state=True)
    assert o.shape == (0, 9, 2, 8) and state.shape == (0, 2, 8, 8)


@pytest.mark.parametrize("kept", [1.0, 0.9999, 0.99])
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_a_million_steps_do_not_drift(kept, gate):
    T, K = 1_000_000, 2
    k, v = torch.randn(1, T, 1, K), torch.randn(1, T, 1, K) + 0.1
    shape = (1, T, 1, K) if gate == "channel" else (1, T, 1)
    g = torch.full(shape, math.log(kept), dtype=torch.float64).float()
    op = chunk_gla if gate == "channel" else chunk_simple_gla
    with torch.no_grad():
        o, state = op(k, k, v, g, output_final_state=True)
    # What the float32 gate keeps, not what it was rounded from.
    weight = (g[0, 0].double().flatten()[0] * torch.arange(T - 1, -1, -1)).exp().view(T, 1)
    wanted = (k[0, :, 0].double() * weight).T @ v[0, :, 0].double()
    assert distance(state[0, 0], wanted) <= 2e-4
    assert distance(o[0, -1, 0], K**-0.5 * k[0, -1, 0].double() @ wanted) <= 2e-4


@pytest.mark.parametrize("depth", [0.1, 5.0, 10.0, 30.0])
@pytest.mark.parametrize("gate", ["channel", "head", "value"])
def test_the_final_state_tells_the_gates_of_a_last_chunk_that_is_not_full(gate, depth):
    """Rows of padding, and the last one, keep everything: nothing of that may stay in the gates' gradient."""
    T, H, D = 60, 2, 16
    q, k, v = (torch.randn(1, T, H, D) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v, torch.full((1, T, H, *([] if gate == "head" else [D])), -depth))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    if gate == "value":
        got = fused_recurrent_gla(*leaves[:3], gv=leaves[3], output_final_state=True)
        wanted = naive_recurrence(*exact[:3], gv=exact[3])
    else:
        got = (chunk_gla if gate == "channel" else chunk_simple_gla)(*leaves, output_final_state=True)
        wanted = naive_recurrence(*exact)
    weights = [torch.randn(x.shape) for x in wanted]
    for name, a, b in zip("qkvg", gradients(got, leaves, weights), gradients(wanted, exact, weights), strict=True):
        assert distance(a, b) <= 2e-6, name


@pytest.mark.parametrize("gate", ["channel", "head"])
def test_the_rounding_of_a_constant_gate_does_not_add_up(gate):
    q, k, v = (torch.rand(1, 1000, 2, 8) for _ in range(3))
    g = torch.full((1, 1000, 2, 8) if gate == "channel" else (1, 1000, 2), -3e-4)
    got = (chunk_gla if gate == "channel" else chunk_simple_gla)(q, k, v, g, output_final_state=True)
    for a, b in zip(got, naive_recurrence(*(x.double() for x in (q, k, v, g))), strict=True):
        assert distance(a, b) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_keys_to_come_change_no_bit(dtype):
    """Nor do they choose the arithmetic of what came before them, in either direction."""
    q, k, v = (torch.randn(1, 64, 2, 8, dtype=dtype) for _ in range(3))
    g = -(3 + torch.rand(1, 64, 2, 8, dtype=dtype))
    later = k.clone()
    later[:, 40:] *= 2000

    def run(k):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g)]
        o, _ = chunk_gla(*leaves)
        return o, *torch.autograd.grad(o[:, :40].square().sum(), leaves)

    for a, b in zip(run(k), run(later), strict=True):
        assert torch.equal(a[:, :40], b[:, :40])


def test_a_loss_scale_overflows_no_gate_gradient():
    q, k, v = (torch.randn(1, 32, 1, 128) for _ in range(3))
    g = torch.full((1, 32, 1, 128), -5.0).requires_grad_()
    o, _ = chunk_gla(q, k, v, g)
    assert torch.isfinite(torch.autograd.grad((o * torch.randn_like(o)).sum() * 2.0**24, g)[0]).all()


def test_what_a_large_state_keeps_is_kept_by_every_split():
    q, k, v = torch.randn(1, 32, 2, 8), torch.zeros(1, 32, 2, 8), torch.randn(1, 32, 2, 8)
    g, state = torch.full((1, 32, 2), -2.3), 1e10 * torch.randn(1, 2, 8, 8)
    for size in (16, 32):
        _, last = chunk_simple_gla(q, k, v, g, initial_state=state, output_final_state=True, chunk_size=size)
        assert distance(last, state.double() * math.exp(-2.3 * 32), 0.0) <= 1e-5
