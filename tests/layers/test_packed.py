"""Documents packed along time are as if each were alone: outputs, gradients, routers; and what cannot be is said.

Shapes: B batch, T time.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_layers import (
    FullAttention,
    GatedRecurrence,
    InterleavedStack,
    LigerAttention,
    MixtureOfMemories,
    SlidingWindowAttention,
    calls,
)
from liger_layers.recurrences import with_gate, with_rule
from liger_ops.documents import Documents

SIZES = dict(num_heads=4, num_kv_heads=2)
BOUNDS = (0, 5, 5, 6, 29, 43, 45)
JOINT = dict(window=6, sinks=2)
KINDS = ["liger", "mixer:kda", "mom", "memories", "full"]


def bounds(*cuts):
    return torch.tensor(cuts, dtype=torch.int32)


def alone(layer, x, cuts, mask=None, **options):
    """Outputs of each document by itself, one behind the other."""
    parts = []
    for a, b in itertools.pairwise(cuts):
        if b > a:
            parts.append(layer(x[:, a:b], None if mask is None else mask[:, a:b], **options)[0])
    return torch.cat(parts, 1)


def check(layer, mask=None, length=BOUNDS[-1], cuts=BOUNDS):
    torch.manual_seed(0)
    layer = layer.double()
    for parameter in layer.parameters():
        # What starts at zero says nothing.
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, length, 16, dtype=torch.double, requires_grad=True)
    weight = torch.randn(1, length, 16, dtype=torch.double)
    shown = torch.ones(1, length, 1, dtype=torch.bool) if mask is None else mask[..., None]
    found = []
    for run in (lambda: layer(x, mask, cu_seqlens=bounds(*cuts))[0], lambda: alone(layer, x, cuts, mask)):
        y = run() * shown
        used = [p for p in layer.parameters() if p.requires_grad]
        grads = torch.autograd.grad((y * weight).sum(), [x, *used], allow_unused=True)
        found.append([y, *(g for g in grads if g is not None)])
    assert len(found[0]) == len(found[1]) > 4
    for packed, separate in zip(*found, strict=True):
        assert (packed - separate).abs().max() <= 1e-10 * max(1.0, separate.abs().max())
    assert found[0][0].abs().max() > 1e-3


@pytest.mark.parametrize("gate", [*with_gate()])
def test_every_gate(gate):
    check(LigerAttention(16, **SIZES, gate=gate, **JOINT))


@pytest.mark.parametrize("gate", [*with_gate()])
def test_every_recurrence_alone(gate):
    check(GatedRecurrence(16, **SIZES, gate=gate))


@pytest.mark.parametrize("rule", [*with_rule()])
def test_every_rule(rule):
    check(MixtureOfMemories(16, memories=3, top_k=2, rule=rule, slots=4, **SIZES))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LigerAttention(16, **SIZES, **JOINT, recall=3),
        lambda: LigerAttention(16, **SIZES, **JOINT, memories=3, top_k=2),
        lambda: LigerAttention(16, **SIZES, window=1, sinks=0, gate="gla", recall=2, softcap=3.0),
        lambda: SlidingWindowAttention(16, **SIZES, **JOINT),
        lambda: FullAttention(16, **SIZES),
        lambda: InterleavedStack(16, 5, 4, KINDS, options=dict(mom=dict(memories=3))),
    ],
    ids=["recall", "memories", "odd", "window", "full", "stack"],
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_every_layer(make, padded):
    mask = torch.rand(1, BOUNDS[-1], generator=torch.Generator().manual_seed(3)) < 0.7
    # A document of padding alone.
    mask[:, 5] = False
    check(make(), mask if padded else None)


def test_one_document_is_no_packing():
    check(LigerAttention(16, **SIZES, **JOINT, recall=3), cuts=(0, BOUNDS[-1]))


def test_in_full_it_keeps_documents_apart_too():
    torch.manual_seed(0)
    layer, x = LigerAttention(16, **SIZES, **JOINT).double(), torch.randn(1, 45, 16, dtype=torch.double)
    with calls.attending_in_full({layer: None}):
        assert (layer(x, cu_seqlens=bounds(*BOUNDS))[0] - alone(layer, x, BOUNDS)).abs().max() <= 1e-12
        assert (layer(x)[0] - alone(layer, x, BOUNDS)).abs().max() > 1e-3


def test_positions_of_tables_go_with_their_documents():
    torch.manual_seed(0)
    layer = LigerAttention(16, **SIZES, **JOINT, recall=3).double()
    x = torch.randn(1, 45, 16, dtype=torch.double)
    tables = [torch.randn(1, 45, 4, dtype=torch.double) for _ in range(2)]
    packed = layer(x, position_embeddings=tuple(tables), cu_seqlens=bounds(*BOUNDS))[0]
    for a, b in ((5, 6), (6, 29), (29, 43)):
        one = layer(x[:, a:b], position_embeddings=tuple(t[:, a:b] for t in tables))[0]
        assert (packed[:, a:b] - one).abs().max() <= 1e-12


def test_router_logits_are_those_of_all_tokens_in_their_order():
    torch.manual_seed(0)
    layer, x = LigerAttention(16, **SIZES, **JOINT, memories=3), torch.randn(1, 45, 16)
    packed, plain = [], []
    layer(x, router_logits=packed, cu_seqlens=bounds(*BOUNDS))
    layer(x, router_logits=plain)
    assert torch.equal(packed[0], plain[0])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 2**31), st.booleans())
@settings(max_examples=200, deadline=None)
def test_places_are_found_again(lengths, seed, padded):
    torch.manual_seed(seed)
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    T = int(cuts[-1])
    mask = torch.rand(1, T) < 0.6 if padded else None
    documents, x = Documents.of(cuts, mask), torch.randn(1, T, 2)
    shown = torch.ones(T, dtype=torch.bool) if mask is None else mask[0]
    parts = documents.apart(x)
    back = documents.together(parts, x)
    assert torch.equal(back[0, shown], x[0, shown])
    # Little is run for nobody, and a row holds the tokens of one document in their order.
    assert sum(part[..., 0].numel() for part in parts) <= 2 * max(int(shown.sum()), 1)
    owner = torch.searchsorted(cuts, torch.arange(T), right=True)
    for rows in documents.groups:
        assert (owner[rows] == owner[rows[:, :1]]).all() and (rows.diff(dim=1) >= 0).all() and shown[rows].all()
    wanted = torch.cat([shown[a:b].long().cumsum(0) - shown[a:b].long() for a, b in itertools.pairwise(cuts)])
    assert torch.equal(documents.positions[0], wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cu_seqlens=torch.tensor([0, 5, 4, 9])), "cu_seqlens: expected bounds that rise from 0 to 9"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens: expected bounds that rise from 0 to 9"),
        (dict(cu_seqlens=torch.tensor([1, 9])), "cu_seqlens: expected bounds that rise from 0 to 9"),
        (dict(cu_seqlens=[0, 9]), "cu_seqlens: expected a tensor"),
        (dict(cu_seqlens=torch.tensor([0.0, 9.0])), "cu_seqlens: expected a 1-d int32 or int64 tensor"),
    ],
)
def test_bounds_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        LigerAttention(16, **SIZES, **JOINT)(torch.randn(1, 9, 16), **options)


def test_several_rows_or_a_state_beside_bounds_are_refused():
    layer = LigerAttention(16, **SIZES, **JOINT)
    with pytest.raises(ValueError, match="cu_seqlens: expected batch 1"):
        layer(torch.randn(2, 9, 16), cu_seqlens=bounds(0, 9))
    _, state = layer(torch.randn(1, 9, 16))
    with pytest.raises(ValueError, match="state: expected none beside cu_seqlens, got LigerState"):
        layer(torch.randn(1, 9, 16), state=state, cu_seqlens=bounds(0, 9))
    assert layer(torch.randn(1, 9, 16), cu_seqlens=bounds(0, 3, 9))[1] is None
