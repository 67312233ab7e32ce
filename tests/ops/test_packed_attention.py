"""The window's ops on documents packed along time: each as it is alone, by the reference.

Shapes: B batch, T time, HQ query heads, H key/value heads, D width, M features, V value width.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import liger_attention, naive, sliding_window_attention

HQ, H, D, M, V = 4, 2, 6, 5, 7


def draw(T, gate, seed, dtype=torch.double):
    torch.manual_seed(seed)
    shapes = dict(q=(HQ, D), k=(H, D), v=(H, V), q_log=(HQ, M), k_log=(H, M), score=(H,))
    made = {n: torch.randn(1, T, *shape, dtype=dtype) for n, shape in shapes.items()}
    made["g"] = {"channel": -torch.rand(1, T, H, M), "head": -torch.rand(1, T, H), "none": None}[gate]
    made["g"] = None if made["g"] is None else made["g"].to(dtype)
    return {n: x if x is None else x.requires_grad_() for n, x in made.items()}


def pieces(x, cuts):
    return [None if x is None else x[:, a:b] for a, b in itertools.pairwise(cuts) if b > a]


def same(found, wanted, leaves):
    weight = torch.randn_like(wanted)
    grads = [
        torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True, allow_unused=True) for y in (found, wanted)
    ]
    assert (found - wanted).abs().max() <= 1e-10
    for a, b in zip(*grads, strict=True):
        assert (a is None or not a.any()) if b is None else (a - b).abs().max() <= 1e-10


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    st.sampled_from(["channel", "head", "none"]),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from([None, 2.0]),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_a_joint_softmax_of_each_document(lengths, gate, window, sinks, recall, softcap, seed):
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    x, mix = draw(int(cuts[-1]), gate, seed), torch.rand(HQ, dtype=torch.double, requires_grad=True)
    told = dict(window=window, sinks=sinks, softcap=softcap, recall=recall)
    arguments = [x[n] for n in ("q", "k", "v", "q_log", "k_log", "g")]
    score = x["score"] if recall else None
    found, state = liger_attention(*arguments, mix, score=score, cu_seqlens=cuts, **told)
    parts = []
    for *own, s in zip(*(pieces(y, cuts) for y in (*arguments, score)), strict=True):
        parts.append(naive.naive_liger_attention(*own, mix, score=s, **told)[0])
    assert state is None and found.shape == (1, int(cuts[-1]), HQ, V)
    same(found, torch.cat(parts, 1), [y for y in (*arguments, mix) if y is not None])


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_a_window_of_each_document(lengths, window, sinks, seed):
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    x = draw(int(cuts[-1]), "none", seed)
    qkv = [x[n] for n in ("q", "k", "v")]
    found, lse = sliding_window_attention(*qkv, window, sinks, cu_seqlens=cuts, return_lse=True)
    rows = list(zip(*(pieces(y, cuts) for y in qkv), strict=True))
    same(found, torch.cat([naive.naive_sliding_window_attention(*row, window, sinks) for row in rows], 1), qkv)
    alone = torch.cat([sliding_window_attention(*row, window, sinks, return_lse=True)[1] for row in rows], 1)
    assert (lse - alone).abs().max() <= 1e-10
    assert torch.equal(sliding_window_attention(*qkv, window, sinks, cu_seqlens=cuts), found)


def test_no_document_at_all():
    x = draw(0, "head", 0)
    arguments = [x[n] for n in ("q", "k", "v", "q_log", "k_log", "g")]
    o, _ = liger_attention(*arguments, window=4, cu_seqlens=torch.tensor([0, 0]))
    assert o.shape == (1, 0, HQ, V)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens: expected bounds that rise from 0 to 9, got"),
        (dict(cu_seqlens=torch.tensor([0, 6, 5, 9])), "cu_seqlens: expected bounds that rise from 0 to 9, got"),
        (dict(output_final_state=True), "output_final_state: expected none beside cu_seqlens, got bool"),
        (dict(initial_state=torch.zeros(1, H, M, V + 1)), "initial_state: expected none beside cu_seqlens, got Tensor"),
        (dict(visible=torch.ones(1, 9, dtype=torch.bool)), "visible: expected none beside cu_seqlens, got Tensor"),
        (dict(k_log=torch.zeros(1, 8, H, M)), r"k_log: expected \[1, 9\] and more, as q has, beside cu_seqlens"),
        (dict(recall=2), "score: expected a tensor"),
        (dict(score=torch.zeros(1, 9, H)), "score: expected None without recall"),
    ],
    ids=str,
)
def test_what_does_not_go_with_bounds(told, message):
    x = {n: y if y is None else y.detach().float() for n, y in draw(9, "head", 0).items() if n != "score"}
    given = {**x, "window": 4, "cu_seqlens": torch.tensor([0, 4, 9]), **told}
    with pytest.raises(ValueError, match=message):
        liger_attention(**given)


def test_a_window_looks_at_no_columns_before_its_documents():
    q, k = torch.randn(1, 9, HQ, D), torch.randn(1, 12, H, D)
    with pytest.raises(ValueError, match="k: expected the 9 tokens of q beside cu_seqlens, got 12"):
        sliding_window_attention(q, k, k, 4, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="cu_seqlens: expected batch 1"):
        sliding_window_attention(*(torch.randn(2, 9, h, D) for h in (HQ, H, H)), 4, cu_seqlens=torch.tensor([0, 9]))
