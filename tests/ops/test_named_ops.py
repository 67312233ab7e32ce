"""Each op of the additive family under its own name: against its token-by-token definition, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import (
    chunk_gla,
    chunk_gsa,
    chunk_hgrn2,
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_rwkv6,
    chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_gsa,
    fused_recurrent_hgrn2,
    fused_recurrent_lightning_attn,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_rwkv6,
    fused_recurrent_simple_gla,
    gated_step,
    mlstm,
    naive_gsa,
    naive_mlstm,
    naive_recurrence,
    naive_rwkv6,
)
from tests.ops.test_gated_linear_attention import distance
from tests.strategies import MAGNITUDES, decay


@st.composite
def shapes(draw, longest: int = 60):
    """B, T, H, G, K, V, M, a gate's magnitude; and the seed is set."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    small = [draw(st.integers(1, 3)), draw(st.integers(0, longest)), draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    return (*small, *(draw(st.integers(1, 20)) for _ in range(3)), draw(st.sampled_from(MAGNITUDES)))


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [z for y in x if y is not None for z in flat(y)]


def compare(fast, naive, inputs, state, bars=(1e-6, 2e-6), floor=1e-6):
    """fast and naive map (inputs, state) to (o, state); outputs and every gradient against float64."""

    def leaves(dtype):
        new = {n: x.detach().to(dtype).requires_grad_() for n, x in inputs.items()}
        return new, None if state is None else [x.detach().to(dtype).requires_grad_() for x in state]

    a, b = leaves(torch.float32), leaves(torch.float64)
    got, wanted = flat(fast(*a)), flat(naive(*b))
    for x, y in zip(got, wanted, strict=True):
        assert x.shape == y.shape
        assert distance(x, y, floor) <= bars[0]
    with torch.no_grad():
        for x, y in zip(flat(fast(*a)), wanted, strict=True):
            assert distance(x, y, floor) <= bars[0]
    if not got[0].numel():
        return
    weights = [torch.randn(x.shape) for x in got]
    grads = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(out, weights, strict=True)),
            [*new.values(), *(held or [])],
            allow_unused=True,
        )
        for out, (new, held) in ((got, a), (wanted, b))
    ]
    largest = max(y.norm().item() for y in grads[1] if y is not None)
    for x, y in zip(*grads, strict=True):
        if y is not None:
            assert torch.isfinite(x).all()
            assert (x.double() - y).norm() <= bars[1] * y.norm() + 1e-6 * largest


@settings(max_examples=60, deadline=None)
@given(shapes(), st.booleans(), st.booleans())
def test_decay_per_value_channel(case, both, held):
    B, T, H, G, K, V, _, size = case
    x = dict(q=torch.randn(B, T, H * G, K), k=torch.randn(B, T, H, K), v=torch.randn(B, T, H, V))
    x["gv"] = decay("channel", size, B, T, H, V)
    if both:
        x["g"] = decay("channel", size, B, T, H, K)
    compare(
        lambda x, s: fused_recurrent_gla(
            x["q"], x["k"], x["v"], x.get("g"), x["gv"], None, s and s[0], output_final_state=True
        ),
        lambda x, s: naive_recurrence(**x, initial_state=s and s[0]),
        x,
        [torch.randn(B, H, K, V)] if held else None,
        (1e-6, 1e-5),
    )


@settings(max_examples=60, deadline=None)
@given(shapes(), st.booleans())
def test_rwkv6(case, held):
    B, T, H, G, K, V, _, size = case
    x = dict(r=torch.randn(B, T, H * G, K), k=torch.randn(B, T, H, K), v=torch.randn(B, T, H, V))
    x |= dict(w=decay("channel", size, B, T, H, K), u=torch.randn(H * G, K))
    compare(
        lambda x, s: chunk_rwkv6(**x, initial_state=s and s[0], output_final_state=True),
        lambda x, s: naive_rwkv6(**x, initial_state=s and s[0]),
        x,
        [torch.randn(B, H, K, V)] if held else None,
        (1e-6, 1e-5),
    )


@settings(max_examples=60, deadline=None)
@given(shapes(), st.booleans(), st.booleans())
def test_gsa(case, gated, held):
    B, T, H, G, K, V, M, size = case
    x = dict(q=torch.randn(B, T, H * G, K), k=torch.randn(B, T, H, K), v=torch.randn(B, T, H, V))
    x["s"] = torch.randn(B, T, H, M)
    if gated:
        x["g"] = decay("channel", size, B, T, H, M)
    elif T == 0:
        return
    compare(
        lambda x, s: chunk_gsa(**x, initial_state=s and tuple(s), output_final_state=True),
        lambda x, s: naive_gsa(**x, initial_state=s and tuple(s)),
        x,
        [torch.randn(B, H, K, M), torch.randn(B, H, M, V)] if held else None,
        (2e-6, 1e-5),
    )


@settings(max_examples=60, deadline=None)
@given(shapes(), st.booleans(), st.sampled_from([-60.0, -3.0, 0.0, 3.0, 60.0]))
def test_mlstm(case, held, height):
    B, T, H, G, K, V, _, size = case
    x = dict(q=torch.randn(B, T, H * G, K), k=torch.randn(B, T, H, K), v=torch.randn(B, T, H, V))
    x |= dict(i=height + 2 * torch.randn(B, T, H), f=decay("head", size, B, T, H, K))
    unit = torch.randn(B, H)
    state = [torch.randn(B, H, K, V), torch.randn(B, H, K)] if held else None
    if height > -1:
        # The denominator is then a sum of large terms: signed ones may cancel, and nothing compares.
        x["q"], x["k"] = x["q"].abs() + 0.1, x["k"].abs() + 0.1
        state = state and [state[0], state[1].abs()]

    def fast(x, s):
        o, (C, n, m) = mlstm(**x, initial_state=s and (*s, unit), output_final_state=True)
        # Plain units, so that the states compare whatever unit they were kept in.
        m = m.exp()[..., None]
        return o, C * m[..., None], n * m

    compare(
        fast,
        lambda x, s: naive_mlstm(**x, initial_state=s and (*s, unit.double())),
        x,
        state,
        # float32 holds a logarithm near 60 to 4e-6, and its exponential no better.
        (2e-6 + 1.2e-7 * abs(height), 1e-5 + 1.2e-7 * abs(height)),
    )


def test_mlstm_reads_nothing_where_nothing_was_written():
    """0 / max(0, 1) is 0, also where the floor underflows beside the unit."""
    q, k, v = (torch.randn(1, 70, 2, 8) for _ in range(3))
    q[:, 7], k[:, :3] = 0.0, 0.0
    leaves = [x.requires_grad_() for x in (q, k, v, torch.full((1, 70, 2), 200.0), -torch.ones(1, 70, 2))]
    o, _ = mlstm(*leaves)
    assert not o[:, [0, 1, 2, 7]].any() and torch.isfinite(o).all()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_normaliser_of_zero_and_a_large_one(dtype):
    """Neither divides by zero nor overflows in the dtype of the inputs, nor rounds twice."""
    q, k, v = (torch.randn(1, 70, 2, 8).relu().to(dtype) for _ in range(3))
    k[:, :3] = 0.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = chunk_linear_attn(*leaves)
    assert not o[:, :3].any() and torch.isfinite(o).all()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(o.sum(), leaves))
    ones = torch.full((1, 300, 1, 64), 8.0, dtype=dtype)
    o, _ = chunk_linear_attn(ones, ones, v[:, 20:21].expand(1, 300, 2, 8)[:, :, :1])
    assert distance(o, v[:, 20:21, :1].expand_as(o)) <= 1e-6
    q, k, v = (torch.rand(1, 200, 2, 24).to(dtype) for _ in range(3))
    wanted, _ = naive_recurrence(q.double(), k.double(), v.double(), normalize=True)
    floor = distance(wanted.to(dtype), wanted)
    assert distance(chunk_linear_attn(q, k, v)[0], wanted) <= max(1.05 * floor, 1e-6)


def test_mlstm_survives_input_gates_that_overflow():
    x = dict(q=torch.randn(1, 90, 2, 8), k=torch.randn(1, 90, 2, 8), v=torch.randn(1, 90, 2, 8))
    i, f = torch.linspace(-500, 500, 90).view(1, 90, 1).repeat(1, 1, 2), -torch.rand(1, 90, 2)
    o, (C, n, m) = mlstm(**x, i=i, f=f, output_final_state=True)
    assert all(torch.isfinite(y).all() for y in (o, C, n, m))
    # The last token's gate dwarfs all others, and what it wrote is read back over its own key.
    own = (x["q"][:, -1] * x["k"][:, -1]).sum(-1, keepdim=True)
    assert torch.allclose(o[:, -1], x["v"][:, -1] * own / own.abs(), atol=1e-2)


def test_hgrn2_and_fixed_decays_are_what_they_say():
    q, v, g = torch.randn(2, 50, 4, 8), torch.randn(2, 50, 2, 6), -torch.rand(2, 50, 2, 8) * 1e-3
    wanted = naive_recurrence(q.double(), -torch.expm1(g.double()), v.double(), g.double())
    for op in (chunk_hgrn2, fused_recurrent_hgrn2):
        for x, y in zip(op(q, v, g, output_final_state=True), wanted, strict=True):
            assert distance(x, y) <= 1e-6
    k = torch.randn(2, 50, 2, 8)
    fixed = {
        "retention": (
            torch.log(1 - 2.0 ** (-5 - torch.arange(2.0).double())),
            (chunk_retention, fused_recurrent_retention),
            (),
        ),
        "lightning": (
            -(8 / 2) * (1 - 3 / 12) * torch.arange(2.0).double(),
            (chunk_lightning_attn, fused_recurrent_lightning_attn),
            (3, 12),
        ),
    }
    for gamma, ops, arguments in fixed.values():
        wanted = naive_recurrence(q.double(), k.double(), v.double(), gamma)
        for op in ops:
            for x, y in zip(op(q, k, v, *arguments, output_final_state=True), wanted, strict=True):
                assert distance(x, y) <= 1e-6


def test_step_and_fixed_decay_add_up():
    q, k, v, g = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8), -torch.rand(1, 40, 2)
    gamma = -torch.rand(2)
    both, _ = chunk_simple_gla(q, k, v, g, gamma)
    assert torch.allclose(both, chunk_simple_gla(q, k, v, g + gamma)[0])


def test_linear_attention_returns_the_pair_it_takes():
    q, k, v = torch.rand(2, 40, 4, 8) + 0.1, torch.rand(2, 40, 2, 8) + 0.1, torch.randn(2, 40, 2, 6)
    whole, (h, z) = chunk_linear_attn(q, k, v, output_final_state=True)
    assert h.shape == (2, 2, 8, 6) and z.shape == (2, 1, 2, 8)
    assert torch.allclose(z.squeeze(1), k.sum(1), rtol=1e-5)
    wanted, _ = naive_recurrence(q.double(), k.double(), v.double(), normalize=True)
    assert distance(whole, wanted) <= 1e-6
    first, state = chunk_linear_attn(q[:, :15], k[:, :15], v[:, :15], output_final_state=True)
    second, _ = fused_recurrent_linear_attn(q[:, 15:], k[:, 15:], v[:, 15:], None, state, normalize=True)
    assert distance(torch.cat([first, second], 1), wanted) <= 1e-6
    plain, state = chunk_linear_attn(q, k, v, normalize=False, output_final_state=True)
    assert torch.is_tensor(state) and distance(plain, naive_recurrence(q.double(), k.double(), v.double())[0]) <= 1e-6
    with pytest.raises(ValueError, match=r"initial_state: expected \(h, z\)"):
        chunk_linear_attn(q, k, v, initial_state=state)


REVERSIBLE = {
    "gla": lambda x, **o: fused_recurrent_gla(x["q"], x["k"], x["v"], x["g"], **o),
    "simple_gla": lambda x, **o: fused_recurrent_simple_gla(x["q"], x["k"], x["v"], x["g"].mean(-1), **o),
    "retention": lambda x, **o: fused_recurrent_retention(x["q"], x["k"], x["v"], **o),
    "lightning": lambda x, **o: fused_recurrent_lightning_attn(x["q"], x["k"], x["v"], 1, 4, **o),
    "linear": lambda x, **o: fused_recurrent_linear_attn(x["q"], x["k"], x["v"], **o),
    "hgrn2": lambda x, **o: fused_recurrent_hgrn2(x["q"], x["v"], x["g"], **o),
    "rwkv6": lambda x, **o: fused_recurrent_rwkv6(x["q"], x["k"], x["v"], x["g"], x["u"], **o),
    "gsa": lambda x, **o: fused_recurrent_gsa(x["q"], x["k"], x["v"], x["s"], x["g"][..., :5], **o),
}


def tensors(T):
    x = dict(q=torch.randn(1, T, 4, 8), k=torch.randn(1, T, 2, 8), v=torch.randn(1, T, 2, 6), u=torch.randn(4, 8))
    return x | dict(g=-torch.rand(1, T, 2, 8), s=torch.randn(1, T, 2, 5))


@pytest.mark.parametrize("name", REVERSIBLE)
@pytest.mark.parametrize("lengths", [(40,), (0, 13, 1, 26), (0, 0)])
def test_packed_and_reversed(name, lengths):
    """Each sequence alone, flipped, gives what the packed op gives in reverse."""
    T = sum(lengths)
    x, op = tensors(T), REVERSIBLE[name]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    for reverse in (False, True):
        o, state = op(x, cu_seqlens=bounds, reverse=reverse, output_final_state=True)
        for n, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            part = {n: y if n == "u" else y[:, a:b] for n, y in x.items()}
            part = {n: y if n == "u" or not reverse else y.flip(1) for n, y in part.items()}
            alone, final = op(part, output_final_state=True)
            alone = alone.flip(1) if reverse else alone
            assert torch.allclose(o[:, a:b], alone, atol=1e-5)
            for whole, one in zip(flat(state), flat(final), strict=True):
                assert torch.allclose(whole[n : n + 1], one, atol=1e-5)


@pytest.mark.parametrize("op", [chunk_gla, fused_recurrent_gla, chunk_simple_gla, fused_recurrent_simple_gla])
def test_states_may_come_value_first(op):
    q, k, v, state = (
        torch.randn(2, 30, 4, 8),
        torch.randn(2, 30, 2, 8),
        torch.randn(2, 30, 2, 6),
        torch.randn(2, 2, 8, 6),
    )
    g = -torch.rand(2, 30, 2, 8) if "simple" not in op.__name__ else -torch.rand(2, 30, 2)
    o, final = op(q, k, v, g, initial_state=state, output_final_state=True)
    swapped, last = op(q, k, v, g, initial_state=state.transpose(-1, -2), output_final_state=True, state_v_first=True)
    assert torch.equal(o, swapped) and torch.equal(final.transpose(-1, -2), last)


@pytest.mark.parametrize("rank", [None, 2, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_step_on_the_pool_is_a_token_of_the_op(rank, normalize):
    B, H, G, K, V, S = 4, 2, 3, 8, 6, 9
    q, k, v = torch.rand(B, H * G, K), torch.rand(B, H, K), torch.randn(B, H, V)
    g = None if rank is None else -torch.rand(B, H, K) if rank == 3 else -torch.rand(B, H)
    pool, slots = torch.rand(S, H, K, V + normalize) + 0.1, torch.tensor([7, -1, 0, 3])
    before = pool.clone()
    o = gated_step(q, k, v, g, pool, slots, normalize=normalize)
    live = slots >= 0
    op = chunk_gla if rank == 3 else chunk_simple_gla
    wanted, state = op(
        *(None if x is None else x[live].unsqueeze(1) for x in (q, k, v, g)),
        initial_state=before[slots[live]],
        output_final_state=True,
        normalize=normalize,
    )
    assert torch.allclose(o[live], wanted[:, 0], atol=1e-5) and not o[~live].any()
    assert torch.allclose(pool[slots[live]], state, atol=1e-6)
    untouched = [s for s in range(S) if s not in slots.tolist()]
    assert torch.equal(pool[untouched], before[untouched])
