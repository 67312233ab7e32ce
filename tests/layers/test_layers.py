"""Layers on their own: pieces equal the whole, padding, feature maps, gates, and clear refusals."""

import pickle
import subprocess
import sys

import pytest
import torch

from liger_layers import (
    RECURRENCES,
    Gate,
    GatedRecurrence,
    LigerAttention,
    SlidingWindowAttention,
    SoftmaxKernel,
    register_gate,
)
from liger_layers.gates import log_decay
from liger_layers.recurrences import with_gate
from liger_ops import naive_gsa, naive_recurrence


def stirred(layer):
    """With memories of their own weight, apart from each other."""
    with torch.no_grad():
        layer.memories.mix.weight.copy_(torch.linspace(0.5, 1.0, 4))
        layer.memories.k_proj.weight.add_(0.2 * torch.randn_like(layer.memories.k_proj.weight))
    return layer


KINDS = {
    "joint": lambda: LigerAttention(32, 4, 2, window=6, sinks=2),
    "joint-gla": lambda: LigerAttention(32, 4, 2, window=6, sinks=2, gate="gla"),
    "sum": lambda: LigerAttention(32, 4, 2, window=6, sinks=0, mixing="sum", mix=0.5, feature_map="softmax"),
    "deltanet": lambda: LigerAttention(32, 4, 2, window=6, sinks=2, gate="deltanet", mix=0.5),
    "gated_deltanet": lambda: LigerAttention(32, 4, 2, window=6, sinks=2, gate="gated_deltanet", mix=0.5, tau=1.0),
    "kda": lambda: GatedRecurrence(32, 4, 2, gate="kda", tau=1.0),
    "memories": lambda: stirred(LigerAttention(32, 4, 2, window=6, sinks=2, memories=3, top_k=2)),
    "memories that erase": lambda: stirred(
        LigerAttention(32, 4, 2, window=6, sinks=2, gate="kda", memories=3, top_k=2, bias=True)
    ),
    "gsa": lambda: stirred(LigerAttention(32, 4, 2, window=6, sinks=2, gate="gsa", tau=2.0, memories=3, mix=0.5)),
    "hgrn2": lambda: LigerAttention(32, 4, 2, window=6, sinks=2, gate="hgrn2", tau=2.0, mix=0.5),
    "recurrence": lambda: GatedRecurrence(32, 4, 2, gate="gla", feature_map="softmax", tau=16.0),
    "window": lambda: SlidingWindowAttention(32, 4, 2, window=6, sinks=2),
    "odd heads": lambda: LigerAttention(36, 3, 1, head_dim=12, window=5, sinks=1),
    "odd width": lambda: LigerAttention(36, 3, 1, head_dim=7, window=5, sinks=1),
}


@pytest.fixture(params=KINDS)
def layer(request):
    return KINDS[request.param]()


def width(layer) -> int:
    return layer.q_proj.in_features


@pytest.mark.parametrize("recording", [True, False])
def test_pieces_equal_the_whole(layer, recording):
    """Single tokens take a path of their own unless gradients are recorded."""
    x = torch.randn(2, 40, width(layer))
    whole, _ = layer(x)
    for sizes in ((1,) * 40, (13, 1, 20, 6)):
        state, parts = None, []
        with torch.set_grad_enabled(recording):
            for part in x.split(sizes, 1):
                y, state = layer(part, state=state)
                parts.append(y)
        assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5
        assert state.position.tolist() == [40, 40]


@pytest.mark.parametrize("shape", [(3, 0), (0, 37), (0, 1)])
def test_nothing_to_do(layer, shape):
    y, state = layer(torch.randn(*shape, width(layer)))
    assert y.shape == (*shape, width(layer)) and len(state.position) == shape[0]


def test_left_padding_changes_nothing(layer):
    x = torch.randn(1, 25, width(layer))
    alone, _ = layer(x)
    padded = torch.cat([torch.randn(1, 9, width(layer)), x], 1)
    mask = torch.arange(34)[None] >= 9
    y, state = layer(padded, mask)
    assert torch.isfinite(y).all()
    assert (y[:, 9:] - alone).abs().max() <= 1e-5
    more = torch.randn(1, 3, width(layer))
    _, plain = layer(x)
    with torch.no_grad():
        assert (layer(more[:, :1], state=state)[0] - layer(more[:, :1], state=plain)[0]).abs().max() <= 1e-5
    assert (layer(more, state=state)[0] - layer(more, state=plain)[0]).abs().max() <= 1e-5


def test_the_state_has_one_size_and_keeps_no_prompt_alive(layer):
    sizes = set()
    for tokens in (1, 5, 50):
        _, state = layer(torch.randn(1, tokens, width(layer)))
        sizes.add(state.nbytes())
        parts = [x if isinstance(x, tuple) else (x,) for n, x in vars(state).items() if x is not None and n != "origin"]
        held = [x for part in parts for x in part]
        assert sum(x.untyped_storage().nbytes() for x in held) == state.nbytes()
    assert len(sizes) == 1


def test_the_future_does_not_reach_the_past(layer):
    x = torch.randn(1, 30, width(layer))
    y = torch.cat([x[:, :17], torch.randn(1, 13, width(layer))], 1)
    if getattr(layer, "memories", None) is None:
        assert torch.equal(layer(x)[0][:, :17], layer(y)[0][:, :17])
    else:
        # How many tokens a memory gets is the size of its products, which may round otherwise for another one.
        layer, x, y = layer.double(), x.double(), y.double()
        assert (layer(x)[0] - layer(y)[0])[:, :17].abs().max() <= 1e-14


def test_every_parameter_gets_a_finite_gradient(layer):
    layer(torch.randn(2, 30, width(layer)))[0].square().sum().backward()
    for name, p in layer.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            assert p.grad.abs().sum() > 0, name


def test_half_precision_runs(layer):
    layer = layer.to(torch.bfloat16)
    y, _ = layer(torch.randn(1, 30, width(layer), dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


def test_kernel_features_estimate_the_exponential_after_calibration():
    torch.manual_seed(1)
    K, n = 16, 4096
    q_mean, k_mean = torch.randn(1, K), torch.randn(1, K)
    q = q_mean.view(1, 1, 1, K) + 0.4 * torch.randn(1, n, 2, K)
    k = k_mean.view(1, 1, 1, K) + 0.4 * torch.randn(1, n, 1, K)
    kernel = SoftmaxKernel(2, 1, K, rank=16)
    eye = 0.16 * torch.eye(K)[None]
    kernel.calibrate(q_mean, k_mean, eye, eye, torch.ones(K, dtype=torch.bool))
    with torch.no_grad():
        estimate = (kernel(q, "query").exp() * kernel(k, "key").exp()).sum(-1)
    wanted = (q * k).sum(-1).mul(K**-0.5).exp()
    constant = wanted.mean().expand_as(wanted)
    assert (estimate.mean() / wanted.mean() - 1).abs() < 0.1
    assert (estimate - wanted).norm() < 0.5 * (constant - wanted).norm()


def test_gates_follow_their_formula():
    k = 8 * torch.randn(2, 5, 3, 4, dtype=torch.float64)
    P = k.mean(-1)
    channel, head = k.sigmoid().log() / 16, P.sigmoid().log() / 16
    wanted = {
        "gla": channel,
        "gsa": channel,
        "hgrn2": (15 / 16 + k.sigmoid() / 16).log(),
        "mamba2": -torch.nn.functional.softplus(P),
        "mlstm": P.sigmoid().log(),
        "gated_retention": head,
        "rwkv6": -k.exp(),
        "retention": (1 - 2.0 ** -torch.tensor([5, 6, 7], dtype=torch.float64)).log().expand(2, 5, 3),
        "linear": None,
        "deltanet": None,
        "gated_deltanet": head,
        "kda": channel,
    }
    assert set(wanted) == set(with_gate())
    for name, value in wanted.items():
        got = log_decay(with_gate()[name], k, 16.0)
        if value is None:
            assert got is None
            continue
        assert got.shape == value.shape
        assert ((got - value).abs() <= 1e-9 * value.abs().clamp(min=1)).where(value > -1e3, True).all(), name
        assert (got <= 0).all()
    assert torch.allclose(log_decay(with_gate()["hgrn2"], k, 1.0), k.sigmoid().log())


def test_the_key_is_pooled_over_width_or_heads_or_not_at_all():
    k = torch.randn(2, 5, 3, 4)
    wide, narrow = with_gate()["gla"], with_gate()["gated_retention"]
    assert torch.equal(log_decay(wide, k, 16.0, "width"), log_decay(narrow, k, 16.0))
    assert torch.equal(log_decay(narrow, k, 16.0, "identity"), log_decay(wide, k, 16.0))
    over = log_decay(wide, k, 16.0, "heads")
    assert torch.allclose(over, k.mean(2, keepdim=True).sigmoid().log().expand_as(k) / 16)


@pytest.mark.parametrize("gate", ["hgrn2", "gsa"])
def test_gates_that_make_their_own_keys_follow_their_recurrence(gate):
    layer = GatedRecurrence(32, 4, 2, gate=gate, tau=4.0).double()
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    q, k, v = layer.project(x)
    g, q = torch.nn.functional.logsigmoid(k) / 4, q.softmax(-1)
    if gate == "gsa":
        o, _ = naive_gsa(q, k, v, -torch.expm1(g), g, scale=1.0)
    else:
        decay = 3 / 4 + k.sigmoid() / 4
        ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o, _ = naive_recurrence(q, 1 - decay, ones, decay.log(), scale=1.0)
        o = o[..., :-1] / o[..., -1:]
    wanted = layer.o_proj(o.flatten(2))
    assert (layer(x)[0] - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_registered_gate_works_in_a_layer():
    register_gate("test_gate", Gate(False, lambda pooled, tau: -pooled.abs() / tau))
    try:
        y, _ = LigerAttention(16, 2, gate="test_gate", window=4)(torch.randn(1, 20, 16))
        assert torch.isfinite(y).all()
        gla, kda = with_gate()["gla"], with_gate()["kda"]
        for name in ("test_gate", "gla", "lightning"):
            with pytest.raises(ValueError, match=f"name: expected a new name, got {name!r}, which exists"):
                register_gate(name, gla)
        for name in ("window", "liger", "kernel", "heads"):
            with pytest.raises(ValueError, match=f"name: expected a new name, got {name!r}, which is a"):
                register_gate(name, gla)
        for name in ("", "liger:mine", 5):
            with pytest.raises(ValueError, match="name: expected an identifier"):
                register_gate(name, gla)
        with pytest.raises(ValueError, match="gate: expected a Gate, got function"):
            register_gate("another", lambda k: k)
        with pytest.raises(ValueError, match="expected None or one of gla, gsa, hgrn2 for such a gate, got 'rwkv6'"):
            register_gate("another", gla._replace(recurrence="rwkv6"))
        with pytest.raises(ValueError, match="recurrence: expected None or one of kda for such a gate, got 'gsa'"):
            register_gate("another", kda._replace(recurrence="gsa"))
    finally:
        del RECURRENCES["test_gate"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(gate="mamba9"),
            "gate: expected one of gla, gsa, hgrn2, mamba2, .*, kda, got 'mamba9'",
        ),
        (dict(feature_map="cosine"), "feature_map: expected one of softmax, kernel"),
        (dict(mixing="max"), "mixing: expected one of joint, sum"),
        (dict(gate="kda", mixing="joint"), "mixing: expected 'sum' with gate 'kda', which erases, got 'joint'"),
        (dict(gate="kda", normalize=True), "normalize: expected False with gate 'kda', which erases, got True"),
        (dict(feature_map="unit"), "feature_map: expected a positive one with gate 'gated_retention', got 'unit'"),
        (dict(gate="gsa", mixing="joint"), "mixing: expected 'sum' with gate 'gsa', which writes slots, got 'joint'"),
        (dict(gate="gsa", normalize=True), "normalize: expected False with gate 'gsa', which writes slots, got True"),
        (dict(gate="hgrn2", pool="width"), "pool: expected identity or heads with gate 'hgrn2', .*, got 'width'"),
        (dict(gate="hgrn2", feature_map="kernel"), "feature_map: expected one for queries alone with gate 'hgrn2'"),
        (dict(pool="depth"), "pool: expected one of identity, width, heads, got 'depth'"),
        (dict(memories=2, top_k=3), "top_k: expected an integer from 1 to 2 memories, got 3"),
        (dict(memories=-1), "memories: expected an integer >= 0, got -1"),
        (dict(num_kv_heads=3), "num_heads: expected a multiple"),
        (dict(num_kv_heads=0), "num_kv_heads: expected an integer >= 1, got 0"),
        (dict(head_dim=0), "head_dim: expected an integer >= 1, got 0"),
        (dict(gate=None), "gate: expected one of gla, .*, got None"),
        (dict(window=0), "window: expected an integer >= 1, got 0"),
        (dict(sinks=-1), "sinks: expected an integer >= 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LigerAttention(32, 4, **options)


def test_layers_import_without_hugging_face():
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'accelerate', 'triton'): sys.modules[name] = None\n"
        "import torch, liger_layers\n"
        "print(liger_layers.LigerAttention(16, 2, window=4)(torch.randn(1, 9, 16))[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[1, 9, 16]" in done.stdout


@pytest.mark.parametrize("training", [False, True])
def test_autocast(layer, training):
    x = torch.randn(2, 40, width(layer))
    wanted, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(training):
        y, state = layer(x)
        one, _ = layer(x[:, :1], state=state)
    assert (y.float() - wanted).norm() <= 0.05 * wanted.norm()
    assert torch.isfinite(one).all()
    if training:
        y.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("gate", ["gla", "gsa"])
def test_a_pickled_layer_computes_the_same(gate):
    layer, x = LigerAttention(32, 4, gate=gate, memories=2, window=5), torch.randn(2, 9, 32)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], layer(x)[0])
