"""What the delta rule's public names do to their arguments first, and what they refuse.

Shapes: B batch, T time, HK key heads, H value heads, K key width, V value width.
"""

import pytest
import torch
import torch.nn.functional as F

from liger_ops import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
    naive_delta_rule,
)
from tests.ops.test_gated_linear_attention import distance


class TestFormsAndOptions:
    """Every public name, and what it does to its arguments first."""

    B, T, HK, H, K, V = 2, 40, 2, 4, 8, 12

    def tensors(self):
        B, T, HK, H, K, V = self.B, self.T, self.HK, self.H, self.K, self.V
        q, k, v = torch.randn(B, T, HK, K), torch.randn(B, T, HK, K), torch.randn(B, T, H, V)
        return dict(q=q, k=k, v=v, beta=torch.rand(B, T, H))

    def unit(self, x):
        return {n: y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() if n in "qk" else y for n, y in x.items()}

    def test_l2norm(self):
        x = self.tensors()
        wanted, _ = naive_delta_rule(**{n: y.double() for n, y in self.unit(x).items()})
        for op in (chunk_delta_rule, fused_recurrent_delta_rule):
            o, none = op(**x, use_qk_l2norm_in_kernel=True)
            assert none is None and distance(o, wanted) <= 5e-6

    def test_recurrent_forms_take_both_gates_and_run_backwards(self):
        x = self.unit(self.tensors())
        g, gk = -torch.rand(self.B, self.T, self.H), -torch.rand(self.B, self.T, self.H, self.K)
        for gates, total in ((dict(g=g), g), (dict(gk=gk), gk), (dict(g=g, gk=gk), gk + g.unsqueeze(-1)), ({}, None)):
            wanted, last = naive_delta_rule(**x, g=total)
            o, state = fused_recurrent_gated_delta_rule(**x, **gates, output_final_state=True, state_v_first=True)
            assert distance(o, wanted) <= 5e-6 and distance(state.transpose(-1, -2), last) <= 5e-6
            again, _ = fused_recurrent_gated_delta_rule(**x, **gates, initial_state=state, state_v_first=True)
            assert distance(again, naive_delta_rule(**x, g=total, initial_state=last)[0]) <= 5e-6
        turned = {n: y.flip(1) for n, y in x.items()}
        o, _ = fused_recurrent_kda(**turned, g=gk.flip(1), reverse=True)
        assert distance(o.flip(1), naive_delta_rule(**x, g=gk)[0]) <= 5e-6

    def test_beta_is_one_unless_given(self):
        x = self.unit(self.tensors())
        ones = {**x, "beta": torch.ones_like(x["beta"])}
        del x["beta"]
        assert torch.equal(fused_recurrent_delta_rule(**x)[0], fused_recurrent_delta_rule(**ones)[0])

    @pytest.mark.parametrize("doubled", [False, True])
    def test_raw_strengths(self, doubled):
        x = self.unit(self.tensors())
        g = -torch.rand(self.B, self.T, self.H)
        raw = {**x, "beta": 9 * torch.randn(self.B, self.T, self.H)}
        x["beta"] = raw["beta"].sigmoid() * (1 + doubled)
        options = dict(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=doubled)
        assert distance(chunk_gated_delta_rule(**raw, g=g, **options)[0], naive_delta_rule(**x, g=g)[0]) <= 5e-6

    @pytest.mark.parametrize("bound", [None, -5.0])
    @pytest.mark.parametrize("per_channel", [False, True])
    def test_raw_gates(self, bound, per_channel):
        x = self.unit(self.tensors())
        tail = (self.H, self.K) if per_channel else (self.H,)
        raw, A_log, dt_bias = 3 * torch.randn(self.B, self.T, *tail), torch.randn(self.H), torch.randn(*tail)
        rate = A_log.exp().view(-1, *[1] * (len(tail) - 1))
        g = -rate * F.softplus(raw + dt_bias) if bound is None else bound * (rate * (raw + dt_bias)).sigmoid()
        op = chunk_kda if per_channel else chunk_gated_delta_rule
        options = dict(use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias.flatten(), lower_bound=bound)
        assert distance(op(**x, g=raw, **options)[0], naive_delta_rule(**x, g=g)[0]) <= 5e-6


def bad(**changes):
    x = torch.randn(2, 9, 2, 8)
    g, beta = -torch.rand(2, 9, 2), torch.rand(2, 9, 2)
    return {**dict(q=x, k=x, v=x, g=g, beta=beta), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(beta=torch.full((2, 9, 2), 2.5)), "beta: expected write strengths from 0 to 2, got 2.5 to 2.5"),
        (dict(beta=torch.full((2, 9, 2), -0.5)), "beta: expected write strengths from 0 to 2"),
        (dict(beta=torch.full((2, 9, 2), torch.nan)), "beta: expected write strengths from 0 to 2"),
        (dict(beta=torch.rand(2, 9, 3)), r"beta: expected a floating tensor \[2, 9, 2\]"),
        (dict(beta=torch.ones(2, 9, 2, dtype=torch.long)), "beta: expected a floating tensor"),
        (dict(g=torch.rand(2, 9, 2) + 0.1), "g: expected log decays <= 0"),
        (dict(g=-torch.rand(2, 9, 2, 8)), r"g: expected shape \[2, 9, 2\]"),
        (dict(v=torch.randn(2, 9, 3, 8)), r"v: expected \[2, 9, a multiple of 2, V\] to match k"),
        (dict(q=torch.randn(2, 9, 3, 8)), "q: expected a positive multiple of the 2 key/value heads"),
        (dict(q=torch.randn(2, 9, 0, 8)), "q: expected a positive multiple"),
        (dict(initial_state=torch.randn(2, 2, 8, 9)), "initial_state: expected shape"),
        (dict(cu_seqlens=torch.tensor([0, 9])), "cu_seqlens: expected batch 1"),
        (dict(v=torch.randn(2, 9, 0, 8)), r"v: expected \[2, 9, a multiple of 2, V\]"),
        (dict(use_gate_in_kernel=True, A_log=torch.zeros(2), g=torch.randn(2, 9, 3)), r"g: expected shape \[2, 9, 2\]"),
        (dict(use_gate_in_kernel=True, A_log=torch.zeros(2), g=torch.randn(2)), r"g: expected shape \[2, 9, 2\]"),
        (dict(use_gate_in_kernel=True, lower_bound="a"), "lower_bound: expected a number < 0"),
        (
            dict(use_beta_sigmoid_in_kernel=True, beta=torch.ones(2, 9, 2, dtype=torch.long)),
            "beta: expected a floating",
        ),
        (dict(allow_neg_eigval=True, beta=None), "allow_neg_eigval: expected False"),
        (dict(allow_neg_eigval=True), "allow_neg_eigval: expected False without use_beta_sigmoid_in_kernel"),
        (dict(use_gate_in_kernel=True), r"A_log: expected a tensor \[2\] with use_gate_in_kernel, got None"),
        (dict(use_gate_in_kernel=True, A_log=torch.zeros(3)), "A_log: expected a tensor of 2 numbers"),
        (dict(use_gate_in_kernel=True, lower_bound=1.0), "lower_bound: expected a number < 0"),
        (dict(chunk_size=0), "chunk_size: expected an integer"),
        (dict(chunk_size="64"), "chunk_size: expected an integer >= 1, got '64'"),
        (dict(A_log=torch.zeros(2)), "A_log: expected None without use_gate_in_kernel"),
        (dict(dt_bias=torch.zeros(2)), "dt_bias: expected None without use_gate_in_kernel"),
        (dict(scale=float("nan")), "scale: expected a finite number, got nan"),
        (dict(q=torch.ones(2, 9, 4, 8, dtype=torch.long)), "q: expected float16, .*got torch.int64"),
        (dict(k=torch.randn(2, 9, 2, 8).double()), "k: expected torch.float32 as q, got torch.float64"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        chunk_gated_delta_rule(**bad(**changes))


def test_values_have_no_decay():
    with pytest.raises(ValueError, match="gv: expected None"):
        fused_recurrent_gated_delta_rule(**bad(gv=-torch.rand(2, 9, 2, 8)))
    with pytest.raises(ValueError, match=r"gk: expected shape \[2, 9, 2, 8\]"):
        fused_recurrent_gated_delta_rule(**bad(g=None, gk=-torch.rand(2, 9, 2)))
    with pytest.raises(ValueError, match=r"gk: expected \[2, 9, 2, K\] on cpu beside g, got \(2, 9, 2\)"):
        fused_recurrent_gated_delta_rule(**bad(gk=-torch.rand(2, 9, 2)))


def test_a_raw_gate_of_no_tokens():
    for B, T in ((2, 0), (0, 9)):
        x, g, beta = torch.randn(B, T, 2, 8), torch.randn(B, T, 2, 8), torch.rand(B, T, 2)
        options = dict(use_gate_in_kernel=True, A_log=torch.zeros(2), dt_bias=torch.zeros(16))
        assert chunk_kda(x, x, x, g, beta, **options)[0].shape == x.shape
