"""Steps on a pool of states beside the ops whose tokens they are."""

import pytest
import torch

from liger_ops import (
    fused_recurrent_gla,
    fused_recurrent_gsa,
    fused_recurrent_rwkv6,
    gated_step,
    gsa_step,
    mlstm,
    mlstm_step,
    naive_delta_rule,
)

B, T, H, HQ, K, V, M, S = 4, 5, 2, 4, 8, 6, 5, 9
# The second request has no state.
SLOTS = torch.tensor([7, -1, 0, 3])
LIVE = SLOTS >= 0


def decay(*shape):
    return -torch.rand(*shape)


def tokens(steps, pools):
    """Every step in turn, the rows that no request owns untouched; outputs [B,T,HQ,V] and the owned rows."""
    before = [x.clone() for x in pools]
    o = torch.stack([steps(t) for t in range(T)], 1)
    others = [row for row in range(S) if row not in SLOTS.tolist()]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(pools, before, strict=True))
    assert not o[~LIVE].any()
    return o[LIVE], [x[SLOTS[LIVE]] for x in pools]


def start(pools):
    return tuple(x[SLOTS[LIVE]].clone() for x in pools)


def close(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()


def qkv():
    return torch.randn(B, T, HQ, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)


@pytest.mark.parametrize("by_key", [True, False])
def test_two_gates(by_key):
    (q, k, v), g, gv = qkv(), decay(B, T, H, K) if by_key else None, decay(B, T, H, V)
    pool = torch.randn(S, H, K, V)
    parts = [x if x is None else x[LIVE] for x in (q, k, v, g, gv)]
    wanted = fused_recurrent_gla(*parts, None, *start([pool]), True)

    def step(t):
        gate = None if g is None else g[:, t]
        return gated_step(q[:, t], k[:, t], v[:, t], gate, pool, SLOTS, gv=gv[:, t])

    o, (state,) = tokens(step, [pool])
    close((o, state), wanted)


def test_rwkv6():
    (q, k, v), w, u, pool = qkv(), decay(B, T, H, K), torch.randn(HQ, K), torch.randn(S, H, K, V)
    wanted = fused_recurrent_rwkv6(*(x[LIVE] for x in (q, k, v, w)), u, 0.4, *start([pool]), True)
    o, (state,) = tokens(lambda t: gated_step(q[:, t], k[:, t], v[:, t], w[:, t], pool, SLOTS, 0.4, u=u), [pool])
    close((o, state), wanted)


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_delta_rule(gate):
    (q, k, v), beta, pool = qkv(), 2 * torch.rand(B, T, H), torch.randn(S, H, K, V)
    k = torch.nn.functional.normalize(k, dim=-1)
    g = {"none": None, "head": decay(B, T, H), "channel": decay(B, T, H, K)}[gate]
    parts = (x if x is None else x[LIVE] for x in (q, k, v, beta, g))
    wanted = naive_delta_rule(*parts, initial_state=pool[SLOTS[LIVE]])

    def step(t):
        return gated_step(q[:, t], k[:, t], v[:, t], g if g is None else g[:, t], pool, SLOTS, beta=beta[:, t])

    o, (state,) = tokens(step, [pool])
    close((o, state), wanted)


def test_slots():
    (q, k, v), s, g = qkv(), torch.randn(B, T, H, M), decay(B, T, H, M)
    pool = torch.randn(S, H, K, M), torch.randn(S, H, M, V)
    o, states = fused_recurrent_gsa(*(x[LIVE] for x in (q, k, v, s, g)), None, start(pool), True)
    found, held = tokens(lambda t: gsa_step(*(x[:, t] for x in (q, k, v, s, g)), pool, SLOTS), pool)
    close((found, *held), (o, *states))


def test_mlstm():
    (q, k, v), i, f = qkv(), 5 * torch.randn(B, T, H), decay(B, T, H)
    q, k = q.abs(), k.abs()
    pool = torch.randn(S, H, K, V), torch.rand(S, H, K), torch.randn(S, H)
    o, states = mlstm(*(x[LIVE] for x in (q, k, v, i, f)), initial_state=start(pool), output_final_state=True)
    found, held = tokens(lambda t: mlstm_step(*(x[:, t] for x in (q, k, v, i, f)), pool, SLOTS), pool)
    close((found, *held), (o, *states))


def test_a_long_text_of_mlstm():
    """Rounding of the unit, up as often as down, does not add up."""
    q, k, v, i, f = torch.rand(2, 300, 2, 8), torch.rand(2, 300, 2, 8), *(torch.randn(2, 300, 2, n) for n in (6, 1, 1))
    i, f = 10 * i.squeeze(-1), torch.nn.functional.logsigmoid(f.squeeze(-1) + 4)
    pool = torch.zeros(2, 2, 8, 6), torch.zeros(2, 2, 8), torch.zeros(2, 2)
    wanted, _ = mlstm(*(x.double() for x in (q, k, v, i, f)))
    o = [mlstm_step(*(x[:, t] for x in (q, k, v, i, f)), pool, torch.arange(2)) for t in range(300)]
    assert (torch.stack(o, 1) - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_request_without_a_state_harms_nobody():
    """Whatever it holds, and whatever the row holds that stands in for its own."""
    q, k, v, s = (torch.randn(3, H, K) for _ in range(4))
    gate = -torch.rand(3, H)
    slots, ok = torch.tensor([1, -1, 2]), [0, 2]
    for bad in (float("nan"), float("inf")):
        x = [y.clone() for y in (q, k, v, s, gate)]
        for y in x:
            y[1] = bad
        q1, k1, v1, s1, g1 = x
        pools = [torch.ones(3, H, K, K), torch.ones(3, H, K), torch.ones(3, H)]
        for pool in pools:
            pool[0] = bad
        C, n, m = pools
        for o in (
            gated_step(q1, k1, v1, g1, C.clone(), slots),
            gsa_step(q1, k1, v1, s1, -s1.abs(), (C.clone(), C.clone()), slots),
            mlstm_step(q1, k1, v1, g1, g1, (C, n, m), slots),
        ):
            assert torch.isfinite(o[ok]).all() and not o[1].any()
        assert torch.isfinite(C[1:]).all() and torch.isfinite(m[1:]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype):
    q, k, v, u = (torch.randn(64, H, 24).to(dtype) for _ in range(4))
    wide = [x.double() for x in (q, k, v)]
    own = ((wide[0] * u[0].double()) * wide[1]).sum(-1, keepdim=True) * wide[2] * 24**-0.5
    seen = (wide[0] * wide[1]).sum(-1, keepdim=True) * wide[2] * 24**-0.5
    for wanted, bonus in ((seen, None), (own, u[0])):
        o = gated_step(q, k, v, None, torch.zeros(64, H, 24, 24), torch.arange(64), u=bonus)
        assert (o - wanted).norm() <= 1.05 * (wanted.to(dtype) - wanted).norm()


def test_steps_record_nothing():
    """A pool changes in place: no graph may hold on to what it was."""
    q, k, v = (torch.randn(4, H, K).requires_grad_() for _ in range(3))
    pools = torch.zeros(S, H, K, K), torch.zeros(S, H, K), torch.zeros(S, H)
    assert not gated_step(q, k, v, None, pools[0], SLOTS, u=torch.randn(H, K)).requires_grad
    assert not gsa_step(q, k, v, k, -k.abs(), (pools[0], pools[0].clone()), SLOTS).requires_grad
    assert not mlstm_step(q, k, v, k[..., 0], -k[..., 0].abs(), pools, SLOTS).requires_grad
    assert not any(x.requires_grad for x in pools)


def test_steps_know_no_autocast():
    q, k, v = torch.randn(4, HQ, K), torch.randn(4, H, K), torch.randn(4, H, V)
    wanted = gated_step(q, k, v, None, torch.ones(S, H, K, V), SLOTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_step(q, k, v, None, torch.ones(S, H, K, V), SLOTS), wanted)


def test_steps_compile_into_one_graph():
    q, k, v, pool = torch.randn(4, HQ, K), torch.randn(4, H, K), torch.randn(4, H, V), torch.randn(S, H, K, V)
    twin = pool.clone()
    compiled = torch.compile(lambda *x: gated_step(*x[:3], None, *x[3:]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, twin, SLOTS), gated_step(q, k, v, None, pool, SLOTS))
    assert torch.equal(twin, pool)


X, POOL = torch.randn(B, H, K), torch.zeros(S, H, K, K)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gated_step(X, X, X, None, POOL, SLOTS, u=X), r"u: expected floating \[2, 8\]"),
        (lambda: gated_step(X, X, X, None, POOL, SLOTS, gv=-X), "gv: expected log decays <= 0"),
        (lambda: gated_step(X, X, X, None, torch.zeros(S, H, K, K + 1), SLOTS, u=X[0], normalize=True), "normalize: "),
        (lambda: mlstm_step(X, X, X, X[..., 0], -X[..., 0].abs(), (POOL, POOL[..., 0], POOL), SLOTS), "pool, m: "),
        (lambda: mlstm_step(X, X, X, X, -X[..., 0].abs(), (POOL, POOL[..., 0], POOL[..., 0, 0]), SLOTS), "i: "),
        (lambda: gsa_step(X, X, X, X, -X.abs(), (POOL, POOL[..., :3]), SLOTS), r"pool\[1\]: expected float32"),
        (lambda: gsa_step(X, X, X, X, None, (POOL, POOL), SLOTS), r"g: expected shape \[4, 2, 8\], got None"),
        (lambda: gsa_step(X, X, X, None, -X.abs(), (POOL, POOL), SLOTS), "s: expected a tensor, got NoneType"),
        (lambda: gsa_step(X, X, X, X, -X.abs(), POOL, SLOTS), r"pool: expected \(hk, hv\), got Tensor"),
        (lambda: mlstm_step(X, X, X, X[..., 0], None, (POOL,) * 3, SLOTS), "f: expected a tensor, got NoneType"),
        (
            lambda: mlstm_step(X, X, X, X[..., 0], X[..., 0], (POOL,), SLOTS),
            "pool: expected .* got tuple of 1",
        ),
        (lambda: gated_step(None, X, X, None, POOL, SLOTS), "q: expected a tensor, got NoneType"),
        (lambda: gsa_step(X, X, X, X, X.abs(), (POOL, POOL), SLOTS), "g: expected log decays <= 0"),
        (lambda: gsa_step(X, X, X, X[:, :, 0], -X.abs(), (POOL, POOL), SLOTS), "s: expected"),
        (lambda: gated_step(X, X, X, None, POOL, [0, 1, 2, 3]), "slots: expected a tensor, got list"),
        (lambda: gated_step(X, X, X, None, POOL, SLOTS, beta=X[..., 0] + 9), "beta: expected write strengths"),
        (lambda: gated_step(X, X, X, None, POOL, SLOTS, beta=X[..., 0] * 0, u=X[0]), "beta: expected None with gv, u"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
