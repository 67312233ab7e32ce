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


X, POOL = torch.randn(B, H, K), torch.zeros(S, H, K, K)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gated_step(X, X, X, None, POOL, SLOTS, u=X), r"u: expected shape \[2, 8\]"),
        (lambda: gated_step(X, X, X, None, POOL, SLOTS, gv=-X), "gv: expected log decays <= 0"),
        (lambda: gated_step(X, X, X, None, torch.zeros(S, H, K, K + 1), SLOTS, u=X[0], normalize=True), "normalize: "),
        (lambda: mlstm_step(X, X, X, X[..., 0], -X[..., 0].abs(), (POOL, POOL[..., 0], POOL), SLOTS), "pool, m: "),
        (lambda: mlstm_step(X, X, X, X, -X[..., 0].abs(), (POOL, POOL[..., 0], POOL[..., 0, 0]), SLOTS), "i: "),
        (lambda: gsa_step(X, X, X, X, -X.abs(), (POOL, POOL[..., :3]), SLOTS), "pool: expected float32"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
