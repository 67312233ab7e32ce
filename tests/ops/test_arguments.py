"""Arguments as flash-linear-attention orders them, and what each public op refuses."""

import inspect

import pytest
import torch

import liger_ops
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
    gated_step,
    mlstm,
    naive_recurrence,
)

# Positional arguments of flash-linear-attention 0.6, so that changing an import is enough.
SIGNATURES = {
    "chunk_gla": "q k v g scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_gla": "q k v gk gv scale initial_state output_final_state reverse state_v_first cu_seqlens",
    "fused_chunk_gla": "q k v g scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu",
    "chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state state_v_first cu_seqlens "
    "cu_seqlens_cpu",
    "fused_recurrent_simple_gla": "q k v g g_gamma scale initial_state output_final_state reverse state_v_first "
    "cu_seqlens",
    "chunk_retention": "q k v scale initial_state output_final_state cu_seqlens",
    "fused_chunk_retention": "q k v scale initial_state output_final_state cu_seqlens",
    "parallel_retention": "q k v scale output_attentions cu_seqlens",
    "fused_recurrent_retention": "q k v scale initial_state output_final_state reverse state_v_first cu_seqlens",
    "chunk_lightning_attn": "q k v layer_idx num_layers scale initial_state output_final_state cu_seqlens",
    "fused_recurrent_lightning_attn": "q k v layer_idx num_layers scale initial_state output_final_state reverse "
    "cu_seqlens",
    "chunk_linear_attn": "q k v scale initial_state output_final_state normalize cu_seqlens",
    "fused_chunk_linear_attn": "q k v scale initial_state output_final_state normalize cu_seqlens",
    "fused_recurrent_linear_attn": "q k v scale initial_state output_final_state reverse normalize cu_seqlens",
    "chunk_rwkv6": "r k v w u scale initial_state output_final_state cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_rwkv6": "r k v w u scale initial_state output_final_state reverse cu_seqlens",
    "chunk_delta_rule": "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens "
    "cu_seqlens_cpu",
    "fused_recurrent_delta_rule": "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "cu_seqlens",
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_gated_delta_rule": "q k v g gk gv beta scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel",
    "chunk_kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound",
    "fused_recurrent_kda": "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel",
    "chunk_gsa": "q k v s g scale initial_state output_final_state checkpoint_level cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_gsa": "q k v s g scale initial_state output_final_state reverse cu_seqlens",
    "chunk_lightnet": "q k v scale initial_state output_final_state state_v_first cu_seqlens",
    "fused_recurrent_lightnet": "q k v scale initial_state output_final_state state_v_first cu_seqlens",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_positional_arguments(name):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(getattr(liger_ops, name)).parameters.values()
    assert [p.name for p in parameters if p.kind in kinds] == SIGNATURES[name].split()


@pytest.mark.parametrize("name", [*SIGNATURES, "mlstm"])
def test_unknown_keywords_are_answered_with_the_known_ones(name):
    op = getattr(liger_ops, name)
    with pytest.raises(TypeError, match=f"^{name}: unexpected argument 'foo'; expected one of [qr], ") as raised:
        op(foo=1)
    choices = str(raised.value).split("expected one of ")[1].split(", ")
    own = list(inspect.signature(op).parameters)
    assert choices[: len(own)] == own and len(set(choices)) == len(choices)
    assert {"cp_context", "disable_recompute", "chunk_indices"} < set(choices)
    assert ("transpose_state_layout" in choices) == ("state_v_first" in choices)


@pytest.mark.parametrize("name", [n for n in liger_ops.__all__ if not n.startswith("naive_")])
def test_every_op_lists_every_keyword(name):
    """The reference aside, which imports nothing of the rest."""
    parameters = inspect.signature(getattr(liger_ops, name)).parameters
    assert not [n for n, p in parameters.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    with pytest.raises(TypeError, match=f"^{name}: unexpected argument 'foo'; expected one of {', '.join(parameters)}"):
        getattr(liger_ops, name)(foo=1)


@pytest.mark.parametrize("name", ["chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_kda"])
def test_nobody_reaches_behind_the_door(name):
    with pytest.raises(TypeError, match=f"^{name}: unexpected argument 'ranks'"):
        getattr(liger_ops, name)(X, X, X, GATE, GATE[..., 0].exp(), ranks=(3,))


X = torch.randn(1, 6, 2, 4)
GATE = -torch.rand(1, 6, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chunk_gla(X, X, X, GATE, gk=GATE), "gk: expected None when g is given"),
        (lambda: fused_recurrent_gla(X, X, X, None, GATE[..., :3]), r"gv: expected shape \[1, 6, 2, 4\]"),
        (lambda: fused_recurrent_gla(X, X, X, None, -GATE), "gv: expected log decays <= 0"),
        (lambda: chunk_simple_gla(X, X, X, g_gamma=torch.rand(2)), "g_gamma: expected log decays <= 0"),
        (lambda: chunk_rwkv6(X, X, X, GATE, torch.randn(3, 4)), r"u: expected floating \[2, 4\]"),
        (lambda: chunk_rwkv6(X, X, X, -GATE, torch.randn(2, 4)), "w: expected log decays <= 0"),
        (lambda: chunk_gsa(X, X, X, X[:, :5]), r"s: expected \[1, 6, H, M\]"),
        (lambda: chunk_gsa(X, X, X, X, GATE[..., :2]), r"g: expected shape \[1, 6, 2, 4\]"),
        (lambda: chunk_lightning_attn(X, X, X, 5, 4), "layer_idx: expected at most num_layers = 4"),
        (lambda: mlstm(X, X, X, GATE, GATE[..., 0]), r"i: expected a floating tensor \[1, 6, 2\]"),
        (lambda: mlstm(X, X, X, GATE[..., 0], -GATE[..., 0]), "f: expected log decays <= 0"),
        (
            lambda: gated_step(X[:, 0], X[:, 0], X[:, 0], None, torch.zeros(3, 2, 4, 4), torch.tensor([3])),
            "slots: expected numbers below the 3 rows",
        ),
        (
            lambda: gated_step(X[0], X[0], X[0], None, torch.zeros(9, 2, 4, 4), torch.tensor([1, 2, 2, 3, 4, 5])),
            "slots: expected no row twice",
        ),
        (
            lambda: gated_step(X[0], X[0], X[0], None, torch.zeros(9, 2, 4, 5), torch.arange(6)),
            r"pool: expected float32 \[S, 2, 4, 4\]",
        ),
        (
            lambda: gated_step(X[0], X[0], X[0], None, torch.zeros(9, 2, 4, 4), torch.arange(6, device="meta")),
            "slots: expected device cpu",
        ),
        (
            lambda: gated_step(X[0], X[0], X[0], torch.tensor(-1.0), torch.zeros(9, 2, 4, 4), torch.arange(6)),
            r"g: expected \[batch, heads\] or",
        ),
        (lambda: chunk_rwkv6(X, X, X, GATE, torch.randn(2, 4, device="meta")), "u: expected .* on cpu, got .* on meta"),
        (lambda: chunk_gla(X, X, X, GATE, torch.tensor(0.3, requires_grad=True)), "scale: expected a number"),
        (lambda: mlstm(X, X, X, GATE[..., 0], GATE[..., 0], torch.ones(2)), "scale: expected a number"),
        (lambda: chunk_gla(X, X, X, cu_seqlens=[0, 6]), "cu_seqlens: expected a tensor, got list"),
        (lambda: chunk_gla(X, X, X, initial_state=(X,)), "initial_state: expected a tensor, got tuple"),
        (
            lambda: chunk_gla(X, X, X, cu_seqlens=torch.tensor([2, 3, 4]), cu_seqlens_cpu=torch.tensor([0, 3, 6])),
            r"cu_seqlens_cpu: expected the bounds of cu_seqlens \(\[2, 3, 4\]\)",
        ),
        (
            lambda: chunk_gla(X, X, X, cu_seqlens=torch.tensor([0, 6]), cu_seqlens_cpu=torch.tensor([0.0, 6.0])),
            "cu_seqlens_cpu: expected a 1-d int32 or int64",
        ),
        (lambda: chunk_linear_attn(X, X, X, initial_state=(X, X, X)), r"initial_state: expected \(h, z\)"),
        (
            lambda: mlstm(X, X, X, GATE[..., 0], GATE[..., 0], initial_state=(X, X)),
            r"initial_state: expected \(C, n, m\)",
        ),
        (lambda: chunk_gsa(X, X, X, X, GATE, initial_state=[X]), r"initial_state: expected \(hk, hv\)"),
        (lambda: chunk_hgrn2(X, X, GATE[..., 0]), r"g: expected \[batch, time, heads, width\]"),
        (lambda: chunk_hgrn2(X, X[:, :5], GATE), r"v: expected \[1, 6, 2, V\] to match g"),
        (lambda: chunk_retention(X[0, 0], X[0, 0], X[0, 0]), r"q: expected \[batch, time, heads, width\]"),
        (lambda: chunk_gla(X[:, :, :0], X, X), "q: expected a positive multiple of the 2"),
        (lambda: mlstm(X, X, X[..., :0], GATE[..., 0], GATE[..., 0]), "v: expected a width of at least 1"),
        (
            lambda: liger_ops.sliding_window_attention(X, X, X, 3, visible=torch.ones(1, 6, dtype=bool, device="meta")),
            "visible: expected .* on cpu",
        ),
        (
            lambda: liger_ops.liger_attention(X[:, :3], X, X, X[:, :3].repeat(1, 1, 2, 1), X[:, :3], None, window=3),
            r"q_log: expected \[1, 3, 2\]",
        ),
        (
            lambda: liger_ops.liger_attention(X[:, :3], X, X, X[:, :3], X[:, :2], None, window=3),
            "k_log: expected",
        ),
        (
            lambda: liger_ops.liger_attention(X[:, :3], X, X, X[:, :3], X[:, :3], None, torch.ones(3), window=3),
            r"mix: expected a number >= 0 or floating \[2\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rwkv6_reads_a_coarse_initial_state_in_float32():
    """The first token, which reads nothing else, is as exact as the others."""
    r, k, v, w, u = X, X * 0, X * 0, GATE * 0, torch.zeros(2, 4)
    state = torch.randn(1, 2, 4, 4).bfloat16()
    wanted = chunk_rwkv6(r.double(), k.double(), v.double(), w.double(), u.double(), initial_state=state.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = chunk_rwkv6(r, k, v, w, u, initial_state=state)[0]
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_decays_of_retention_are_as_fine_as_its_tensors():
    q, k, v = (torch.randn(1, 40, 3, 8, dtype=torch.float64) for _ in range(3))
    g = torch.log1p(-torch.exp2(-5.0 - torch.arange(3, dtype=torch.float64))).expand(1, 40, 3)
    wanted = naive_recurrence(q, k, v, g)[0]
    assert (chunk_retention(q, k, v)[0] - wanted).norm() <= 1e-13 * wanted.norm()
