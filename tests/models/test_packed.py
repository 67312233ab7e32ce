"""Several documents in a row, as training stacks send them: each is as if it were alone, in every layer.

Shapes: B batch, T time.
"""

import copy

import pytest
import torch
from transformers import DataCollatorWithFlattening

from liger_models import LigerForCausalLM, LigerModelConfig, as_original, make_cache
from liger_models._inputs import CACHE
from tests.models.tiny import NAMES, checkpoint_activations, linearize_tiny, tiny

LENGTHS = (5, 1, 19, 12)
STARTS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
T = sum(LENGTHS)
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def ids(rows=1):
    return torch.randint(3, 97, (rows, T), generator=torch.Generator().manual_seed(1))


def positions(lengths=LENGTHS):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def bounds(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0)


def alone(model, x, lengths=LENGTHS):
    parts = torch.split(x, list(lengths), 1)
    return torch.cat([model(part, use_cache=False).logits for part in parts], 1)


def scratch(**options):
    sizes = dict(vocab_size=97, hidden_size=32, num_attention_heads=4, initializer_range=0.2)
    mixers = ["liger", "mixer:gated_deltanet", "mom", "window", "liger:gla"]
    own = {"liger": dict(window=6, sinks=2, recall=3), "liger:gla": dict(window=4), "window": dict(window=5)}
    config = LigerModelConfig(mixers=mixers, num_hidden_layers=5, memories=3, mixer_options=own, **sizes)
    torch.manual_seed(0)
    return LigerForCausalLM(config)


def linear(name="llama", **options):
    model = linearize_tiny(tiny(name), **{**dict(window=6, sinks=2, recall=3), **options})
    # transformers multiplies experts in less; its norms are in float32 always, so that 2e-6 is what can be asked for.
    return model if name in EXPERTS else model.double()


def check(model, x, packed, shown=slice(None), wanted=None):
    """Logits of the packed call beside those of documents alone, and every gradient."""
    weight = torch.randn(*x.shape, model.config.vocab_size, dtype=model.dtype)
    found = []
    for run in (packed, wanted or (lambda: alone(model, x))):
        logits = run()
        model.zero_grad()
        (logits * weight)[:, shown].sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach()[:, shown], grads))
    (logits, grads), (separate, others) = found
    digits = 2e-6 if model.dtype == torch.double else 1e-5
    assert (logits - separate).abs().max() <= 2e-6 * separate.abs().max()
    assert set(grads) == set(others) and len(grads) > 5
    for name, grad in others.items():
        assert (grads[name] - grad).abs().max() <= digits * max(1.0, grad.abs().max()), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [(), (1,)], ids=["linear", "one kept"])
def test_positions_that_start_again_part_documents_in_every_family(name, keep):
    model, x = linear(name, keep=keep), ids()
    check(model, x, lambda: model(x, position_ids=positions()).logits)
    # It is what a row of one document is not.
    assert (model(x).logits - model(x, position_ids=positions()).logits)[:, LENGTHS[0] :].abs().max() > 1e-4


@pytest.mark.parametrize(
    "options", [dict(memories=3), dict(gate="gla"), dict(preset="paper-gsa"), dict(pattern="LFW")], ids=str
)
def test_every_kind_of_layer(options):
    options = {**dict(recall=0 if "preset" in options else 3), **options}
    model, x = linear(**options), ids()
    for name, parameter in model.named_parameters():
        if "memories.mix" in name:
            torch.nn.init.normal_(parameter)
    check(model, x, lambda: model(x, position_ids=positions()).logits)


def test_from_random_weights():
    model, x = scratch().double(), ids()
    check(model, x, lambda: model(x, position_ids=positions()).logits)


@pytest.mark.parametrize("keep", [(), (1,)])
@pytest.mark.parametrize(
    "told",
    [
        dict(cu_seq_lens_q=bounds(), cu_seq_lens_k=bounds(), max_length_q=19, max_length_k=19),
        dict(seq_idx=torch.repeat_interleave(torch.tensor(LENGTHS))[None].int()),
        dict(position_ids=positions(), cu_seq_lens_q=bounds().int()),
        dict(position_ids=positions(), attention_mask=torch.ones(1, T, dtype=torch.long)),
    ],
    ids=["bounds", "numbers", "both", "mask"],
)
def test_however_a_training_stack_says_it(told, keep):
    model, x = linear(keep=keep), ids()
    with torch.no_grad():
        assert (model(x, **told).logits - alone(model, x)).abs().max() <= 1e-9


@pytest.mark.parametrize("make", [lambda: linear(keep=(1,)), lambda: scratch().double()], ids=["linear", "scratch"])
def test_rows_of_several_documents_with_padding_behind(make):
    model, x = make(), ids(2)
    other = (7, 20)
    mask, position = torch.ones(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)
    mask[1, sum(other) :] = 0
    position[0] = positions()
    position[1, : sum(other)] = positions(other)
    with torch.no_grad():
        found = model(x, attention_mask=mask, position_ids=position).logits
        assert (found[:1] - alone(model, x[:1])).abs().max() <= 1e-9
        row = x[1:, : sum(other)]
        assert (found[1:, : sum(other)] - alone(model, row, other)).abs().max() <= 1e-9
        assert found.isfinite().all()


def test_what_the_collator_for_flattening_makes():
    model, x = linear(keep=(1,)), ids()
    rows = [dict(input_ids=part[0].tolist()) for part in torch.split(x, list(LENGTHS), 1)]
    for options in (dict(), dict(return_flash_attn_kwargs=True), dict(return_seq_idx=True)):
        batch = dict(DataCollatorWithFlattening(return_tensors="pt", **options)(rows))
        out = model(**batch)
        weighed = [len(row["input_ids"]) - 1 for row in rows]
        losses = [
            model(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["input_ids"]])).loss
            for r in rows
            if len(r["input_ids"]) > 1
        ]
        wanted = sum(n * loss for n, loss in zip([n for n in weighed if n], losses, strict=True)) / sum(weighed)
        assert (out.loss - wanted).abs() <= 2e-6


def test_activations_that_are_computed_again_know_their_documents():
    model, x = linear().train(), ids()
    grads = []
    for again in (False, True):
        if again:
            checkpoint_activations(model)
        model.zero_grad()
        model(x, position_ids=positions()).logits.square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert all((grads[0][n] - g).abs().max() <= 1e-9 * max(1, g.abs().max()) for n, g in grads[1].items())


def test_the_original_behind_it_parts_them_too():
    whole = tiny()
    model, x = linearize_tiny(copy.deepcopy(whole), window=6, sinks=2).double(), ids()
    with torch.no_grad(), as_original(model):
        assert (model(x, position_ids=positions()).logits - alone(whole.double(), x)).abs().max() <= 1e-9


def test_routers_are_weighed_over_all_documents():
    model, x = linear(memories=3), ids()
    told = dict(output_router_logits=True)
    found, plain = model(x, position_ids=positions(), **told), model(x, **told)
    assert [y.shape for y in found.router_logits] == [y.shape for y in plain.router_logits] == [(T, 3)] * 3
    parts = [model(part, **told).router_logits for part in torch.split(x, list(LENGTHS), 1)]
    for i, logits in enumerate(found.router_logits):
        assert (logits - torch.cat([part[i] for part in parts])).abs().max() <= 1e-9


@pytest.mark.parametrize("make", [linear, lambda: scratch().double()], ids=["linear", "scratch"])
@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            dict(cu_seq_lens_q=torch.tensor([0, 9, 5, T])),
            f"cu_seq_lens_q: expected integer bounds that rise from 0 to {T}",
        ),
        (dict(cu_seq_lens_q=torch.tensor([0, 9])), f"cu_seq_lens_q: expected integer bounds that rise from 0 to {T}"),
        (dict(cu_seq_lens_q=[0, T]), f"cu_seq_lens_q: expected integer bounds that rise from 0 to {T}"),
        (dict(seq_idx=torch.zeros(1, 3)), r"seq_idx: expected integers \[1, 37\], got \[1, 3\]"),
        (
            dict(position_ids=positions(), cu_seq_lens_q=torch.tensor([0, 5, T])),
            "position_ids: expected positions that go on in a document of cu_seq_lens_q",
        ),
        (
            dict(position_ids=positions(), seq_idx=torch.zeros(1, T)),
            "position_ids: expected positions that go on in a document of seq_idx",
        ),
        (
            dict(position_ids=torch.arange(T)[None], cu_seq_lens_q=bounds()),
            "position_ids: expected 0 where each of several documents",
        ),
        (
            dict(position_ids=torch.cat([torch.arange(9), torch.arange(3, T - 6)])[None]),
            "position_ids: expected 0 where each of several documents",
        ),
    ],
    ids=str,
)
def test_documents_that_cannot_be(told, message, make):
    with pytest.raises(ValueError, match=message):
        make()(ids(), **told)


def test_a_cache_has_one_state_a_row():
    model, x = linear(), ids()
    with pytest.raises(ValueError, match=f"{CACHE}: expected none beside several documents in a row"):
        model(x, position_ids=positions(), **{CACHE: make_cache(model.config)})
    with pytest.raises(ValueError, match="use_cache: expected False beside several documents in a row"):
        model(x, position_ids=positions(), use_cache=True)
    assert getattr(model(x, position_ids=positions()), CACHE) is None


def test_padding_inside_a_document_and_full_attention_do_not_go_together():
    mask = torch.ones(1, T, dtype=torch.long)
    mask[0, 9] = 0
    x = ids()
    with pytest.raises(ValueError, match="attention_mask: expected no padding inside a document beside layers of full"):
        linear(keep=(1,))(x, attention_mask=mask, seq_idx=torch.repeat_interleave(torch.tensor(LENGTHS))[None])
    model = linear()
    with torch.no_grad():
        found = model(x, attention_mask=mask, seq_idx=torch.repeat_interleave(torch.tensor(LENGTHS))[None]).logits
        wanted = alone(model, torch.cat([x[:, :9], x[:, 10:]], 1), (5, 1, 18, 12))
    assert (found[:, mask[0] == 1] - wanted).abs().max() <= 1e-9


@torch.no_grad()
def test_rows_of_padding_alone_and_of_nothing():
    model, x = linear(), ids()
    told = dict(seq_idx=torch.repeat_interleave(torch.tensor(LENGTHS))[None], position_ids=positions())
    assert model(x, attention_mask=torch.zeros_like(x), **told).logits.isfinite().all()
    assert model(x[:, :0]).logits.shape[1] == 0
