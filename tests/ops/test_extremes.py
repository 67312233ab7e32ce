"""Scores as large as floats allow hide what is hidden, and a token that is no number spoils no token far before it.

Shapes: B batch, T time, HQ query heads, H key/value heads, D width, V value width, M features.
"""

import pytest
import torch

import liger_ops
from liger_ops import liger_attention, naive_recall, naive_sliding_window_attention, sliding_window_attention

B, T, HQ, H, D, V, M = 2, 150, 4, 2, 8, 6, 4
WINDOW, SINKS, RECALL = 9, 3, 5


def decay(*shape):
    return -torch.rand(B, T, *shape)


def with_window(x):
    """Further arguments of `liger_attention` on whole texts, whose past is hidden."""
    past = {n: torch.cat([torch.randn(B, WINDOW, *x[n].shape[2:]).to(x[n]), x[n]], 1) for n in ("k", "v")}
    visible = torch.arange(WINDOW + T).expand(B, -1) >= WINDOW
    late = {n: x[n].roll(WINDOW, 1) for n in ("k_log", "g", "score") if n in x}
    return {**x, "g": None, **past, **late, "visible": visible}


def heads(*names):
    """q, k and v of random signs, and further inputs by the name of the op that wants them."""
    widths = dict(q=(HQ, D), k=(H, D), v=(H, V))
    x = {n: torch.randn(B, T, *size) for n, size in widths.items()}
    more = dict(
        g=lambda: decay(H, D),
        w=lambda: decay(H, D),
        beta=lambda: torch.rand(B, T, H),
        i=lambda: torch.randn(B, T, H),
        f=lambda: decay(H),
        s=lambda: torch.randn(B, T, H, M),
        q_log=lambda: torch.randn(B, T, HQ, M),
        k_log=lambda: torch.randn(B, T, H, M),
        score=lambda: torch.randn(B, T, H),
        head=lambda: decay(H),
    )
    return x | {"g" if n == "head" else n: more[n]() for n in names}


# Inputs of an op, and how it is called with them.
OPS = {
    "chunk_gla": (("g",), liger_ops.chunk_gla),
    "chunk_simple_gla": (("head",), liger_ops.chunk_simple_gla),
    "chunk_linear_attn": ((), liger_ops.chunk_linear_attn),
    "chunk_delta_rule": (("beta",), liger_ops.chunk_delta_rule),
    "chunk_gated_delta_rule": (("head", "beta"), liger_ops.chunk_gated_delta_rule),
    "chunk_kda": (("g", "beta"), liger_ops.chunk_kda),
    "chunk_rwkv6": (("w",), lambda q, **x: liger_ops.chunk_rwkv6(q, u=torch.ones(HQ, D), **x)),
    "chunk_gsa": (("s",), liger_ops.chunk_gsa),
    "mlstm": (("i", "f"), liger_ops.mlstm),
    "sliding_window_attention": ((), lambda **x: (sliding_window_attention(**x, window=WINDOW, sinks=SINKS),)),
    "liger_attention": (
        ("q_log", "k_log", "head"),
        lambda **x: liger_attention(**with_window(x), window=WINDOW, sinks=SINKS),
    ),
    "liger_attention that recalls": (
        ("q_log", "k_log", "score"),
        lambda **x: liger_attention(**with_window(x), window=WINDOW, sinks=SINKS, recall=RECALL),
    ),
}
# Of whole rows only.
HIDDEN = {"sliding_window_attention", "liger_attention", "liger_attention that recalls"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPS)
def test_what_is_no_number_stays_in_its_row_and_head(name, bad):
    """With autograd and without; what is refused at the door goes nowhere at all."""
    names, call = OPS[name]
    x, refused, again = heads(*names), set(), torch.random.get_rng_state()
    for spoilt in x:
        y = {n: z.clone().requires_grad_(spoilt == "v") for n, z in x.items()}
        found = []
        for value in (None, bad):
            torch.random.set_rng_state(again)
            if value is not None:
                y[spoilt].data[0, T // 2, 1] = value
            try:
                found.append(call(**y)[0].detach())
            except ValueError:
                refused.add(spoilt)
        if spoilt in refused:
            continue
        clean, o = found
        apart = [h for h in range(HQ) if h not in ((1,) if spoilt in ("q", "q_log") else (2, 3))]
        assert not (spoilt == "v" and o.isfinite().all())
        for part in (slice(1, None), slice(None), apart), (slice(0, 1), slice(None), apart), (slice(1, None),):
            assert torch.allclose(o[part], clean[part], rtol=1e-5, atol=1e-5), spoilt
    assert refused <= {"g", "w", "f", "beta"}


@pytest.mark.parametrize("name", sorted(set(OPS) - HIDDEN))
def test_what_is_no_number_stays_in_its_document(name):
    names, call = OPS[name]
    x, bounds = {n: z[:1].clone() for n, z in heads(*names).items()}, torch.tensor([0, 40, 90, T])
    clean = call(**x, cu_seqlens=bounds)[0]
    x["v"][:, 60], x["k"][:, 60] = torch.nan, torch.inf
    o = call(**x, cu_seqlens=bounds)[0]
    assert not o[:, 60:90].isfinite().any()
    for part in (slice(0, 40), slice(90, T)):
        assert torch.allclose(o[:, part], clean[:, part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e29, 1e31, 1e36])
def test_no_score_shows_what_is_hidden(size, dtype):
    """Padding of the same size in front, later tokens, and those behind the window; a step on its own too."""
    x = {n: size**0.5 * torch.randn(1, 70, h, D, dtype=dtype) for n, h in (("q", 4), ("k", 2))}
    x |= dict(v=torch.randn(1, 70, 2, V, dtype=dtype), mix=torch.zeros(4), k_log=torch.zeros(1, 70, 2, M, dtype=dtype))
    x["q_log"] = torch.zeros(1, 70, 4, M, dtype=dtype)
    past = {n: torch.cat([size**0.5 * torch.randn_like(x[n][:, :9]), x[n]], 1) for n in ("k", "v")}
    visible = torch.arange(79)[None] >= 9
    wanted = naive_sliding_window_attention(*(x[n].double() for n in "qkv"), 9, 3)
    o = sliding_window_attention(x["q"], past["k"], past["v"], 9, 3, visible=visible)
    joint, _ = liger_attention(**(x | past), g=None, window=9, sinks=3, visible=visible)
    last = {n: x[n][:, -1:] for n in ("q", "q_log", "k_log")}
    step, _ = liger_attention(**(x | past | last), g=None, window=9, sinks=3, visible=visible)
    for found, true in ((o, wanted), (joint, wanted), (step, wanted[:, -1:])):
        assert torch.allclose(found.double(), true, atol=1e-4)


@pytest.mark.parametrize("size", [1e29, 1e36])
def test_no_score_shows_what_is_not_recalled(size):
    x = {n: size**0.5 * torch.randn(1, 70, h, D) for n, h in (("q", 4), ("k", 2))}
    x |= dict(v=torch.randn(1, 70, 2, V), score=torch.randn(1, 70, 2))
    recalled, _ = naive_recall(x["score"], RECALL, window=9, sinks=3)
    i, j = torch.arange(70)[:, None], torch.arange(70)
    seen = (recalled[0] | ((j <= i) & ((i - j < 9) | (j < 3)))).repeat_interleave(2, 0)
    k, v = (x[n].double().repeat_interleave(2, 2) for n in "kv")
    scores = torch.einsum("bihd,bjhd->bhij", x["q"].double(), k) * D**-0.5
    wanted = torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    past = {n: torch.cat([torch.zeros(1, 9, *x[n].shape[2:]), x[n]], 1) for n in ("k", "v", "score")}
    logs = dict(q_log=torch.zeros(1, 70, 4, M), k_log=torch.zeros(1, 70, 2, M), mix=torch.zeros(4))
    visible = torch.arange(79)[None] >= 9
    more = logs | past | dict(score=past["score"][:, :70])
    o, _ = liger_attention(x["q"], **more, g=None, window=9, sinks=3, recall=RECALL, visible=visible)
    assert torch.allclose(o.double(), wanted, atol=1e-4)
