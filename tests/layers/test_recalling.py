"""Layers that recall: pieces, padding, sizes of states, refusals, for every gate that shares the softmax."""

import pytest
import torch

from liger_layers import RECURRENCES, LigerAttention
from liger_layers.choices import settle
from liger_ops import naive_recall

JOINT = [name for name, entry in RECURRENCES.items() if entry.gate is not None and settle(name).mixing == "joint"]


def make(gate="gated_retention", seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(window=7, sinks=2, recall=5) | options
    layer = LigerAttention(36, 6, 3, gate=gate, **sizes).double()
    if sizes["recall"]:
        layer.score.weight.normal_()
    return layer


def test_every_joint_gate_is_here():
    assert {"gla", "mamba2", "mlstm", "gated_retention", "rwkv6", "retention", "linear"} <= set(JOINT)


@pytest.mark.parametrize("gate", JOINT)
@pytest.mark.parametrize("pool", [None, "heads"])
def test_any_pieces_give_one_forward(gate, pool):
    layer, x = make(gate, pool=pool), torch.randn(2, 90, 36).double()
    whole, last = layer(x)
    for cuts in ([1, 2, 3, 40], [33, 64], list(range(70, 90)), [5, 6, 80]):
        state, parts = None, []
        with torch.no_grad():
            for piece in x.tensor_split(cuts, 1):
                o, state = layer(piece, state=state)
                parts.append(o)
        assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-10
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(state.recalled, last.recalled, strict=True))
    # What is recalled makes a difference, and so does by which score.
    state_free = make(gate, pool=pool, recall=0)
    state_free.load_state_dict({n: y for n, y in layer.state_dict().items() if not n.startswith("score")})
    other = make(gate, pool=pool)
    other.score.weight.neg_()
    for changed in (state_free, other):
        assert (changed(x)[0] - whole).abs().amax(-1)[:, 20:].median() > 1e-4


def test_float32_pieces():
    layer, x = make().float(), torch.randn(2, 300, 36)
    whole, _ = layer(x)
    with torch.no_grad():
        state, parts = None, []
        for piece in x.tensor_split([100, *range(250, 300)], 1):
            o, state = layer(piece, state=state)
            parts.append(o)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("gate", ["gated_retention", "gla", "linear"])
def test_padding_anywhere_is_no_token(gate):
    layer, x = make(gate), torch.randn(3, 80, 36).double()
    mask = torch.rand(3, 80) < torch.tensor([[0.9], [0.5], [0.2]])
    with torch.no_grad():
        state, parts = None, []
        for piece, shown in zip(x.tensor_split([30, 31, 50], 1), mask.tensor_split([30, 31, 50], 1), strict=True):
            o, state = layer(piece, shown, state)
            parts.append(o)
        together = torch.cat(parts, 1)
        for row, shown, o in zip(x, mask, together, strict=True):
            alone, _ = layer(row[shown][None])
            assert (o[shown] - alone[0]).abs().max() <= 1e-10


def test_the_highest_scores_are_kept():
    layer, x = make(recall=4, rope_theta=None), torch.randn(1, 60, 36).double()
    _, state = layer(x)
    _, k, v = layer.project(x)
    score = layer.score(k, v)
    seen = naive_recall(score, 4, window=7, sinks=2)[0][0, :, -1]
    for h in range(3):
        assert torch.equal(state.recalled[0][0, :, h], k[0, seen[h], h])
        assert torch.equal(state.recalled[1][0, :, h], v[0, seen[h], h])


def test_scores_are_as_fine_under_autocast():
    torch.manual_seed(0)
    (k, v), score = torch.randn(2, 1, 50, 3, 6), make().float().score
    with torch.autocast("cpu", torch.bfloat16):
        found = score(k, v)
    assert found.dtype == torch.float32 and torch.equal(found, score(k, v))


def test_a_state_has_one_size():
    layer, sizes = make(recall=9).float(), []
    with torch.no_grad():
        _, state = layer(torch.randn(1, 200, 36))
        sizes.append(state.nbytes())
        for _ in range(9):
            _, state = layer(torch.randn(1, 2200, 36), state=state)
    assert int(state.position) == 20_000
    assert [*sizes, layer.initial_state(1, torch.device("cpu"), torch.float32).nbytes()] == [state.nbytes()] * 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"^recall: expected 0 with mixing='sum', as gate 'deltanet' has it, got 3"):
        make("deltanet", recall=3)
    for recall in (-1, 1.5, True, "3"):
        with pytest.raises(ValueError, match=r"^recall: expected "):
            make(recall=recall)
    _, state = make(recall=3)(torch.randn(1, 9, 36).double())
    with pytest.raises(ValueError, match=r"^state: expected one of a layer with recall 4, got one with 3"):
        make(recall=4)(torch.randn(1, 9, 36).double(), state=state)
    with pytest.raises(ValueError, match=r"^state: expected recalled of shape"):
        state.recalled = state.recalled[:2]
        make(recall=3)(torch.randn(1, 9, 36).double(), state=state)
