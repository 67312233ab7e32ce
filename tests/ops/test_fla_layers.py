"""What flash-linear-attention's layers import and pass, by layer: each call against its definition, with gradients.

The names and keywords are those of its release 0.6. Shapes: B batch, T time, HK key heads, H value heads, K key width,
V value width, M slots, N sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

import liger_ops
from liger_ops import naive_delta_rule, naive_gsa, naive_lightnet, naive_recurrence, naive_rwkv6
from tests.ops.test_named_ops import compare, flat

T, K, V, M = 20, 8, 6, 5
BOUNDS = (0, 7, 7, T)

LAYERS = {
    "gla": "chunk_gla fused_chunk_gla fused_recurrent_gla",
    "gated_deltanet": "chunk_gated_delta_rule fused_recurrent_gated_delta_rule",
    "delta_net": "chunk_delta_rule fused_recurrent_delta_rule",
    "kda": "chunk_kda fused_recurrent_kda",
    "gsa": "chunk_gsa fused_recurrent_gsa",
    "simple_gla": "chunk_simple_gla fused_recurrent_simple_gla",
    "multiscale_retention": "chunk_retention fused_chunk_retention fused_recurrent_retention parallel_retention",
    "rwkv6": "chunk_rwkv6 fused_recurrent_rwkv6",
    "hgrn2": "chunk_gla fused_chunk_gla fused_recurrent_gla",
    "linear_attn": "chunk_linear_attn fused_chunk_linear_attn fused_recurrent_linear_attn",
    "lightnet": "chunk_lightnet fused_recurrent_lightnet",
}


def plain(x, state, bounds, normalize=False, **_):
    """state: [h], or [h, z] if normalize."""
    x = {"g" if n == "gk" else n: y for n, y in x.items()}
    if normalize and state:
        state = [torch.cat([state[0], state[1].squeeze(1).unsqueeze(-1)], -1)]
    o, h = naive_recurrence(**x, initial_state=state and state[0], normalize=normalize, cu_seqlens=bounds)
    return o, (h[..., :-1], h[..., -1].unsqueeze(1)) if normalize else h


def retention(x, state, bounds, **_):
    return plain({**x, "g": torch.log1p(-torch.exp2(-5.0 - torch.arange(2.0))).double()}, state, bounds)


def erasing(x, state, bounds, lower_bound=None, allow_neg_eigval=False, **constants):
    x = dict(x)
    A_log, dt_bias = x.pop("A_log", None), x.pop("dt_bias", None)
    if constants.get("use_qk_l2norm_in_kernel"):
        x |= {n: x[n] / (x[n].square().sum(-1, keepdim=True) + 1e-6).sqrt() for n in "qk"}
    if constants.get("use_beta_sigmoid_in_kernel"):
        x["beta"] = x["beta"].sigmoid() * (1 + allow_neg_eigval)
    if A_log is not None:
        g = x["g"] + dt_bias.view(x["g"].shape[2:])
        rate = A_log.exp().view(-1, *[1] * (g.ndim - 3))
        x["g"] = -rate * F.softplus(g) if lower_bound is None else lower_bound * (rate * g).sigmoid()
    return naive_delta_rule(**x, initial_state=state and state[0], cu_seqlens=bounds)


def apart(definition: Callable, x, state, bounds, **constants):
    """Each sequence alone."""
    if bounds is None:
        return definition(**x, **constants, initial_state=state)
    parts = []
    for n, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        some = {name: y if name == "u" else y[:, a:b] for name, y in x.items()}
        parts.append(definition(**some, **constants, initial_state=state and tuple(y[n : n + 1] for y in state)))
    o, states = zip(*parts, strict=True)
    return torch.cat(o, 1), [torch.cat(y) for y in zip(*states, strict=True)]


def rwkv6(x, state, bounds, **constants):
    def definition(initial_state=None, **arguments):
        o, h = naive_rwkv6(**arguments, initial_state=initial_state and initial_state[0])
        return o, (h,)

    return apart(definition, x, state, bounds, **constants)


def gsa(*args, **constants):
    return apart(naive_gsa, *args, **constants)


def lightnet(*args, **_):
    return apart(naive_lightnet, *args)


@dataclass
class Call:
    """What goes by name beside initial_state, output_final_state and, if packed, cu_seqlens; and what it means.

    states: shapes behind [N]; none: the call has neither of the first two.
    """

    tensors: str
    definition: Callable
    constants: dict = field(default_factory=dict)
    states: tuple = ((2, K, V),)
    packed: bool = True


PAIR = ((2, K, V), (1, 2, K))
V_FIRST = dict(state_v_first=True)
RAW = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
RAW |= dict(allow_neg_eigval=True, state_v_first=True)
UNIT = dict(use_qk_l2norm_in_kernel=True)

CALLS = {
    "chunk_gla": Call("q k v g", plain, V_FIRST),
    # Without states, and in them only when told their layout.
    "fused_chunk_gla": Call("q k v g", plain, states=(), packed=False),
    "fused_recurrent_gla": Call("q k v gk", plain, V_FIRST),
    "chunk_gated_delta_rule": Call("q k v g beta A_log dt_bias", erasing, RAW),
    "fused_recurrent_gated_delta_rule": Call("q k v g beta A_log dt_bias", erasing, RAW),
    "chunk_delta_rule": Call("q k v beta", erasing, UNIT),
    "fused_recurrent_delta_rule": Call("q k v beta", erasing, UNIT),
    "chunk_kda": Call("q k v g beta A_log dt_bias", erasing, RAW | dict(safe_gate=True, lower_bound=-5.0)),
    "fused_recurrent_kda": Call("q k v g beta A_log dt_bias", erasing, RAW | dict(lower_bound=-5.0)),
    "chunk_gsa": Call("q k v s g", gsa, dict(scale=0.3), ((2, K, M), (2, M, V))),
    "fused_recurrent_gsa": Call("q k v s g", gsa, dict(scale=0.3), ((2, K, M), (2, M, V))),
    "chunk_simple_gla": Call("q k v g", plain, V_FIRST),
    "fused_recurrent_simple_gla": Call("q k v g", plain, V_FIRST),
    "chunk_retention": Call("q k v", retention),
    "fused_chunk_retention": Call("q k v", retention),
    "fused_recurrent_retention": Call("q k v", retention),
    "parallel_retention": Call("q k v", retention, states=()),
    "chunk_rwkv6": Call("r k v w u", rwkv6, dict(scale=1.0)),
    "fused_recurrent_rwkv6": Call("r k v w u", rwkv6, dict(scale=1.0)),
    "chunk_linear_attn": Call("q k v", plain, dict(normalize=True), PAIR),
    "fused_chunk_linear_attn": Call("q k v", plain, dict(normalize=True), PAIR),
    "fused_recurrent_linear_attn": Call("q k v", plain, dict(normalize=True), PAIR),
    "chunk_lightnet": Call("q k v", lightnet, V_FIRST, PAIR),
    "fused_recurrent_lightnet": Call("q k v", lightnet, V_FIRST, PAIR),
}


def tensors(name: str, B: int) -> dict[str, torch.Tensor]:
    """Signed, but for log decays and for what a normaliser sums."""
    call = CALLS[name]
    x = {n: torch.randn(B, T, 2, K) for n in "qkrw"} | dict(v=torch.randn(B, T, 2, V), u=torch.randn(2, K))
    raw = "A_log" in call.tensors
    per_channel = name.endswith(("_gla", "_kda")) and "simple" not in name
    x["g"] = torch.randn(B, T, 2, K) if per_channel else torch.randn(B, T, 2)
    x["g"] = x["g"] if raw else -x["g"].abs()
    x["gk"], x["w"] = -torch.rand(B, T, 2, K), -torch.rand(B, T, 2, K)
    x |= dict(beta=torch.randn(B, T, 2), A_log=torch.randn(2), dt_bias=torch.randn(x["g"][0, 0].numel()))
    if not raw:
        x["beta"] = x["beta"].sigmoid()
    if "gsa" in name:
        x["g"], x["s"] = -torch.rand(B, T, 2, M), torch.randn(B, T, 2, M)
    if call.constants.get("normalize"):
        x |= {n: x[n].abs() + 0.1 for n in "qk"}
    return {n: x[n] for n in call.tensors.split()}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_finds_its_ops(layer):
    names = LAYERS[layer].split()
    assert set(names) <= set(liger_ops.__all__) and set(names) <= set(CALLS)
    assert [getattr(liger_ops, name).__name__ for name in names] == names


@pytest.mark.parametrize(
    ("name", "packed"), [(name, packed) for name, call in CALLS.items() for packed in {False, call.packed}]
)
def test_a_call_as_the_layers_make_it(name, packed):
    """With a state to start from, so as a layer goes on after its cache."""
    call, op = CALLS[name], getattr(liger_ops, name)
    bounds = torch.tensor(BOUNDS) if packed else None
    x = tensors(name, 1 if packed else 2)
    state = [torch.randn(len(BOUNDS) - 1 if packed else 2, *shape) for shape in call.states] or None
    if state and call.constants.get("normalize"):
        state = [y.abs() + 0.1 for y in state]

    def turned(states):
        """Where the call has its matrix with values first."""
        h, *rest = states if isinstance(states, (tuple, list)) else [states]
        h = h.transpose(-1, -2) if call.constants.get("state_v_first") else h
        return (h, *rest) if rest else h

    def plainly(states):
        """LightNet's normaliser starts from log 0."""
        return (states[0], states[1].exp()) if "lightnet" in name else states

    def fast(x, s):
        options = dict(call.constants)
        if s:
            options |= dict(initial_state=turned(s), output_final_state=True)
        if call.packed:
            options["cu_seqlens"] = bounds
        o, last = op(**x, **options)
        assert s or last is None
        return (o, plainly(turned(last))) if s else o

    def slow(x, s):
        constants = {n: y for n, y in call.constants.items() if n != "state_v_first"}
        o, last = call.definition(x, s, bounds, **constants)
        return (o, plainly(last)) if s else o

    compare(fast, slow, x, state, (1e-5, 1e-5))


def test_the_state_of_fused_chunk_gla_wants_its_layout_said():
    x, h = tensors("chunk_gla", 2), torch.randn(2, 2, K, V)
    for options in (dict(initial_state=h), dict(output_final_state=True)):
        with pytest.raises(ValueError, match="state_v_first: expected True or False where a state comes or goes"):
            liger_ops.fused_chunk_gla(**x, **options)
    wanted = liger_ops.chunk_gla(**x, initial_state=h, output_final_state=True)
    for v_first in (False, True):
        turned = h.transpose(-1, -2) if v_first else h
        o, last = liger_ops.fused_chunk_gla(**x, initial_state=turned, output_final_state=True, state_v_first=v_first)
        assert torch.equal(o, wanted[0]) and torch.equal(last.transpose(-1, -2) if v_first else last, wanted[1])


@pytest.mark.parametrize("name", CALLS)
def test_hints_change_no_number_and_layouts_have_two_names(name):
    call, op = CALLS[name], getattr(liger_ops, name)
    x, options = tensors(name, 2), dict(call.constants)
    if call.states:
        states = [torch.randn(2, *shape) for shape in call.states]
        if options.get("state_v_first"):
            states[0] = states[0].transpose(-1, -2)
        options |= dict(initial_state=states[0] if len(states) == 1 else tuple(states), output_final_state=True)
    wanted = flat(op(**x, **options))
    hints = dict(disable_recompute=True, cp_context=None, chunk_indices=torch.zeros(3, 2, dtype=torch.long))
    if options.pop("state_v_first", False):
        hints["transpose_state_layout"] = True
        with pytest.raises(ValueError, match="transpose_state_layout: expected nothing beside state_v_first"):
            op(**x, **options, state_v_first=True, transpose_state_layout=True)
        with pytest.raises(ValueError, match="transpose_state_layout: expected True or False, got 1"):
            op(**x, **options, transpose_state_layout=1)
    for a, b in zip(flat(op(**x, **options, **hints)), wanted, strict=True):
        assert torch.equal(a, b)
    for bad, message in (
        (dict(cp_context=object()), "cp_context: expected None .*, got object"),
        (dict(disable_recompute="no"), "disable_recompute: expected True or False, got 'no'"),
        (
            dict(chunk_indices=torch.zeros(3, 2)),
            r"chunk_indices: expected int32 or int64 \[chunks, 2\], got torch.float32",
        ),
        (dict(chunk_indices=[0, 1]), "chunk_indices: expected a tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            op(**x, **options, **bad)


def test_what_is_not_here_is_refused():
    x = tensors("chunk_kda", 2) | CALLS["chunk_kda"].constants
    neutral = dict(return_intermediate_states=False, use_graph=False, max_num_seqs=None)
    assert torch.equal(liger_ops.chunk_kda(**x, **neutral)[0], liger_ops.chunk_kda(**x)[0])
    for name, given in (("return_intermediate_states", True), ("use_graph", True), ("max_num_seqs", 3)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            liger_ops.chunk_kda(**x, **{name: given})
    x = tensors("parallel_retention", 2)
    with pytest.raises(ValueError, match=r"output_attentions: expected False .*, got True"):
        liger_ops.parallel_retention(**x, output_attentions=True)
    with pytest.raises(ValueError, match=r"initial_state: expected \(h, z\)"):
        liger_ops.chunk_lightnet(**x, initial_state=x["q"])
    with pytest.raises(ValueError, match=r"initial_state, z: expected floating \[2, 1, 2, 8\]"):
        liger_ops.chunk_lightnet(**x, initial_state=(None, x["q"]))
    with pytest.raises(ValueError, match="checkpoint_level: expected 0, 1 or 2, got 3"):
        liger_ops.chunk_gsa(**tensors("chunk_gsa", 2), checkpoint_level=3)


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_lightnet"])
def test_the_door_is_one_graph(name):
    op, call = getattr(liger_ops, name), CALLS[name]
    options = call.constants | dict(cp_context=None, disable_recompute=False)
    if options.pop("state_v_first", False):
        options["transpose_state_layout"] = True
    x = {n: y.requires_grad_() for n, y in tensors(name, 2).items()}
    compiled = torch.compile(lambda x: op(**x, **options, output_final_state=True), fullgraph=True, backend="aot_eager")
    wanted, got = flat(op(**x, **options, output_final_state=True)), flat(compiled(x))
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    grads = [torch.autograd.grad(out[0].sum(), list(x.values())) for out in (got, wanted)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_lightnet_goes_on_from_a_state_without_its_normaliser():
    """Then nothing decays at first; and a normaliser of log 0 says the same, with finite gradients."""
    x, h = tensors("chunk_lightnet", 2), torch.randn(2, 2, K, V)
    weight = x["k"].exp() / x["k"].exp().cumsum(1)
    g = torch.log1p(-weight).index_fill(1, torch.tensor([0]), 0.0)
    wanted, last = naive_recurrence(x["q"], weight, x["v"], g, initial_state=h)
    for z in (None, torch.full((2, 1, 2, K), -torch.inf, requires_grad=True)):
        o, (found, total) = liger_ops.chunk_lightnet(**x, initial_state=(h, z), output_final_state=True)
        assert torch.allclose(o, wanted, atol=1e-5) and torch.allclose(found, last, atol=1e-5)
        assert torch.allclose(total, x["k"].logsumexp(1, keepdim=True), atol=1e-5)
    assert torch.autograd.grad(o.sum() + total.sum(), z)[0].isfinite().all()
