"""Exact recall against a heap, one token at a time: who stays, who is lost when, outputs, states, every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liger_ops import liger_attention, naive_liger_attention, naive_recall
from liger_ops._torch.attention import window as blocked
from liger_ops._torch.attention.recall import _starts, _starts_at_once, membership
from tests.ops.test_liger_attention import NAMES
from tests.ops.test_liger_attention import cases as joint_cases
from tests.ops.test_window import distance


@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_members_and_losers_are_those_of_a_heap(data):
    """Ties, padding, blocks of any size, and a text in two pieces."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    B, H = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    T, R, C = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    levels, cut = data.draw(st.sampled_from([1, 3, 1000])), data.draw(st.integers(0, T - 1))
    score, padding = (
        torch.randint(-levels, levels, (B, T, H)).double(),
        torch.rand(B, T) < data.draw(st.sampled_from([0, 0.3])),
    )
    # Each token arrives at once: what stands before the arrival of token i is what query i - 1 sees.
    held, there = score.new_zeros(B, R, H), torch.zeros(B, R, H, dtype=torch.bool)
    number, found, lost = torch.full((B, R, H), -1), [], []
    for rows in (slice(0, cut), slice(cut, T)):
        if rows.start == rows.stop:
            continue
        shown = ~padding[:, rows, None].expand(-1, -1, H)
        held, there = torch.cat([held, score[:, rows]], 1), torch.cat([there, shown], 1)
        number = torch.cat([number, torch.arange(rows.start, rows.stop).view(1, -1, 1).expand(B, -1, H)], 1)
        m = membership(held, there, R, C)
        for i in range(rows.stop - rows.start):
            block = m.members.unflatten(1, (-1, R))[:, i // C]
            arrived = torch.arange(R + i // C * C, R + i + 1).view(1, -1, 1).expand(B, -1, H)
            seen = torch.cat([block, arrived], 1)
            shows = m.lost.gather(1, seen) > i
            row = torch.zeros(B, T + 1, H, dtype=torch.bool)
            found.append(row.scatter(1, torch.where(shows, number.gather(1, seen), T), True)[:, :T])
        lost.append(torch.where(m.enters, number.gather(1, m.losers), -1))
        held, there, number = (x.gather(1, m.kept) for x in (held, there, number))
    found, lost = torch.stack(found, 1), torch.cat(lost, 1)
    for b in range(B):
        # Padding never arrives.
        tokens = (~padding[b]).nonzero().flatten()
        recalled, out = naive_recall(score[b : b + 1, tokens], R, window=0)
        assert torch.equal(found[b][tokens][:, tokens].permute(2, 0, 1), recalled[0])
        assert torch.equal(lost[b, tokens].T, torch.where(out[0] >= 0, tokens[out[0].clamp(min=0)], -1))
        assert not found[b][:, padding[b]].any() and (lost[b, padding[b]] == -1).all()


@pytest.mark.parametrize(("N", "R", "C"), [(1, 1, 1), (5, 3, 8), (8, 8, 3), (13, 4, 4)])
def test_blocks_start_alike_on_a_gpu(N, R, C):
    """Ranks, of which what fills the last block has none."""
    ranks = torch.stack([torch.randperm(R + N * C) for _ in range(6)]).view(2, 3, -1)
    first, arrivals = ranks[..., :R], ranks[..., R:].unflatten(-1, (N, C)).clone()
    arrivals[..., -1, C // 2 + 1 :] = -1
    one, other = (starts(first, arrivals).sort(-1).values for starts in (_starts, _starts_at_once))
    assert one.shape == (2, 3, N + 1, R) and torch.equal(one, other)


@st.composite
def cases(draw):
    """In double precision tensors by name, window, sinks and recall, and the floats of scores in a segment."""
    x, window, sinks, floats = draw(joint_cases())
    B, T, H = x["k"].shape[:3]
    x["score"] = torch.randint(-9, 9, (B, T, H)) if draw(st.booleans()) else torch.randn(B, T, H)
    sizes = dict(window=window, sinks=sinks, recall=draw(st.integers(1, 40)))
    return {n: y.double() for n, y in x.items()}, sizes, floats


def run(x, window, sinks, recall, cuts=(), hidden=None, **options):
    """The op in pieces of a text that end at `cuts`, as a layer calls it; hidden [B,T] are columns of padding."""
    (B, T), outputs, state = x["k"].shape[:2], [], None
    far = {n: x[n] for n in ("k_log", "g", "score") if n in x}
    # A random, hidden past.
    past = {n: torch.cat([-torch.rand(B, window, *x[n].shape[2:]).to(x[n]), x[n]], 1) for n in ("k", "v", *far)}
    visible = torch.ones(B, T, dtype=torch.bool) if hidden is None else ~hidden
    visible = torch.cat([torch.zeros(B, window, dtype=torch.bool), visible], 1)
    for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
        leave = {n: past[n][:, start:stop] for n in far}
        k, v, shown = past["k"][:, : window + stop], past["v"][:, : window + stop], visible[:, : window + stop]
        o, state = liger_attention(
            x["q"][:, start:stop], k, v, x["q_log"][:, start:stop], leave["k_log"], leave.get("g"), x["mix"],
            window=window, sinks=sinks, recall=recall, score=leave["score"], visible=shown,
            initial_state=state, output_final_state=True, **options,
        )  # fmt: skip
        outputs.append(o)
    return torch.cat(outputs, 1), state


def leaves(x):
    return {n: y.clone().requires_grad_(n != "score") for n, y in x.items()}


@settings(max_examples=80, deadline=None)
@given(cases())
def test_output_state_and_every_gradient_match_the_heap(case):
    x, sizes, floats = case
    slow, fast = leaves(x), leaves(x)
    wanted, last = naive_liger_attention(**slow, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_SCORES", floats)
        got, (state, recalled) = run(fast, **sizes)
        with torch.no_grad():
            assert distance(run(fast, **sizes)[0], wanted) <= 1e-10
        assert distance(got, wanted) <= 1e-10 and distance(state, last) <= 1e-10
        weights = torch.randn_like(wanted), torch.randn_like(last)
        names = [n for n in NAMES if n in x]
        a, b = (
            torch.autograd.grad(
                sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), [z[n] for n in names], allow_unused=True
            )
            for ys, z in (((got, state), fast), ((wanted, last), slow))
        )
    floor = max(y.norm().item() for y in b if y is not None)
    for name, found, true in zip(names, a, b, strict=True):
        found, true = (torch.zeros((), dtype=torch.float64) if y is None else y for y in (found, true))
        assert (found - true).norm() <= 1e-10 * (true.norm() + floor), name
    seen = naive_recall(x["score"], sizes["recall"], window=sizes["window"], sinks=sizes["sinks"])[0][:, :, -1]
    for b in range(len(seen)):
        for h in range(seen.shape[1]):
            there, tokens = recalled[2][b, :, h, -1] > 0, seen[b, h].nonzero().flatten()
            assert torch.equal(recalled[0][b, there, h], x["k"][b, tokens, h])
            assert torch.equal(recalled[2][b, there, h, -2], x["score"][b, tokens, h])


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_any_pieces_give_the_whole(case, data):
    x, sizes, _ = case
    T = x["q"].shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=5)))
    ones = tuple(range(max(T - 9, 0), T))
    whole, (state, recalled) = run(x, **sizes)
    for pieces in (cuts, ones):
        with torch.no_grad():
            o, (last, held) = run(x, cuts=tuple(pieces), **sizes)
        assert distance(o, whole) <= 1e-10 and distance(last, state) <= 1e-10
        for a, b in zip(held, recalled, strict=True):
            mark = recalled[2][..., -1:] > 0
            assert torch.equal(held[2][..., -1:] > 0, mark) and torch.equal(a * mark, b * mark)


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_gradients_pass_through_a_state(case, data):
    x, sizes, _ = case
    cut = data.draw(st.integers(0, x["q"].shape[1]))
    slow, fast = leaves(x), leaves(x)
    weight = torch.randn_like(run(slow, **sizes)[0])
    names = [n for n in NAMES if n in x and n != "mix"]
    a, b = (
        torch.autograd.grad((run(y, cuts=cuts, **sizes)[0] * weight).sum(), [y[n] for n in names], allow_unused=True)
        for y, cuts in ((slow, ()), (fast, (cut,)))
    )
    floor = max(y.norm().item() for y in a if y is not None)
    for name, true, found in zip(names, a, b, strict=True):
        true, found = (torch.zeros((), dtype=torch.float64) if y is None else y for y in (true, found))
        assert (found - true).norm() <= 1e-10 * (true.norm() + floor), name


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_padding_in_front_changes_nothing(case, data):
    x, sizes, _ = case
    lead, B = data.draw(st.integers(1, 40)), len(x["q"])
    alone, (state, _) = run(x, **sizes)
    padded = {n: y if n == "mix" else torch.cat([torch.randn(B, lead, *y.shape[2:]).to(y), y], 1) for n, y in x.items()}
    padded |= {"g": torch.cat([-torch.rand(B, lead, *x["g"].shape[2:]).to(x["g"]), x["g"]], 1)} if "g" in x else {}
    hidden = torch.arange(padded["q"].shape[1]).expand(B, -1) < lead
    o, (last, _) = run(padded, hidden=hidden, **sizes)
    assert distance(o[:, lead:], alone) <= 1e-10 and distance(last, state) <= 1e-10


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap_bounds_the_scores_of_what_is_recalled(softcap):
    torch.manual_seed(0)
    x = dict(
        q=3 * torch.randn(2, 60, 4, 8), k=3 * torch.randn(2, 60, 2, 8), v=torch.randn(2, 60, 2, 5), mix=torch.rand(4)
    )
    x |= dict(q_log=torch.randn(2, 60, 4, 6), k_log=torch.randn(2, 60, 2, 6), score=torch.randn(2, 60, 2))
    x, sizes = {n: y.double() for n, y in x.items()}, dict(window=9, sinks=2, recall=7)
    wanted, _ = naive_liger_attention(**x, **sizes, softcap=softcap)
    assert distance(run(x, **sizes, softcap=softcap)[0], wanted) <= 1e-10
    with torch.no_grad():
        assert distance(run(x, cuts=(59,), **sizes, softcap=softcap)[0], wanted) <= 1e-10
    assert distance(run(x, **sizes)[0], wanted) > 0.01


def test_recall_of_everything_is_full_attention():
    """In float32 and bfloat16, with and without blocks of its own size."""
    torch.manual_seed(0)
    x = dict(
        q=torch.randn(2, 200, 4, 16), k=torch.randn(2, 200, 2, 16), v=torch.randn(2, 200, 2, 16), mix=torch.rand(4)
    )
    x |= dict(q_log=torch.randn(2, 200, 4, 6), k_log=torch.randn(2, 200, 2, 6), score=torch.randn(2, 200, 2))
    heads = (x[n].transpose(1, 2).double() for n in "qkv")
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    for dtype, bar in ((torch.float32, 2e-6), (torch.bfloat16, 6e-3)):
        y = {n: z.to(dtype) for n, z in x.items()}
        o, (_, (k, _, far)) = run(y, window=20, sinks=3, recall=200)
        assert o.dtype == k.dtype == dtype and far.dtype == torch.float32 and distance(o, wanted) <= bar
        # Without a state the recurrence has been told nothing.
        assert distance(run(y, window=20, sinks=3, recall=1)[0], wanted) > 0.05


def test_scores_of_any_size_are_ordered_alone():
    """What is not finite is ordered like numbers; the choice sees no padding however high it scores."""
    torch.manual_seed(0)
    x = dict(q=torch.randn(1, 50, 1, 4), k=torch.randn(1, 50, 1, 4), v=torch.randn(1, 50, 1, 4), mix=torch.ones(1))
    x |= dict(
        q_log=torch.randn(1, 50, 1, 4), k_log=torch.randn(1, 50, 1, 4), score=torch.randn(1, 50, 1).sort(1).values
    )
    sizes, far = dict(window=5, sinks=1, recall=6), x["score"].clone()
    far[:, :10], far[:, 30:] = -torch.inf, torch.inf
    x["score"][:, 30:] = 1e9
    assert torch.equal(run(x, **sizes)[0], run(x | dict(score=far), **sizes)[0])


def test_bad_arguments_are_named():
    x, k = torch.randn(1, 9, 2, 8), torch.randn(1, 13, 2, 8)
    score = torch.randn(1, 9, 2)
    _, state = liger_attention(x, k, k, x, x, None, window=4, recall=3, score=score, output_final_state=True)
    wrong = {
        "recall": [dict(recall=-1), dict(recall=1.5, score=score), dict(recall=True, score=score)],
        "score": [
            dict(recall=3),
            dict(score=score),
            dict(recall=3, score=score[:, 1:]),
            dict(recall=3, score=score.long()),
        ],
        "initial_state": [
            dict(recall=3, score=score, initial_state=state[0]),
            dict(recall=4, score=score, initial_state=state),
            dict(initial_state=state),
        ],
    }
    for name, cases in wrong.items():
        for options in cases:
            with pytest.raises(ValueError, match=f"^{name}.*: expected "):
                liger_attention(x, k, k, x, x, None, window=4, **options)
