"""Every public op on the kernels beside the same op in PyTorch: one launch for all sequences, no bounds read."""

import pytest
import torch

import liger_ops
from liger_ops import _backend, _devices, errors
from liger_ops._backend import recurrence
from liger_ops._inputs import RecurrenceInputs
from tests.kernels.cases import distances
from tests.kernels.interpreter import mend_rounding, sanitized

mend_rounding()
T, HQ, H, K, V = 37, 4, 2, 24, 20
LENGTHS = {"whole": None, "packed": (0, 20, 1, 0, 16)}


def decay(*shape):
    return -torch.rand(*shape)


# What an op takes after q, k, v, in order or by name.
OPS = {
    "chunk_gla": lambda: dict(g=decay(1, T, H, K)),
    "fused_recurrent_gla": lambda: dict(gk=decay(1, T, H, K), reverse=True),
    "fused_recurrent_gla of values": lambda: dict(gv=decay(1, T, H, V)),
    "chunk_simple_gla": lambda: dict(g=decay(1, T, H), g_gamma=decay(H), normalize=False),
    "fused_recurrent_simple_gla": lambda: dict(g=decay(1, T, H), reverse=True),
    "chunk_retention": dict,
    "chunk_lightning_attn": lambda: dict(layer_idx=1, num_layers=4),
    "chunk_linear_attn": lambda: dict(normalize=False),
    "chunk_delta_rule": lambda: dict(beta=2 * torch.rand(1, T, H), use_qk_l2norm_in_kernel=True),
    "chunk_gated_delta_rule": lambda: dict(
        g=decay(1, T, H), beta=2 * torch.rand(1, T, H), use_qk_l2norm_in_kernel=True
    ),
    "fused_recurrent_kda": lambda: dict(
        g=decay(1, T, H, K), beta=torch.rand(1, T, H), use_qk_l2norm_in_kernel=True, reverse=True
    ),
    "chunk_rwkv6": lambda: dict(w=decay(1, T, H, K), u=torch.randn(HQ, K)),
    "fused_recurrent_rwkv6": lambda: dict(w=decay(1, T, H, K), u=torch.randn(HQ, K), reverse=True),
}


@pytest.fixture(autouse=True)
def _pytorch_first(monkeypatch):
    monkeypatch.setattr(_devices, "on_triton", lambda q: False)


def use_kernels(monkeypatch):
    monkeypatch.setattr(_devices, "on_triton", lambda q: True)


def run(name, q, k, v, more, state, lengths):
    leaves = {n: x.clone().requires_grad_() for n, x in dict(q=q, k=k, v=v, state=state).items()}
    tensors = {n: x.clone().requires_grad_() for n, x in more.items() if isinstance(x, torch.Tensor)}
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    shared = dict(initial_state=leaves["state"], output_final_state=True, cu_seqlens=cu_seqlens)
    o, last = getattr(liger_ops, name.split()[0])(*(leaves[n] for n in "qkv"), **(more | tensors), **shared)
    weights = torch.linspace(-1, 1, o.numel()).view(o.shape), torch.linspace(1, -1, last.numel()).view(last.shape)
    everything = [*leaves.values(), *tensors.values()]
    return [o, last, *torch.autograd.grad((o, last), everything, weights)]


def counted(monkeypatch):
    """The backends that run a recurrence from here on, in order: "recurrence_kernels" or "in_pytorch"."""
    ran = []

    def count(name, call):
        return lambda *args: ran.append(name) or call(*args)

    for name in ("recurrence_kernels", "in_pytorch"):
        monkeypatch.setattr(_backend, name, count(name, getattr(_backend, name)))
    return ran


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", OPS)
def test_ops_on_the_kernels(name, lengths, monkeypatch):
    q, k, v = torch.randn(1, T, HQ, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V)
    lengths = LENGTHS[lengths]
    more, state = OPS[name](), torch.randn(1 if lengths is None else len(lengths), H, K, V)
    ran = counted(monkeypatch)
    wanted = run(name, q, k, v, more, state, lengths)
    use_kernels(monkeypatch)
    found = run(name, q, k, v, more, state, lengths)
    assert ran == ["in_pytorch", "recurrence_kernels"]
    for n, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert (x - y).norm() <= 2e-6 * y.norm(), n


@pytest.mark.parametrize("lengths", LENGTHS)
def test_mlstm_on_the_kernels(lengths, monkeypatch):
    lengths = LENGTHS[lengths]
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    N = 1 if lengths is None else len(lengths)
    gates = 5 * torch.randn(1, T, H), decay(1, T, H) * 10 ** torch.randn(1, T, H)
    # Signed terms may cancel in the denominator, and then nothing compares.
    positive = torch.rand(1, T, HQ, K), torch.rand(1, T, H, K), torch.rand(N, H, K)
    leaves = [*positive[:2], torch.randn(1, T, H, V), *gates, torch.randn(N, H, K, V), positive[2]]
    weights = torch.randn(1, T, HQ, V)
    unit = 5 * torch.randn(N, H)

    def run(dtype):
        *x, C, n = given = [x.to(dtype).requires_grad_() for x in leaves]
        o, (C, n, m) = liger_ops.mlstm(*x, initial_state=(C, n, unit), output_final_state=True, cu_seqlens=cu_seqlens)
        return [o, C, n, m, *torch.autograd.grad((o * weights).sum() + C.sum() + n.sum(), given)]

    wanted = run(torch.float64)
    use_kernels(monkeypatch)
    for n, (x, y) in enumerate(zip(run(torch.float32), wanted, strict=True)):
        assert (x - y).norm() <= 2e-6 * y.norm(), n


def test_normalised_and_value_first(monkeypatch):
    q, k, v = torch.rand(2, T, HQ, K), torch.rand(2, T, H, K), torch.randn(2, T, H, V)
    args = q, k, v, decay(2, T, H, K), None, torch.rand(2, H, V + 1, K), True, True
    wanted = liger_ops.chunk_gla(*args, normalize=True)
    use_kernels(monkeypatch)
    for x, y in zip(liger_ops.chunk_gla(*args, normalize=True), wanted, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_normaliser_is_no_half(dtype, monkeypatch):
    """Values in float32 beside queries and keys in halves: sums neither overflow nor round before the division."""
    q, k, v = (torch.rand(1, T, n, d).to(dtype) for n, d in ((HQ, K), (H, K), (H, V)))
    leaves = [x.requires_grad_() for x in (q, k, v, decay(1, T, H, K))]

    def run():
        o, _ = liger_ops.chunk_gla(*leaves, normalize=True)
        return o, *torch.autograd.grad((o.float() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum(), leaves)

    wanted = run()
    use_kernels(monkeypatch)
    # States between chunks are kept in bfloat16 for it, and gradients of a quotient are differences.
    bars = [1e-3] * 5 if dtype == torch.float16 else [4e-3, *[2e-2] * 4]
    for x, y, bar in zip(run(), wanted, bars, strict=True):
        assert (x.float() - y.float()).norm() <= bar * y.float().norm()
    big = torch.full((1, 300, 1, 16), 30.0, dtype=dtype)
    assert torch.equal(liger_ops.chunk_linear_attn(big, big, big)[0], big)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing_to_do(lengths, monkeypatch):
    use_kernels(monkeypatch)
    q, k, v = torch.randn(1, 0, HQ, K), torch.randn(1, 0, H, K), torch.randn(1, 0, H, V)
    cu_seqlens, state = torch.tensor([0, *lengths]), torch.randn(len(lengths), H, K, V)
    o, last = liger_ops.chunk_gla(q, k, v, decay(1, 0, H, K), None, state, True, cu_seqlens=cu_seqlens)
    assert o.shape == (1, 0, HQ, V)
    assert torch.equal(last, state)
    last = liger_ops.chunk_gla(q, k, v, decay(1, 0, H, K), None, None, True, cu_seqlens=cu_seqlens)[1]
    assert torch.equal(last, torch.zeros_like(state))


def test_half_inputs_and_any_subset_of_gradients(monkeypatch):
    use_kernels(monkeypatch)
    q, k, v = (torch.randn(1, T, n, K).bfloat16() for n in (HQ, H, H))
    for n in range(3):
        leaves = [x.clone().requires_grad_(n == m) for m, x in enumerate((q, k, v))]
        o, last = liger_ops.chunk_simple_gla(*leaves, decay(1, T, H).bfloat16(), output_final_state=True)
        assert (o.dtype, last.dtype) == (torch.bfloat16, torch.float32)
        (o.float().sum() + last.sum()).backward()
        assert [x.grad is not None for x in leaves] == [n == m for m in range(3)]
        assert leaves[n].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_the_compiler_sees_one_op(gate, monkeypatch):
    use_kernels(monkeypatch)
    g = {"none": None, "head": decay(1, T, H), "channel": decay(1, T, H, K)}[gate]
    q, k, v = torch.randn(1, T, HQ, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V)
    leaves = [x if x is None else x.requires_grad_() for x in (q, k, v, g, torch.randn(3, H, K, V))]
    args = *leaves, torch.tensor([0, 20, 20, T]), K**-0.5, None, False
    strength = torch.rand(1, T, H).requires_grad_()
    for beta in (None, strength):
        torch.library.opcheck(torch.ops.liger_ops.recurrence_kernels.default, (*args[:4], None, beta, *args[4:]))
    # [B,H,T,D] underneath, as most models hold them.
    turned = [x if x is None else x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]
    do, dstate = torch.randn(1, T, HQ, V), torch.randn(3, H, K, V)
    for beta in (None, strength.detach().transpose(1, 2).contiguous().transpose(1, 2)):
        back = do, dstate, gate != "none", *turned[:4], None, beta, turned[4], *args[5:]
        torch.library.opcheck(
            torch.ops.liger_ops.recurrence_kernels_backward.default, back, test_utils="test_faketensor"
        )

    def call(*x):
        return recurrence(RecurrenceInputs(*x[:4], state=x[4], cu_seqlens=x[5], scale=K**-0.5))

    wanted, found = call(*args[:6]), torch.compile(call, fullgraph=True, backend="aot_eager")(*args[:6])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_fullgraph_with_packed_sequences(monkeypatch):
    """Bounds on the device stay there: no host read breaks the graph."""
    use_kernels(monkeypatch)
    q, k, v, g = torch.randn(1, T, HQ, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V), decay(1, T, H, K)
    cu_seqlens = torch.tensor([0, 20, 20, T])

    def call(q, k, v, g, cu_seqlens):
        return liger_ops.chunk_gla(q, k, v, g, output_final_state=True, cu_seqlens=cu_seqlens)

    found = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, g, cu_seqlens)
    assert all(torch.equal(x, y) for x, y in zip(found, call(q, k, v, g, cu_seqlens), strict=True))


def test_a_second_derivative_names_itself(monkeypatch):
    use_kernels(monkeypatch)
    q, k, v = (torch.randn(1, T, n, K).requires_grad_() for n in (HQ, H, H))
    o, _ = liger_ops.chunk_linear_attn(q, k, v, normalize=False)
    with pytest.raises(RuntimeError, match="liger_ops::recurrence_kernels_backward"):
        torch.autograd.grad(o.sum(), q, create_graph=True)


@pytest.mark.parametrize("erases", [False, True])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens(gate, tokens, erases, monkeypatch):
    """Forward token by token, backward on chunks."""
    q, k, v = torch.randn(2, tokens, HQ, K), torch.randn(2, tokens, H, K), torch.randn(2, tokens, H, V)
    shape = {"none": None, "head": (2, tokens, H), "channel": (2, tokens, H, K)}[gate]
    name = "chunk_gla" if gate == "channel" else "chunk_simple_gla"
    more, state = {} if shape is None else dict(g=decay(*shape)), torch.randn(2, H, K, V)
    if erases:
        name = {"none": "chunk_delta_rule", "head": "chunk_gated_delta_rule", "channel": "chunk_kda"}[gate]
        more |= dict(beta=2 * torch.rand(2, tokens, H), use_qk_l2norm_in_kernel=True)
    wanted = run(name, q, k, v, more, state, None)
    use_kernels(monkeypatch)
    with sanitized():
        found = run(name, q, k, v, more, state, None)
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_pool_of_states(gate, normalize, monkeypatch):
    """In place, addressed by slot; a negative slot is nobody's, and a row that no slot names keeps its bits."""
    q, k, v = torch.rand(4, HQ, K), torch.rand(4, H, K), torch.randn(4, H, V)
    g = {"none": None, "head": decay(4, H), "channel": decay(4, H, K)}[gate]
    pool, slots = torch.rand(6, H, K, V + normalize), torch.tensor([[4, 9], [-1, 9], [0, 9], [2, 9]])[:, 0]
    twin = pool.clone()
    wanted = liger_ops.gated_step(q, k, v, g, twin, slots, normalize=normalize)
    before = pool.clone()
    use_kernels(monkeypatch)
    with sanitized():
        found = liger_ops.gated_step(q, k, v, g, pool, slots, normalize=normalize)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert (pool - twin).norm() <= 1e-6 * twin.norm()
    assert torch.equal(pool[[1, 3, 5]], before[[1, 3, 5]])
    assert not found[1].any()


@pytest.mark.parametrize("per_head", [True, False])
def test_both_gates_token_by_token(per_head, monkeypatch):
    """Where nothing is differentiated; PyTorch does the rest."""
    q, k, v = torch.randn(2, T, HQ, K), torch.randn(2, T, H, K), torch.randn(2, T, H, V)
    g, gv = decay(2, T, H) if per_head else decay(2, T, H, K), decay(2, T, H, V)
    state = torch.randn(2, H, K, V)
    wanted = liger_ops.naive_recurrence(*(x.double() for x in (q, k, v, g)), None, state.double(), gv=gv.double())
    use_kernels(monkeypatch)
    with torch.no_grad(), sanitized():
        found = recurrence(RecurrenceInputs(q, k, v, g, gv, state=state, scale=K**-0.5))
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()
    leaves = [x.requires_grad_() for x in (q, k, v, g, gv)]
    o, _ = recurrence(RecurrenceInputs(*leaves, state=state, scale=K**-0.5))
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.parametrize("name", ["two gates", "values", "rwkv6", "gsa", "mlstm", "delta", "kda"])
def test_other_steps_on_a_pool(name, monkeypatch):
    M, slots = 12, torch.tensor([4, -1, 0, 2])
    q, k, v = torch.rand(4, HQ, K), torch.rand(4, H, K), torch.randn(4, H, V)
    pool, s, f = torch.rand(6, H, K, V), torch.randn(4, H, M), decay(4, H)

    def call():
        held, n, m = pool.clone(), torch.ones(6, H, K), torch.zeros(6, H)
        slotted = torch.ones(6, H, K, M), torch.ones(6, H, M, V)
        o = {
            "two gates": lambda: liger_ops.gated_step(q, k, v, -k, held, slots, gv=-v.abs()),
            "values": lambda: liger_ops.gated_step(q, k, v, None, held, slots, gv=-v.abs()),
            "rwkv6": lambda: liger_ops.gated_step(q, k, v, -k, held, slots, u=q[0]),
            "delta": lambda: liger_ops.gated_step(q, k, v, f, held, slots, beta=-2 * f),
            "kda": lambda: liger_ops.gated_step(q, k, v, -k, held, slots, beta=-f),
            "gsa": lambda: liger_ops.gsa_step(q, k, v, s, -s.abs(), slotted, slots),
            "mlstm": lambda: liger_ops.mlstm_step(q, k, v, 5 * f, f, (held, n, m), slots),
        }[name]()
        return o, held, *slotted, n, m

    wanted = call()
    use_kernels(monkeypatch)
    with sanitized():
        found = call()
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()


def test_the_compiler_knows_that_the_pool_changes(monkeypatch):
    use_kernels(monkeypatch)
    q, k, v, pool = torch.randn(2, HQ, K), torch.randn(2, H, K), torch.randn(2, H, V), torch.randn(3, H, K, V)
    for beta in (None, torch.rand(2, H)):
        args = q, k, v, None, None, beta, pool, torch.tensor([2, 0]), 0.1, False
        torch.library.opcheck(torch.ops.liger_ops.pooled_step.default, args)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("name", ["chunk_gsa", "fused_recurrent_gsa"])
def test_slots_on_the_kernels(name, gate, lengths, monkeypatch):
    """Both passes; without a gate, a running softmax."""
    M, lengths = 12, LENGTHS[lengths]
    N = 1 if lengths is None else len(lengths)
    tensors = [torch.randn(1, T, HQ, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V), torch.randn(1, T, H, M)]
    tensors += [torch.randn(N, H, K, M), torch.randn(N, H, M, V)] + ([decay(1, T, H, M)] if gate else [])

    def call():
        leaves = [x.clone().requires_grad_() for x in tensors]
        options = dict(reverse=True) if name == "fused_recurrent_gsa" else {}
        cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
        options |= dict(g=leaves[6] if gate else None, cu_seqlens=cu_seqlens, output_final_state=True)
        o, last = getattr(liger_ops, name)(*leaves[:4], initial_state=(leaves[4], leaves[5]), **options)
        found = o, *last
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in found]
        return [*found, *torch.autograd.grad(found, leaves, weights)]

    wanted = call()
    use_kernels(monkeypatch)
    for n, (x, y) in enumerate(zip(call(), wanted, strict=True)):
        assert (x - y).norm() <= 5e-6 * y.norm(), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_keys_of_length_one_are_not_rounded(tokens, gate, dtype, monkeypatch):
    """Nor do queries, and at a strength of 2 nothing that a rounded key is too long grows."""
    use_kernels(monkeypatch)
    q, k, v = (torch.randn(1, tokens, n, d).to(dtype) for n, d in ((HQ, 16), (H, 16), (H, V)))
    q, k = 3 * q, 3 * k[:, :1] + k / 64
    beta = torch.full((1, tokens, H), 2.0)
    g = {"none": None, "head": decay(1, tokens, H) / 99, "channel": decay(1, tokens, H, 16) / 99}[gate]
    do = torch.randn(1, tokens, HQ, V)

    def unit(x):
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def run(kind, call):
        leaves = [x if x is None else x.to(kind).requires_grad_() for x in (q, k, v)]
        o, last = call(*leaves)
        return dict(zip(("o", "last", *"qkv"), (o, last, *torch.autograd.grad(o, leaves, do.to(o.dtype))), strict=True))

    def ours(*x):
        name = {"none": "chunk_delta_rule", "head": "chunk_gated_delta_rule", "channel": "chunk_kda"}[gate]
        gates = dict(beta=beta) if g is None else dict(g=g, beta=beta)
        return getattr(liger_ops, name)(*x, **gates, use_qk_l2norm_in_kernel=True, output_final_state=True)

    def exact(q, k, v):
        return liger_ops.naive_delta_rule(unit(q), unit(k), v, beta.double(), g if g is None else g.double())

    true = run(torch.float64, exact)
    found = run(dtype, ours)
    far, floor = distances(found, true), distances({n: x.to(dtype) for n, x in true.items()}, true)
    assert far["last"] <= 1e-3, far["last"]
    assert all(far[n] <= 2 * floor[n] for n in ("o", *"qkv")), {n: far[n] / floor[n] for n in far}


def test_the_gate_may_be_the_query(monkeypatch):
    use_kernels(monkeypatch)
    g = decay(1, 3, H, K)
    k, v = torch.randn(1, 3, H, K), torch.randn(1, 3, H, V)
    assert torch.equal(liger_ops.chunk_gla(g, k, v, g)[0], liger_ops.chunk_gla(g.clone(), k, v, g)[0])


class Remote(torch.Tensor):
    """What stands for a tensor on a GPU: its values cannot be read without waiting for it."""

    is_cuda = True

    def tolist(self):
        raise AssertionError("read on the host")


def test_bounds_on_a_gpu_are_not_read_when_the_caller_answers_for_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    bounds = torch.tensor([0, 20, 20, T])
    remote = bounds.as_subclass(Remote)
    with pytest.raises(AssertionError, match="read on the host"):
        errors.check_cu_seqlens(remote, 1, T)
    errors.check_cu_seqlens(remote, 1, T, bounds)
    errors.check_cu_seqlens(remote, 1, T, None, 20)
    with pytest.raises(ValueError, match="max_seqlen: expected no less than the longest sequence"):
        errors.check_cu_seqlens(bounds, 1, T, None, 19)
    with pytest.raises(ValueError, match="max_seqlen: expected an integer >= 0"):
        errors.check_cu_seqlens(bounds, 1, T, None, 2.0)
