"""Padding anywhere, over any number of calls: every row gives what it gives alone, or the mask is refused.

Shapes: B batch, T columns of one call, S columns seen before.
"""

import pytest
import torch

from liger_layers.recurrences import with_gate, with_rule
from liger_models import LigerForCausalLM, LigerModelConfig, make_cache
from liger_models._inputs import CACHE
from liger_models.from_scratch import MIXERS
from tests.models.test_exactness import VARIANTS, ids
from tests.models.test_memories import stir
from tests.models.tiny import NAMES, linearize_tiny, tiny

# Columns that each of three rows shows, call after call: "1" is a token.
PATTERNS = {
    "left": ["0000011111111 1 1111111111 1", "1111111111111 1 1111111111 1", "0000000000001 1 1111111111 1"],
    "right": ["1111111100000 0 1111111000 1", "1111111111111 1 1111111111 1", "1111100000000 1 1111000000 0"],
    "holes": ["1001011100111 0 1010101111 1", "1111111111111 1 1111111111 1", "0100010000010 1 0001110001 1"],
    "ends early": ["0111111111100 0 0111111100 0", "1111111111111 1 1111110000 0", "0001111000000 0 1111111111 1"],
}


def random_pattern(rows, sizes, seed):
    """Rows that show some two thirds of their columns, and one that shows nothing in the second call."""
    generator = torch.Generator().manual_seed(seed)
    shown = [torch.rand(rows, size, generator=generator) < 0.65 for size in sizes]
    shown[1][0] = False
    shown[0][:, 0] = True
    return shown


def read(pattern):
    calls = zip(*(row.split() for row in pattern), strict=True)
    return [torch.tensor([[c == "1" for c in row] for row in call]) for call in calls]


@torch.no_grad()
def distance(model, shown, positions, vocabulary=97):
    """The largest difference, at shown columns, between rows in one batch and each alone."""
    B, lengths = len(shown[0]), torch.cat(shown, 1).sum(1)
    rows = [ids(B, int(lengths.max()))[row, : lengths[row]] % vocabulary for row in range(B)]
    cache, found, taken, mask = make_cache(model.config), [[] for _ in range(B)], [0] * B, torch.zeros(B, 0).bool()
    for columns in shown:
        tokens = torch.randint(3, vocabulary, columns.shape)
        for row in range(B):
            count = int(columns[row].sum())
            tokens[row, columns[row]] = rows[row][taken[row] : taken[row] + count]
            taken[row] += count
        mask = torch.cat([mask, columns], 1)
        told = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -columns.shape[1] :]} if positions else {}
        logits = model(tokens, attention_mask=mask.long(), **{CACHE: cache}, **told).logits
        assert logits.isfinite().all()
        for row in range(B):
            found[row].append(logits[row, columns[row]])
    alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    return max((torch.cat(parts) - wanted).abs().max().item() for parts, wanted in zip(found, alone, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_family_in_every_pattern(name):
    model = linearize_tiny(tiny(name), window=6, sinks=2)
    for number, pattern in enumerate(PATTERNS.values()):
        assert distance(model, read(pattern), positions=number % 2 == 0) <= 1e-4
    hybrid = linearize_tiny(tiny(name), window=6, sinks=2, keep=[1])
    assert distance(hybrid, read(PATTERNS["holes"]), positions=True) <= 1e-4


OPTIONS = {gate: dict(gate=gate, tau=2.0) for gate in with_gate()} | {f"{n}, variant": VARIANTS[n] for n in VARIANTS}
OPTIONS |= {f"{gate}, recalling": dict(gate=gate, tau=2.0, recall=4) for gate in ("gated_retention", "gla", "linear")}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_gate_in_double_precision(options):
    model = stir(linearize_tiny(tiny(), **{"window": 6, "sinks": 2, **OPTIONS[options]}).double())
    for shown in (*map(read, PATTERNS.values()), random_pattern(3, (20, 5, 1, 1, 13, 1), 0)):
        assert distance(model, shown, positions=False) <= 1e-10


@pytest.mark.parametrize("mixer", [*MIXERS, *(f"mixer:{rule}" for rule in with_rule())])
def test_every_mixer_from_random_weights(mixer):
    config = LigerModelConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mixers=mixer, initializer_range=0.2
    )
    options = {"window": 6, "sinks": 2} if mixer in ("liger", "window") else {}
    model = (
        LigerForCausalLM(LigerModelConfig(**{**config.to_dict(), "mixer_options": {mixer: options}})).double().eval()
    )
    for shown in (read(PATTERNS["holes"]), random_pattern(3, (20, 5, 1, 1, 13, 1), 1)):
        assert distance(model, shown, positions=False) <= 1e-10


def chat(model, prompts, end, turns=3, new=12):
    """Tokens that each row is given and writes over several turns in one batch; a row's answer ends with `end`."""
    B, cache, rows = len(prompts), make_cache(model.config), [[] for _ in prompts]
    tokens, mask = torch.zeros(B, 0, dtype=torch.long), torch.zeros(B, 0, dtype=torch.long)
    for turn in range(turns):
        said = [prompt[turn] for prompt in prompts]
        width = max(len(x) for x in said)
        padded = torch.tensor([[0] * (width - len(x)) + x for x in said])
        tokens, mask = torch.cat([tokens, padded], 1), torch.cat([mask, (padded > 0).long()], 1)
        options = dict(
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=end,
            pad_token_id=0,
            suppress_tokens=[0],
            repetition_penalty=3.0,
        )
        out = model.generate(tokens, attention_mask=mask, **{CACHE: cache}, **options)
        answers = out[:, tokens.shape[1] :]
        # The last token of each answer has not been read yet.
        for row in range(B):
            rows[row] += said[row] + answers[row][answers[row] > 0].tolist()
        tokens, mask = out, torch.cat([mask, (answers > 0).long()], 1)
    return rows


@torch.no_grad()
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("kind", ["default", "memories", "hybrid", "scratch"])
def test_rows_that_end_early_go_on_in_the_next_turn(kind, equal):
    if kind == "scratch":
        sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        model = LigerForCausalLM(LigerModelConfig(mixers=["mom", "mixer:gla"], initializer_range=0.5, **sizes)).eval()
    else:
        model = stir(linearize_tiny(tiny(), **VARIANTS[kind]))
    x = ids(4, 60).tolist()
    longer = [0] * 4 if equal else [0, 7, 5, 3]
    prompts = [[x[row][20 * t : 20 * t + 5 + (longer[row] + 3 * t) % 9] for t in range(3)] for row in range(4)]
    end = list(range(3, 97, 3))
    together = chat(model, prompts, end)
    alone = [chat(model, [prompt], end)[0] for prompt in prompts]
    assert together == alone
    answers = {len(row) - sum(map(len, prompt)) for row, prompt in zip(together, prompts, strict=True)}
    assert len(answers) > 1, "rows are to end at different times"


def filled(model, mask):
    cache = make_cache(model.config)
    mask = torch.tensor(mask)
    model(ids(*mask.shape), attention_mask=mask, **{CACHE: cache})
    return cache


@torch.no_grad()
@pytest.mark.parametrize(
    ("before", "mask", "message"),
    [
        ([[1] * 6], [[1] * 4 + [0] * 2 + [1] * 3], "got 4 shown in row 0, where it took in 6"),
        ([[0, 0, 1, 1, 1, 1]], [[0, 1, 1, 1, 1, 1] + [1] * 3], "got 5 shown in row 0, where it took in 4"),
        ([[0, 1, 1, 1, 1, 1]], [[1, 0, 1, 1, 1, 1] + [1] * 3], "the columns that the cache holds .* got others"),
        ([[0, 1, 1, 1, 1, 1]], None, "got none, which shows all of them"),
        ([[1] * 6], [[1] * 3], r"\[batch, tokens\] = \[1, 9\], .*6 of the columns are in the cache, got \[1, 3\]"),
        ([[1] * 6], [[1] * 13], r"got \[1, 13\]"),
        ([[1] * 6], [[1] * 9] * 2, r"got \[2, 9\]"),
        ([[1] * 6], [[1] * 8 + [2]], "numbers 0 and 1"),
        ([[1] * 6], [1] * 9, "got a prepared pattern"),
    ],
)
def test_a_mask_that_cannot_be_followed_is_refused(before, mask, message):
    for model in (linearize_tiny(tiny(), window=4), linearize_tiny(tiny(), window=4, keep=[0])):
        cache = filled(model, before)
        with pytest.raises(ValueError, match=f"attention_mask: expected .*{message}"):
            model(ids(1, 3), attention_mask=None if mask is None else torch.tensor(mask), **{CACHE: cache})
        # What was refused has changed nothing.
        again = [[*before[0], 1, 1, 1]]
        fresh = filled(model, before)
        told = dict(attention_mask=torch.tensor(again))
        wanted = model(ids(1, 3), **told, **{CACHE: fresh}).logits
        assert torch.equal(model(ids(1, 3), **told, **{CACHE: cache}).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(window=5), "expected one of a model with window 4, got one with 5"),
        (dict(sinks=1), "expected one of a model with sinks 4, got one with 1"),
        (dict(gate="gla"), "expected one of a model with gate 'gated_retention', got one with 'gla'"),
        (dict(keep=[1]), r"expected one of a model with keep \[\], got one with \[1\]"),
        (dict(pattern="LWL"), r"expected one of a model with pattern .*, got one with \['liger', 'window', 'liger'\]"),
    ],
)
def test_a_cache_of_another_conversion_is_refused(other, message):
    model = linearize_tiny(tiny(), window=4)
    cache = filled(linearize_tiny(tiny(), **{"window": 4, **other}), [[1] * 6])
    with pytest.raises(ValueError, match=f"{CACHE}: {message}"):
        model(ids(1, 3), **{CACHE: cache})


@torch.no_grad()
def test_a_cache_of_another_batch_prompt_or_call_is_refused():
    model = linearize_tiny(tiny(), window=4)
    cache = filled(model, [[1] * 6])
    with pytest.raises(ValueError, match=f"{CACHE}: expected 2 rows as in the batch, got 1"):
        model(ids(2, 3), **{CACHE: cache})
    options = dict(max_new_tokens=2, do_sample=False, pad_token_id=0)
    other = ids(1, 9).flip(1)
    with pytest.raises(
        ValueError, match=f"{CACHE}: expected one that holds the beginning of input_ids, got one of anoth"
    ):
        model.generate(other, attention_mask=torch.ones_like(other), **{CACHE: cache}, **options)
    with pytest.raises(ValueError, match="input_ids: expected more than the 6 columns in the cache, got 6"):
        model.generate(ids(1, 6), attention_mask=torch.ones(1, 6), **{CACHE: cache}, **options)
    told = dict(attention_mask=torch.ones(1, 9, dtype=torch.long), **{CACHE: cache})
    assert model.generate(ids(1, 9), **told, **options).shape == (1, 11)
    # The last token that generate wrote, which nobody has read, and two more: without what the cache holds.
    told = dict(attention_mask=torch.ones(1, 13, dtype=torch.long), **{CACHE: cache})
    assert model.generate(ids(1, 3), **told, **options).shape == (1, 5) and cache.get_seq_length() == 14
    cache.layers[1].seen -= 1
    with pytest.raises(ValueError, match=r"expected layers that have seen as much, got \[\d+, \d+\]: a call was cut"):
        model(ids(1, 3), **{CACHE: cache})


@torch.no_grad()
def test_no_cache_mask_or_positions_are_swallowed():
    model = linearize_tiny(tiny(), window=4)
    x, cache = ids(1, 9), make_cache(model.config)
    wanted = model(x, use_cache=False).logits
    for name in ("cache", "past_key_values"):
        cache = make_cache(model.config)
        parts = [model(part, **{name: cache}) for part in x.split([4, 5], 1)]
        assert parts[1][CACHE] is cache and cache.get_seq_length() == 9
        assert (torch.cat([part.logits for part in parts], 1) - wanted).abs().max() <= 1e-4
    with pytest.raises(ValueError, match=f"{CACHE}: expected one cache, got two"):
        model.model(x, cache=cache, past_key_values=make_cache(model.config))
    with pytest.raises(ValueError, match="state: expected a cache under the name"):
        model(x, state=cache)
    with pytest.raises(ValueError, match="padding_mask: expected attention_mask or position_ids"):
        model(x, padding_mask=torch.ones_like(x))
    with pytest.raises(ValueError, match="positions: expected attention_mask or position_ids"):
        model(x, positions=torch.arange(9))
    with pytest.raises(ValueError, match=r"position_ids: expected integers \[1 or 1, 9\], got \[1, 8\]"):
        model(x, position_ids=torch.arange(8)[None])
    layer = model.model.layers[0].self_attn
    tables = model.model.rotary_emb(torch.zeros(1, 9, 48), torch.arange(9)[None])
    with pytest.raises(ValueError, match="attention_mask: expected liger_mask beside it"):
        layer(torch.randn(1, 9, 48), tables, torch.ones(1, 1, 9, 9))


@torch.no_grad()
def test_a_compiled_model_refuses_what_the_eager_one_refuses():
    model = linearize_tiny(tiny(num_hidden_layers=1), window=4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, mask = ids(1, 8), torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1]])
    shown = mask[0].bool()
    for told in (dict(attention_mask=mask), dict(position_ids=torch.arange(8)[None])):
        got, wanted = (f(x, use_cache=False, **told).logits[0, shown] for f in (compiled, model))
        assert (got - wanted).abs().max() <= 1e-6
    # A graph cannot raise a ValueError, and has no shapes for documents.
    for name, value in (("position_ids", [[0, 1, 2, 3, 0, 1, 2, 3]]), ("seq_idx", [[0] * 4 + [1] * 4])):
        model(x, use_cache=False, **{name: torch.tensor(value)})
        with pytest.raises(RuntimeError, match=f"{name}: expected one document per row in a compiled graph"):
            compiled(x, use_cache=False, **{name: torch.tensor(value)})
    cache, whole = make_cache(model.config), torch.cat([mask, torch.ones(1, 3, dtype=torch.long)], 1)
    compiled(x, attention_mask=mask, **{CACHE: cache})
    for t in range(9, 11):
        step = compiled(ids(1, 11)[:, t - 1 : t], attention_mask=whole[:, :t], **{CACHE: cache}).logits
    wanted = model(ids(1, 11)[:, :10], attention_mask=whole[:, :10], use_cache=False).logits[:, -1:]
    assert (step - wanted).abs().max() <= 1e-4
    whole[:, 3] = 0
    with pytest.raises(RuntimeError, match="attention_mask: expected the columns that the cache holds"):
        compiled(ids(1, 11)[:, 10:], attention_mask=whole, **{CACHE: cache})


@torch.no_grad()
@pytest.mark.parametrize("keep", [[], [1]])
def test_documents_behind_padding_are_apart(keep):
    model, x = linearize_tiny(tiny(), window=4, keep=keep), ids(1, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1]])
    position = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2]])
    found = model(x, attention_mask=mask, position_ids=position).logits
    for part in (slice(4), slice(5, 8)):
        assert (found[:, part] - model(x[:, part], use_cache=False).logits).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("keep", [[], [0], [2]])
def test_a_call_that_was_cut_short_leaves_the_cache_as_it_was_or_known_to_be_broken(keep):
    model, x = linearize_tiny(tiny(), window=4, keep=keep), ids(1, 20)
    wanted = model(x, use_cache=False).logits[:, 10:]

    def fail(*args):
        raise MemoryError

    for place in ("embed_tokens", "layers.0.mlp", "layers.1.mlp"):
        cache = make_cache(model.config)
        model(x[:, :10], **{CACHE: cache})
        hook = model.model.get_submodule(place).register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(x[:, 10:], **{CACHE: cache})
        hook.remove()
        if place == "embed_tokens":
            assert (model(x[:, 10:], **{CACHE: cache}).logits - wanted).abs().max() <= 1e-4
        else:
            with pytest.raises(ValueError, match=f"{CACHE}: expected layers that have seen as much"):
                model(x[:, 10:], **{CACHE: cache})


@torch.no_grad()
def test_positions_that_start_again_behind_a_cache_are_refused():
    model, x, cache = linearize_tiny(tiny(), window=4), ids(1, 20), make_cache(linearize_tiny(tiny(), window=4).config)
    model(x[:, :10], **{CACHE: cache})
    with pytest.raises(ValueError, match="position_ids: expected positions behind the tokens in the cache"):
        model(x[:, 10:], position_ids=torch.arange(10)[None], **{CACHE: cache})
    got = model(x[:, 10:], position_ids=torch.arange(10, 20)[None], **{CACHE: cache}).logits
    assert (got - model(x, use_cache=False).logits[:, 10:]).abs().max() <= 1e-4
