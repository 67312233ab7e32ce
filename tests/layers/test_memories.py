"""Mixture of Memories against its memories one by one in float64, and what routing, padding and packing must keep.

Shapes: B batch, T time, D documents, M memories, HQ query heads, H key/value heads, K head width.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from liger_layers import LinearMixer, MemoryState, MixtureOfMemories, load_balancing_loss
from liger_layers.recurrences import with_rule
from liger_ops import naive_delta_rule, naive_gsa, naive_mlstm, naive_recurrence, naive_rwkv6

HIDDEN, HQ, H, K, V = 24, 4, 2, 6, 8
RULES = list(with_rule())


def make(rule="gated_deltanet", **options) -> MixtureOfMemories:
    """A layer whose parameters have all left their start, so that memories and heads differ."""
    options = dict(num_kv_heads=H, head_dim=K, value_dim=V, memories=3, slots=5, layer_idx=1, num_layers=4) | options
    layer = MixtureOfMemories(HIDDEN, HQ, rule=rule, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
        if layer.router is not None:
            layer.router.weight.mul_(4)
    return layer


def unit(x):
    return F.silu(x) / (F.silu(x).square().sum(-1, keepdim=True) + 1e-6).sqrt()


def naive(rule, q, k, v, raw, own, m):
    """One memory's tokens, [1,n,...] in float64: the rule from its paper, on numbers as projected."""
    decay = own["A_log"][m].exp() if "A_log" in own else None
    head = torch.arange(H, dtype=torch.float64)
    if rule == "linear":
        return naive_recurrence(F.elu(q) + 1, F.elu(k) + 1, v)
    if rule == "retention":
        return naive_recurrence(q, k, v, (1 - 2 ** (-5 - head)).log())
    if rule == "lightning":
        return naive_recurrence(F.silu(q), F.silu(k), v, -8 / H * (1 - 1 / 4) * head)
    if rule in ("simple_gla", "mamba2"):
        return naive_recurrence(q, k, v, -decay * F.softplus(raw[..., 0]))
    if rule == "gated_retention":
        return naive_recurrence(q, k, v, raw[..., 0].sigmoid().log() / 16)
    if rule == "gla":
        return naive_recurrence(q, k, v, raw.sigmoid().log() / 16)
    if rule == "hgrn2":
        return naive_recurrence(F.silu(q), 1 - raw.sigmoid(), v, raw.sigmoid().log())
    if rule == "rwkv6":
        return naive_rwkv6(q, k, v, -raw.exp(), own["u"])
    if rule == "gsa":
        kept = raw.sigmoid() ** (1 / 16)
        return naive_gsa(F.silu(q), F.silu(k), v, 1 - kept, kept.log())
    if rule == "mlstm":
        return naive_mlstm(q, k, v, raw[..., 0], raw[..., 1].sigmoid().log())
    beta = raw[..., -1].sigmoid()
    if rule == "deltanet":
        return naive_delta_rule(unit(q), unit(k), v, beta)
    if rule == "gated_deltanet":
        return naive_delta_rule(unit(q), unit(k), v, beta, -decay * F.softplus(raw[..., 0]))
    return naive_delta_rule(unit(q), unit(k), v, beta, -decay.unsqueeze(-1) * F.softplus(raw[..., :-1]))


def one_text(layer, x):
    """x [T,hidden], real tokens of one text -> y and the states of its memories [M,H,...], in Python loops."""
    p = {n: w.detach().double() for n, w in layer.named_parameters()}
    own = {n.split(".")[1]: w for n, w in p.items() if n.startswith("rule_parameters.")}
    x, h = x.double(), x.double()
    if layer.convolution is not None:
        taps = p["convolution.weight"]
        h = torch.stack([sum(taps[-1 - j] * x[t - j] for j in range(min(t + 1, len(taps)))) for t in range(len(x))])
        h = F.silu(h)
    M, total = layer.memories, layer.memories + layer.shared

    def projected(name, m, at):
        if getattr(layer, name) is None:
            return None
        weight, bias = p[f"{name}.weight"].chunk(total)[m], p.get(f"{name}.bias")
        read = x if name == "gate_proj" and layer.rule != "hgrn2" else h
        y = read[at] @ weight.T if bias is None else read[at] @ weight.T + bias.chunk(total)[m]
        return y.view(1, len(at), H, len(weight) // H)

    weight = torch.zeros(len(x), total, dtype=torch.float64)
    for t in range(len(x) if M else 0):
        asked = x[t]
        if layer.router_gate is not None:
            a = (x[t] @ p["router_gate.weight"][0] + p["router_gate.bias"]).sigmoid()
            asked = a * x[t] + (1 - a) * (x[t - 1] if t else torch.zeros_like(x[t]))
        share = (asked @ p["router.weight"].T).exp()
        best = sorted(range(M), key=lambda m: -share[m])[: layer.top_k]
        weight[t, best] = share[best] / share[best].sum()
    if layer.shared:
        weight[:, M] = 1
    q, o, states = (h @ p["q_proj.weight"].T).view(1, -1, HQ, K), torch.zeros(len(x), HQ, V, dtype=torch.float64), []
    for m in range(total):
        at = [t for t in range(len(x)) if weight[t, m] > 0]
        k, v, raw = (projected(name, m, at) for name in ("k_proj", "v_proj", "gate_proj"))
        out, state = naive(layer.rule, q[:, at], k, v, raw, own, m)
        o[at] += weight[at, m, None, None] * out[0]
        states.append(state if isinstance(state, tuple) else (state,))
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * p["norm.weight"]
    y = (o.flatten(1) * F.silu(x @ p["g_proj.weight"].T)) @ p["o_proj.weight"].T
    return y, [torch.cat(part) for part in zip(*states, strict=True)]


def distance(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-9)).item()


def plain(rule, memories):
    """States in plain units: mLSTM's last tensor is the logarithm of the unit of the others."""
    if rule != "mlstm":
        return memories
    C, n, m = memories
    return C * m.exp()[..., None, None], n * m.exp().unsqueeze(-1)


def check(layer, texts, y, state):
    """texts [n_i,hidden], y the same in float32, state a MemoryState of as many rows."""
    for i, (text, got) in enumerate(zip(texts, y, strict=True)):
        wanted, states = one_text(layer, text)
        assert distance(got, wanted) <= 1e-5
        for a, b in zip(plain(layer.rule, state.memories), states, strict=True):
            assert a.dtype == torch.float32 and distance(a[i], b) <= 1e-5


def padded(layer, sizes=(11, 17, 4)):
    """Left padding of large numbers, or of NaN, which nothing may read."""
    T = max(sizes)
    x, mask = torch.randn(len(sizes), T, HIDDEN), torch.arange(T) >= T - torch.tensor(sizes)[:, None]
    x[~mask] = torch.where(torch.rand(HIDDEN) < 0.5, 1e4, torch.nan)
    return x, mask, [x[i, mask[i]] for i in range(len(sizes))]


def pieces(layer, x, mask, sizes, recording):
    state, parts = None, []
    with torch.set_grad_enabled(recording):
        for part, real in zip(x.split(sizes, 1), mask.split(sizes, 1), strict=True):
            y, state = layer(part, real, state)
            parts.append(y)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("rule", RULES)
def test_memories_one_by_one(rule):
    layer, x = make(rule), torch.randn(2, 20, HIDDEN)
    check(layer, x, *layer(x))


@pytest.mark.parametrize("rule", RULES)
def test_padding_neither_writes_nor_decays(rule):
    layer = make(rule)
    x, mask, texts = padded(layer)
    y, state = layer(x, mask)
    assert not y[~mask].any()
    check(layer, texts, [y[i, mask[i]] for i in range(3)], state)


@pytest.mark.parametrize("rule", RULES)
def test_documents_have_memories_of_their_own(rule):
    layer, sizes = make(rule), [9, 0, 1, 14]
    x, bounds = torch.randn(1, 24, HIDDEN), torch.tensor([0, *sizes]).cumsum(0).int()
    y, state = layer(x, cu_seqlens=bounds)
    assert state.memories[0].shape[:3] == (4, 4, H)
    kept = [0, 2, 3]
    texts, outputs = ([z[0].split(sizes)[i] for i in kept] for z in (x, y))
    check(layer, texts, outputs, state.map(lambda s: s[kept]))
    assert not state.memories[0][1].any()
    # A single token is a text of its own here, not a row.
    token = torch.randn(1, 1, HIDDEN)
    y, _ = layer(token, cu_seqlens=torch.tensor([0, 0, 0, 1, 1]), state=state)
    assert distance(y[0], one_text(layer, torch.cat([x[0, 9:10], token[0]]))[0][1:]) <= 1e-5
    # Each document goes on from its own row; here in the other order of lengths, one of them padded.
    more, real = torch.randn(1, 10, HIDDEN), torch.rand(1, 10) < 0.8
    parts = [2, 5, 0, 3]
    y, _ = layer(more, real, state, torch.tensor([0, *parts]).cumsum(0))
    for i, (a, b, new, seen) in enumerate(
        zip(*(z[0].split(parts) for z in (y, more, real)), x[0].split(sizes), strict=True)
    ):
        if len(a):
            wanted, _ = one_text(layer, torch.cat([seen, b[new]]))
            assert distance(a[new], wanted[len(seen) :]) <= 1e-5, i


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_prefill_and_single_tokens_equal_the_whole(rule, recording):
    layer = make(rule)
    x, mask, texts = padded(layer)
    y, state = pieces(layer, x, mask, (9, 1, 1, 1, 1, 1, 3), recording)
    check(layer, texts, [y[i, mask[i]] for i in range(3)], state)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("rule", ["gated_deltanet", "gsa"])
def test_any_number_of_memories_per_token(rule, top_k, shared):
    layer, x = make(rule, top_k=top_k, shared=shared), torch.randn(2, 20, HIDDEN)
    check(layer, x, *layer(x))


@pytest.mark.parametrize("conv_size", [None, 0, 1, 2, 7])
def test_any_convolution(conv_size):
    layer = make(conv_size=conv_size)
    x, mask, texts = padded(layer)
    y, state = pieces(layer, x, mask, (2, 1, 3, 1, 10), False)
    check(layer, texts, [y[i, mask[i]] for i in range(3)], state)
    assert (state.inputs is None) == (not conv_size)


@pytest.mark.parametrize("conv_size", [2, 5])
def test_a_router_that_reads_the_token_before(conv_size):
    layer = make(router_shift=True, conv_size=conv_size)
    assert (layer.router_gate.bias + 2).abs() <= 1
    x, mask, texts = padded(layer)
    y, state = pieces(layer, x, mask, (2, 1, 3, 1, 10), False)
    check(layer, texts, [y[i, mask[i]] for i in range(3)], state)
    x, sizes = torch.randn(1, 24, HIDDEN), [9, 0, 1, 14]
    y, state = layer(x, cu_seqlens=torch.tensor([0, *sizes]).cumsum(0))
    kept = [0, 2, 3]
    check(layer, *([z[0].split(sizes)[i] for i in kept] for z in (x, y)), state.map(lambda s: s[kept]))


@pytest.mark.parametrize("shift", [False, True])
def test_padding_may_stand_anywhere(shift):
    layer, x, mask = make(router_shift=shift), torch.randn(3, 20, HIDDEN), torch.rand(3, 20) < 0.6
    y, state = pieces(layer, x, mask, (6, 1, 8, 5), False)
    check(layer, [x[i, mask[i]] for i in range(3)], [y[i, mask[i]] for i in range(3)], state)


@pytest.mark.parametrize("rule", ["mamba2", "kda"])
def test_a_single_memory_without_a_router(rule):
    layer = LinearMixer(HIDDEN, HQ, num_kv_heads=H, head_dim=K, value_dim=V, rule=rule)
    same = MixtureOfMemories(HIDDEN, HQ, memories=0, num_kv_heads=H, head_dim=K, value_dim=V, rule=rule)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, HIDDEN)
    assert torch.equal(layer(x)[0], same(x)[0])
    check(layer, x, *layer(x))
    assert layer.router is None and layer(x)[1].memories[0].shape == (2, 1, H, K, V)


@pytest.mark.parametrize("rule", RULES)
def test_every_parameter_gets_a_finite_gradient(rule):
    layer, x, mask = make(rule, router_shift=True), *padded(None)[:2]
    layer(x, mask)[0].square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


def test_gradients_of_a_shifted_router_go_back_into_the_piece_before():
    layer, x = make(router_shift=True).double(), torch.randn(1, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    mask, weights = torch.ones(1, 9, dtype=torch.bool), torch.randn(9, HIDDEN, dtype=torch.float64)
    wanted = torch.autograd.grad((layer(x)[0] * weights).sum(), x)[0]
    got = torch.autograd.grad((pieces(layer, x, mask, (4, 1, 4), True)[0] * weights).sum(), x)[0]
    assert distance(got, wanted) <= 1e-12


@pytest.mark.parametrize("shift", [False, True])
def test_gradients_are_those_of_the_memories_one_by_one(shift):
    """In float64, through router, weights, permutation and convolution."""
    layer, x = make(router_shift=shift).double(), torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, HIDDEN, dtype=torch.float64)
    (layer(x[None])[0][0] * weights).sum().backward()
    for name, p in (("x", x), *layer.named_parameters()):
        direction, values = torch.randn_like(p), []
        for size in (1e-6, -1e-6):
            moved, text = copy.deepcopy(layer), x.detach().clone()
            with torch.no_grad():
                (text if name == "x" else moved.get_parameter(name)).add_(size * direction)
            values.append((one_text(moved, text)[0] * weights).sum())
        slope = (values[0] - values[1]) / 2e-6
        assert ((p.grad * direction).sum() - slope).abs() <= 1e-5 * max(1.0, slope.abs().item()), name


@pytest.mark.parametrize("memories", [0, 3])
def test_float64_stays_float64(memories):
    layer, x = make(memories=memories).double(), torch.randn(1, 20, HIDDEN, dtype=torch.float64)
    y, state = layer(x)
    assert distance(y[0], one_text(layer, x[0])[0]) <= 1e-12
    assert state.memories[0].dtype == torch.float64


@pytest.mark.parametrize("rule", [rule for rule in RULES if with_rule()[rule].gates])
def test_gates_of_every_size(rule):
    layer, x = make(rule), torch.randn(2, 20, HIDDEN)
    with torch.no_grad():
        layer.gate_proj.weight.mul_(6)
    check(layer, x, *layer(x))
    layer.gate_proj.weight.data.mul_(1e4)
    y, state = layer(x)
    y.square().sum().backward()
    assert all(torch.isfinite(z).all() for z in (y, *state.memories, *(p.grad for p in layer.parameters())))


@pytest.mark.parametrize("rule", RULES)
def test_a_starved_memory_harms_nothing(rule):
    layer, x = make(rule), torch.randn(2, 12, HIDDEN)
    x[..., 0], seen = 1.0, []
    with torch.no_grad():
        layer.router.weight[1, 0] = -1e3
    layer.router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y, state = layer(x)
    (logits,) = seen
    assert logits.shape == (24, 3)
    load = layer.load(logits)
    assert load[1] == 0 and abs(load.sum().item() - 2) <= 1e-6
    assert not state.memories[0][:, 1].any()
    (y.square().sum() + load_balancing_loss(logits, 2)).backward()
    assert all(torch.isfinite(z).all() for z in (y, *state.memories, *(p.grad for p in layer.parameters())))
    # Its projections have seen nothing, those of the others have.
    grads = layer.v_proj.weight.grad.unflatten(0, (4, -1)).flatten(1).abs().sum(1)
    assert (grads > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("rule", RULES)
def test_a_token_leaves_other_memories_as_they_were(rule):
    layer, x, token = make(rule, top_k=1), torch.randn(1, 12, HIDDEN), torch.randn(1, 1, HIDDEN)
    _, state = layer(x)
    _, after = layer(token, None, state)
    chosen = layer.router(token).argmax().item()
    for a, b in zip(plain(rule, state.memories), plain(rule, after.memories), strict=True):
        moved = [(a[0, m] - b[0, m]).abs().max() > 0 for m in range(4)]
        assert moved == [m in (chosen, 3) for m in range(4)]


def test_rows_do_not_meet():
    layer, (x, mask, _), order = make(), padded(None), torch.tensor([2, 0, 1])
    x.requires_grad_()
    layer(x, mask)[0][1].sum().backward()
    assert x.grad[1][mask[1]].any() and not x.grad[[0, 2]].any()
    x = x.detach()
    y, state = layer(x, mask)
    again, moved = layer(x[order], mask[order])
    # A row's place among the others may change a rounding.
    assert distance(again, y[order]) <= 1e-6
    state = state.map(lambda s: s[order])
    assert isinstance(state, MemoryState)
    pairs = zip((*moved.memories, moved.inputs), (*state.memories, state.inputs), strict=True)
    assert all(distance(a, b) <= 1e-6 for a, b in pairs)


@pytest.mark.parametrize("rule", RULES)
def test_the_future_does_not_reach_the_past(rule):
    layer, x = make(rule), torch.randn(1, 30, HIDDEN)
    other = torch.cat([x[:, :17], torch.randn(1, 13, HIDDEN)], 1)
    assert distance(layer(other)[0][:, :17], layer(x)[0][:, :17]) <= 1e-6
    x.requires_grad_()
    layer(x)[0][:, :17].sum().backward()
    assert x.grad[:, :17].abs().sum() > 0 and not x.grad[:, 17:].any()


def test_the_state_has_one_size_and_keeps_no_prompt_alive():
    layer, sizes = make("mlstm"), set()
    for tokens in (1, 5, 50):
        _, state = layer(torch.randn(1, tokens, HIDDEN), torch.ones(1, tokens, dtype=torch.bool))
        sizes.add(state.nbytes())
        held = (*state.memories, state.inputs)
        assert sum(x.untyped_storage().nbytes() for x in held) == state.nbytes()
    assert sizes == {4 * (4 * H * (K * V + K + 1) + 3 * HIDDEN)}


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_and_autocast(rule):
    layer, x = make(rule, router_shift=True), torch.randn(2, 20, HIDDEN)
    wanted, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x)
        layer(x[:, :1], None, state)
        y.float().sum().backward()
    # A near tie of the router may fall elsewhere.
    assert (y.float() - wanted).norm() <= 0.3 * wanted.norm()
    y, state = layer.to(torch.bfloat16)(x.bfloat16())
    raw = torch.randn(4, H, sum(layer.update.widths(layer.sizes)), dtype=torch.bfloat16)
    gates = layer.update.activate(raw, layer.rule_parameters, layer.sizes)
    assert {g.dtype for g in gates.values()} <= {torch.float32}
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
    for held in (state, layer.initial_state(2, x.device, torch.bfloat16)):
        assert held.memories[0].dtype == torch.float32 and held.inputs.dtype == torch.bfloat16
    layer(x[:, :1].bfloat16(), None, state)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (0, 1)])
def test_nothing_in_nothing_out(shape):
    y, state = make()(torch.randn(*shape, HIDDEN))
    assert y.shape == (*shape, HIDDEN) and not state.memories[0].any() and len(state.inputs) == shape[0]


def test_layers_are_saved_whole():
    layer, file, x = make(), io.BytesIO(), torch.randn(1, 9, HIDDEN)
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], layer(x)[0])
