"""Routing: the order of entries, what goes out and comes back, the balancing loss, and no word to the host.

Shapes: B batch, T time, D documents, M memories, R memories per token, E = B * T * R entries.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from liger_layers import MixtureOfMemories, load_balancing_loss
from liger_layers._routing import dispatch, memory_load, route
from liger_layers.mixture_of_memories import ShortConvolution


def routing(seed):
    """Choices of a router full of ties, of padded rows or of packed documents, some of them empty."""
    # One drawn number and a generator of its own: seeding torch takes longer than all the rest.
    at = torch.Generator().manual_seed(seed)
    M, T, B, cuts, shared, masked, packed = torch.randint(0, 8, (7,), generator=at).tolist()
    M, B, bounds = M % 4 + 1, B % 3 + 1, None
    if packed > 3:
        cuts = torch.randint(0, T + 1, (cuts % 4,), generator=at)
        B, bounds = 1, torch.cat([cuts.new_zeros(1), cuts.sort().values, cuts.new_full((1,), T)])
    chosen = torch.randint(0, 2, (B, T, M), generator=at).topk(seed % M + 1).indices
    if shared > 3:
        chosen = torch.cat([chosen, torch.full((B, T, 1), M)], -1)
    mask = torch.rand(B, T, generator=at) < 0.7 if masked > 3 else None
    return chosen, M + (shared > 3), mask, bounds


@settings(max_examples=10_000)
@given(st.integers(0, 2**31))
def test_a_memory_gets_its_tokens_once_and_in_order(seed):
    chosen, memories, mask, bounds = routing(seed)
    B, T, R = chosen.shape
    starts = None if bounds is None else bounds.tolist()
    sequences = B if bounds is None else len(starts) - 1
    wanted = [[] for _ in range(sequences * memories + 1)]
    real = None if mask is None else mask.tolist()
    for b, row in enumerate(chosen.tolist()):
        for t, own in enumerate(row):
            n = b if starts is None else next(d for d in range(sequences) if starts[d] <= t < starts[d + 1])
            for r, m in enumerate(own):
                lost = real is not None and not real[b][t]
                wanted[-1 if lost else n * memories + m].append((b * T + t) * R + r)
    made = dispatch(chosen, memories, mask, bounds)
    ends = made.cu_seqlens.tolist()
    order = made.order.tolist()
    assert [order[a:b] for a, b in itertools.pairwise(ends)] == wanted
    assert ends[0] == 0 and ends[-1] == B * T * R


def test_ties_choose_distinct_memories_with_weights_that_sum_to_one():
    logits = torch.randint(-1, 2, (50, 5)).float()
    weights, chosen = route(logits.to(torch.bfloat16), 3)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    wanted = logits.exp().gather(1, chosen)
    assert weights.dtype == torch.float32
    assert (weights - wanted / wanted.sum(1, keepdim=True)).abs().max() <= 1e-6
    assert (logits.gather(1, chosen) - logits.sort(1, descending=True).values[:, :3]).abs().max() == 0


def case(B=2, T=9, M=4, top_k=2):
    chosen = route(torch.randn(B, T, M), top_k)[1]
    return chosen, M, torch.rand(B, T) < 0.6


def test_what_goes_out_comes_back():
    """Sums of what each token sent to its memories, weighted; nothing, not even -0 or NaN, at padding."""
    chosen, M, mask = case()
    made, weights = dispatch(chosen, M, mask), torch.randn(chosen.shape)
    x, own = torch.randn(2, 9, 3, 5), torch.randn(2, 9, M, 3)
    sent = made.gather(x)
    assert sent.shape == (1, 36, 3, 5)
    wanted = x * weights.sum(-1)[..., None, None] * mask[..., None, None]
    assert (made.scatter(sent, weights) - wanted).abs().max() <= 1e-5
    sent = made.gather_chosen(own)
    wanted = (own.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, 3)) * weights.unsqueeze(-1)).sum(2)
    assert (made.scatter(sent, weights) - wanted * mask.unsqueeze(-1)).abs().max() <= 1e-5
    sent[:, made.cu_seqlens[-2] :] = torch.nan
    assert not made.scatter(sent, weights)[~mask].any()


def test_gradients_come_back_the_same_way():
    chosen, M, mask = case()
    chosen, weights, mask = chosen[:, :4], torch.randn(2, 4, 2, dtype=torch.float64), mask[:, :4]
    made = dispatch(chosen, M, mask)
    x, own = (torch.randn(2, 4, n, dtype=torch.float64, requires_grad=True) for n in (3, M))
    leaves = x, own, weights.requires_grad_()
    both = lambda x, own, w: made.scatter(made.gather(x) * made.gather_chosen(own).unsqueeze(-1), w)  # noqa: E731
    assert torch.autograd.gradcheck(both, leaves)


class Silent(TorchDispatchMode):
    """Refuses what waits for a device, and a sort that a GPU may do in another order."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "_unique2", "is_nonzero"):
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("a boolean index waits for the device")
        assert name != "sort" or kwargs["stable"], "ties may change places"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_host(packed):
    chosen, M, mask = case(B=1)
    bounds = torch.tensor([0, 4, 9]) if packed else None
    weights = torch.randn(chosen.shape, requires_grad=True)
    x = torch.randn(1, 9, 3, requires_grad=True)
    with Silent():
        made = dispatch(chosen, M, mask, bounds)
        made.scatter(made.gather(x), weights).sum().backward()
        loss = load_balancing_loss(torch.randn(9, 4), 2, mask)
    assert torch.isfinite(loss) and x.grad is not None
    with pytest.raises(AssertionError, match="waits"), Silent():
        chosen[mask]


def test_the_layer_outside_its_op_does_not_wait_either(monkeypatch):
    from liger_layers.recurrences import UpdateRule

    def free(self, q, k, v, gates, own, sizes, state, cu_seqlens, max_seqlen):
        return q * v.repeat_interleave(2, 2), state

    monkeypatch.setattr(UpdateRule, "run", free)
    layer = MixtureOfMemories(16, 4, num_kv_heads=2, router_shift=True)
    with Silent():
        layer(torch.randn(2, 9, 16), torch.rand(2, 9) < 0.6)[0].sum().backward()


def test_it_compiles_whole():
    chosen, M, mask = case()
    x, weights = torch.randn(2, 9, 3), torch.randn(chosen.shape)

    def there_and_back(x, weights, chosen, mask):
        made = dispatch(chosen, M, mask)
        return made.scatter(made.gather(x), weights), made.cu_seqlens

    wanted = there_and_back(x, weights, chosen, mask)
    got = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x, weights, chosen, mask)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_layer_compiles_whole():
    layer, x = MixtureOfMemories(16, 4, rule="linear", router_shift=True), torch.randn(2, 9, 16)
    for mask in (None, torch.rand(2, 9) < 0.7):
        got, wanted = torch.compile(layer, fullgraph=True, backend="eager")(x, mask)[0], layer(x, mask)[0]
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_bounds_of_documents_may_lie_elsewhere():
    convolution, before = ShortConvolution(16, 3).to("meta"), torch.empty(2, 2, 16, device="meta")
    y, previous, last = convolution(torch.empty(9, 16, device="meta"), before, torch.tensor([0, 4, 9]), True)
    assert y.shape == previous.shape == (9, 16) and last.shape == before.shape


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_loss_of_a_layer_is_that_of_transformers(top_k, padded):
    layers = tuple(torch.randn(14, 4, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 7) < 0.6 if padded else None
    wanted = sum(load_balancing_loss_func((layer,), 4, top_k, mask) for layer in layers) / 3
    got = load_balancing_loss(layers, top_k, mask)
    assert (got - wanted).abs() <= 1e-6 * wanted
    for a, b in zip(torch.autograd.grad(got, layers), torch.autograd.grad(wanted, layers), strict=True):
        assert (a - b).abs().max() <= 1e-6
    one = load_balancing_loss(layers[0], top_k, mask)
    assert (one - load_balancing_loss_func(layers[:1], 4, top_k, mask)).abs() <= 1e-6 * one


def test_layers_do_not_balance_one_another():
    """Two memories are all that each layer uses, and all four are used equally."""
    first = torch.tensor([9.0, 8.0, 0.0, 0.0]).expand(10, 4)
    assert load_balancing_loss([first, first.flip(1)], 2) >= 3.9
    assert load_balancing_loss([torch.zeros(10, 4)] * 2, 2) == 2


def test_loads_are_fractions_of_real_tokens():
    logits, mask = torch.randn(20, 4), torch.rand(20) < 0.5
    logits[:, 2] = -100.0
    chosen = logits.topk(2).indices
    wanted = torch.stack([(chosen[mask] == m).any(-1).float().mean() for m in range(4)])
    got = memory_load(logits, 2, mask)
    assert (got - wanted).abs().max() <= 1e-6 and got[2] == 0
    nothing = torch.zeros(20, dtype=torch.bool)
    assert not memory_load(logits, 2, nothing).any()
    assert load_balancing_loss(logits, 2, nothing) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 3, 4), 2), "router_logits: expected"),
        (([], 2), "router_logits: expected"),
        ((torch.randn(6, 4), 5), "top_k: expected a number from 1 to 4 memories, got 5"),
        ((torch.randn(6, 4), 2, torch.ones(2, 2)), "mask: expected 6 tokens"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_balancing_loss(*arguments)
