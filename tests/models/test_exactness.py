"""What a linearized model must equal: the original, itself in pieces, each prompt alone, the published formula."""

import pytest
import torch

from liger_models import make_cache
from liger_models._inputs import CACHE
from liger_models.modeling import LinearizedAttention
from liger_ops import naive_gsa, naive_recurrence, naive_sliding_window_attention
from tests.models.tiny import NAMES, linearize_tiny, tiny

VARIANTS = {
    "default": dict(window=8, sinks=2),
    "gla": dict(window=8, sinks=2, gate="gla", tau=16.0),
    "sum": dict(window=8, sinks=2, mixing="sum", mix=0.3, feature_map="softmax"),
    "paper-gla": dict(preset="paper-gla", window=8),
    "gated_deltanet": dict(window=8, sinks=2, gate="gated_deltanet", tau=1.0, mix=0.5),
    "hgrn2": dict(window=8, sinks=2, gate="hgrn2", tau=2.0, mix=0.5),
    "gsa": dict(window=8, sinks=2, gate="gsa", tau=2.0, mix=0.5, memories=3),
    "memories": dict(window=8, sinks=2, memories=3),
    "hybrid": dict(window=8, sinks=2, keep=[1]),
}


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[(n, v) for n in NAMES for v in (VARIANTS if n == "llama" else ("default", "hybrid"))], ids=str)
def model(request):
    name, variant = request.param
    model = linearize_tiny(tiny(name), **VARIANTS[variant])
    for layer in model.model.layers:
        if getattr(layer.self_attn, "memories", None) is not None:
            torch.nn.init.uniform_(layer.self_attn.memories.mix.weight, 0.5, 1.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [dict(window=64, mix=0.0), dict(window=64, preset="paper-gla", mix=0.0)])
def test_wide_window_without_recurrence_is_the_original(name, options):
    original = tiny(name)
    x = ids(2, 40)
    wanted = original(x).logits
    assert (linearize_tiny(original, **options)(x).logits - wanted).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_wide_window_of_the_default_is_the_original(name):
    original = tiny(name)
    x = ids(2, 40)
    wanted = original(x).logits
    assert (linearize_tiny(original, window=40)(x).logits - wanted).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (3, 30, 1, 16), (20, 1, 1, 28), (7, 9, 11, 23)], ids=str)
def test_prefill_in_pieces_equals_one_forward(model, sizes):
    x = ids(2, 50)
    whole = model(x, use_cache=False).logits
    cache, parts = make_cache(model.config), []
    for part in x.split(sizes, 1):
        parts.append(model(part, **{CACHE: cache}).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4
    assert cache.get_seq_length() == 50


@torch.no_grad()
def test_left_padded_batch_equals_each_prompt_alone(model):
    lengths, new = (31, 17, 5, 1), 20
    prompts = [ids(1, n + new)[:, :n] for n in lengths]
    follow = ids(1, 60)[:, :new]
    width = max(lengths)
    padded = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, p in enumerate(prompts):
        padded[row, width - p.shape[1] :], mask[row, width - p.shape[1] :] = p, 1
    cache = make_cache(model.config)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    batch = model(padded, attention_mask=mask, position_ids=position, **{CACHE: cache}).logits
    steps = []
    for t in range(new):
        mask = torch.cat([mask, mask.new_ones(len(lengths), 1)], 1)
        token = follow[:, t : t + 1].expand(len(lengths), 1)
        position = mask.sum(1, keepdim=True) - 1
        steps.append(model(token, attention_mask=mask, position_ids=position, **{CACHE: cache}).logits)
    for row, p in enumerate(prompts):
        alone = model(torch.cat([p, follow], 1), use_cache=False).logits[0]
        together = torch.cat([batch[row, width - p.shape[1] :], *(s[row] for s in steps)])
        assert torch.isfinite(batch).all()
        assert (together - alone).abs().max() <= 1e-4


@torch.no_grad()
def test_right_padding_changes_no_real_token(model):
    x, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 23:] = 0
    padded = model(x, attention_mask=mask, use_cache=False).logits
    assert (padded[1, :23] - model(x[1:, :23], use_cache=False).logits[0]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["paper-gla", "paper-gsa", "paper-hgrn2"])
def test_paper_presets_are_the_published_formula_layer_by_layer(name, preset):
    model = linearize_tiny(tiny(name), preset=preset, window=16)
    check_published(model, ids(2, 60), 16, preset)


def published_recurrence(preset, q, k, v):
    decay = torch.nn.functional.logsigmoid(k)
    if preset == "paper-gla":
        return naive_recurrence(q.softmax(-1), k.softmax(-1), v, decay / 16, scale=1.0)[0]
    if preset == "paper-gsa":
        return naive_gsa(q.softmax(-1), k, v, 1 - (decay / 16).exp(), decay / 16, scale=1.0)[0]
    return naive_recurrence(q.softmax(-1), 1 - k.sigmoid(), v, decay, scale=1.0)[0]


def rotated(x, cos, sin):
    x, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = x.chunk(2, -1)
    return torch.cat([x * cos.unsqueeze(2) + torch.cat([-b, a], -1) * sin.unsqueeze(2), rest], -1)


def check_published(model, x, window, preset="paper-gla", tolerance=1e-4):
    """Recompute every attention layer from its own input with the naive reference."""
    seen, worst, hooks = {}, 0.0, []
    for index, layer in enumerate(model.model.layers):
        hooks.append(
            layer.self_attn.register_forward_hook(
                lambda m, a, k, o, i=index: seen.update({i: (k, o[0])}), with_kwargs=True
            )
        )
    model(x, use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(model.model.layers):
        if not isinstance(layer.self_attn, LinearizedAttention):
            continue
        m, (kwargs, got) = layer.self_attn, seen[index]
        h = kwargs["hidden_states"]
        q, k, v = m.project(h)
        far = published_recurrence(preset, q, k, v)
        if m.traits.rotary:
            q, k = (rotated(t, *kwargs["position_embeddings"]) for t in (q, k))
        near = naive_sliding_window_attention(q, k, v, window, scale=m.window.scale, softcap=m.window.softcap)
        wanted = m.o_proj((0.5 * far + 0.5 * near).flatten(2))
        worst = max(worst, ((got - wanted).norm() / wanted.norm()).item())
    assert worst <= tolerance
    return worst


@torch.no_grad()
def test_the_recurrence_reaches_beyond_the_window():
    model = linearize_tiny(tiny(), window=8, sinks=0)
    x = ids(1, 60)
    y = x.clone()
    y[0, 5] = (x[0, 5] + 1) % 97
    assert (model(x).logits[0, -1] - model(y).logits[0, -1]).abs().max() > 1e-4
