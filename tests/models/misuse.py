"""Ways to give a model, or a layer, a cache that is not its own: each ends in the right numbers or in one refusal."""

import copy
import io
import pickle
from contextlib import ExitStack

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from liger_layers.calls import with_window
from liger_models import LigerConfig, LigerForCausalLM, LigerModelConfig, as_original, make_cache
from liger_models._inputs import CACHE
from liger_models.checkpoint import quiet_peft
from liger_models.modeling import FAMILIES
from liger_models.variants import window_alone, with_recall, without_recall, without_recurrence
from tests.models.tiny import SIZES, tiny

IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
# Columns that a cache holds, and those behind them: one token is decoding, several are not.
HELD = 24


def make(seed=0, family="llama", sizes=None, **options):
    """A linearized model with random weights that nothing was measured for."""
    config, model = FAMILIES[family]
    liger = LigerConfig(**{"window": 8, "sinks": 2, "recall": 3, **options})
    torch.manual_seed(seed)
    made = model(config(**SIZES | (sizes or {}), initializer_range=0.3, liger=liger.to_dict())).eval()
    return made.requires_grad_(False)


def scratch(seed=0, **options):
    """A model that was trained from random weights, and is not."""
    sizes = dict(vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, initializer_range=0.3)
    torch.manual_seed(seed)
    told = {"mixers": ["mom", "liger"], "memories": 2, **options}
    return LigerForCausalLM(LigerModelConfig(**sizes, **told)).eval().requires_grad_(False)


def adapted(model, **options):
    """With adapters on its queries."""
    with quiet_peft():
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))


def fill(model, rows=1, tokens=HELD):
    cache = DynamicCache()
    model(IDS[:rows, :tokens], **{CACHE: cache})
    return cache


def go_on(model, cache, more=3, start=HELD, rows=1, **options):
    """What the cache leads to, and what the whole text does."""
    found = model(IDS[:rows, start : start + more], **{CACHE: cache}, **options).logits
    return found, model(IDS[:rows, : start + more], use_cache=False).logits[:, -more:]


def of_another(model, other):
    return lambda: go_on(model(), fill(other()))


def told_otherwise():
    """Caches of models of another configuration."""
    options = [dict(window=9), dict(window=7), dict(sinks=3), dict(sinks=0), dict(tau=8.0), dict(recall=2)]
    options += [dict(recall=0), dict(memories=2), dict(keep=(1,)), dict(keep=(0, 2)), dict(pattern="LWL")]
    options += [dict(learn_mix=False), dict(feature_map="softmax"), dict(mix=0.5), dict(pool="heads")]
    options += [dict(gate=name) for name in ("gla", "retention", "mamba2")]
    options += [dict(gate=name, recall=0) for name in ("gated_deltanet", "hgrn2", "gsa")]
    options += [dict(mixing="sum", recall=0), dict(mixing="sum", recall=0, normalize=False)]
    for one in options:
        name = ",".join(f"{key}={value}" for key, value in one.items())
        yield f"filled with {name}", of_another(make, lambda one=one: make(**one))
        yield f"gone on with {name}", of_another(lambda one=one: make(**one), make)
    yield "top_k", of_another(lambda: make(memories=3, top_k=1), lambda: make(memories=3, top_k=2))
    for name in ("mistral", "qwen2"):
        yield f"a {name}", of_another(make, lambda name=name: make(family=name))
    for size, value in (("num_hidden_layers", 2), ("num_attention_heads", 2), ("num_key_value_heads", 4)):
        yield size, of_another(make, lambda size=size, value=value: make(sizes={size: value}))
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        yield f"filled in {kind}", of_another(make, lambda kind=kind: make().to(kind))
    for one in (dict(mixers=["mom", "mixer:gla"]), dict(memories=3), dict(conv_size=3)):
        yield f"from scratch with {one}", of_another(scratch, lambda one=one: scratch(**one))


def _doubled(name):
    def change(model):
        model.get_parameter(name).mul_(2)

    return change


def _replaced(model):
    norm = model.model.layers[1].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight * 2, requires_grad=False)


def _moved(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2


def _another_mlp(model):
    model.model.layers[0].mlp = make(seed=1).model.layers[0].mlp


def _step(model):
    optimizer = torch.optim.AdamW(model.requires_grad_().parameters(), lr=1e-2)
    with torch.enable_grad():
        model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.requires_grad_(False)


CHANGES = {
    "all weights": lambda model: [x.mul_(1.1) for x in model.parameters()],
    "a step": _step,
    "embeddings": _doubled("model.embed_tokens.weight"),
    "a first layer": _doubled("model.layers.0.self_attn.q_proj.weight"),
    "a last layer": _doubled("model.layers.2.mlp.down_proj.weight"),
    "a norm": _doubled("model.layers.1.input_layernorm.weight"),
    "a mix": lambda model: model.model.layers[0].self_attn.mix.weight.fill_(0.1),
    "a score": lambda model: model.model.layers[0].self_attn.score.weight.normal_(),
    "one row": lambda model: model.model.embed_tokens.weight[int(IDS[0, 3])].mul_(3),
    "a parameter in the place of another": _replaced,
    "data in the place of others": _moved,
    "loaded weights": lambda model: model.load_state_dict(make(seed=1).state_dict()),
    "assigned weights": lambda model: model.load_state_dict(make(seed=1).state_dict(), assign=True),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "there and back": lambda model: model.to(torch.float16).float(),
    "double": lambda model: model.double(),
}


def other_weights():
    """Caches of the same configuration with other weights: of another model, or of the same one earlier."""

    def changed(change, more):
        model = make()
        cache = fill(model)
        change(model)
        return go_on(model, cache, more)

    for name, change in CHANGES.items():
        for more in (1, 3):
            yield f"{name} changed before {more}", lambda change=change, more=more: changed(change, more)
    yield "a module in the place of another", lambda: changed(_another_mlp, 3)
    yield "another model", of_another(make, lambda: make(seed=1))
    yield "another model from scratch", of_another(scratch, lambda: scratch(seed=1))
    yield "one from scratch, changed", lambda: _scratch_changed()

    def adapters(before, after):
        model = adapted(make(), init_lora_weights=False)
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        model.eval()
        with ExitStack() as stack:
            before(model, stack)
            cache = fill(model)
        with ExitStack() as stack:
            after(model, stack)
            return go_on(model, cache, 1)

    on, off = lambda model, stack: None, lambda model, stack: stack.enter_context(model.disable_adapter())
    yield "adapters switched off", lambda: adapters(on, off)
    yield "adapters switched on", lambda: adapters(off, on)
    yield "another adapter", lambda: adapters(on, lambda model, stack: model.set_adapter("other"))


def _scratch_changed():
    model = scratch()
    cache = fill(model)
    model.model.layers[0].mixer.v_proj.weight.mul_(2)
    return go_on(model, cache)


def switched():
    """Caches from before something was switched off for a while, or from then."""
    ways = {"without_recurrence": without_recurrence, "without_recall": without_recall, "window_alone": window_alone}
    ways |= {"with_recall": lambda model: with_recall(model, 2), "as_original": as_original}
    ways["with_window"] = lambda model: with_window([x.self_attn for x in model.model.layers], 5)

    def across(way, inside):
        model, found = make(), []
        with way(model):
            found.append(fill(model, tokens=HELD) if not inside else None)
        cache = fill(model) if inside else found[0]
        with way(model) if inside else ExitStack():
            return go_on(model, cache)

    for name, way in ways.items():
        yield f"{name} after it was filled", lambda way=way: across(way, True)
        yield f"{name} while it was filled", lambda way=way: across(way, False)


def tampered():
    """Caches whose layers are not as the model left them."""

    def changed(change, **options):
        model = make(**options)
        cache = fill(model)
        other = change(cache, model)
        return go_on(model, other if isinstance(other, DynamicCache) else cache)

    def swap(cache, model):
        cache.layers[1], cache.layers[2] = cache.layers[2], cache.layers[1]

    def other(model):
        cache = DynamicCache()
        model(IDS[1:, :HELD], **{CACHE: cache})
        return cache

    def graft(cache, model):
        cache.layers[1] = other(model).layers[1]

    def branch(cache, model):
        cache.layers[1] = copy.deepcopy(cache).layers[1]

    def gather(cache, model):
        found = DynamicCache()
        found.layers = cache.layers[::-1]
        return found

    def meta(cache, model):
        for layer in cache.layers:
            layer._map(lambda x: x.to("meta"))

    def halves(cache, model):
        for layer in cache.layers:
            layer.state = layer.state.map(lambda x: x.half() if x.is_floating_point() else x)

    yield "reversed", lambda: changed(lambda cache, model: cache.layers.reverse())
    yield "swapped", lambda: changed(swap)
    yield "swapped, one kept", lambda: changed(swap, keep=(1,))
    yield "grafted", lambda: changed(graft)
    yield "grafted, one kept", lambda: changed(graft, keep=(1,))
    yield "of a branch", lambda: changed(branch)
    yield "one less", lambda: changed(lambda cache, model: cache.layers.pop())
    yield "one more", lambda: changed(lambda cache, model: cache.layers.append(copy.deepcopy(cache.layers[0])))
    yield "twice the first", lambda: changed(lambda cache, model: cache.layers.__setitem__(1, cache.layers[0]))
    yield "gathered in another cache", lambda: changed(gather)
    yield "on the meta device", lambda: changed(meta)
    yield "in halves", lambda: changed(halves)
    yield "one layer reset", lambda: changed(lambda cache, model: cache.layers[0].reset())
    yield "rows of one layer", lambda: changed(lambda cache, model: cache.layers[1].batch_repeat_interleave(2))


def handled():
    """Caches copied, moved and reordered as they may be."""

    def through(change, rows=1, options=None, **more):
        model = make(**(options or {}))
        return go_on(model, change(fill(model, rows), model), rows=rows, **more)

    def saved(cache, model):
        file = io.BytesIO()
        torch.save(cache, file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    def reset(cache, model):
        cache.reset()
        model(IDS[:1, :HELD], **{CACHE: cache})
        return cache

    def branches(cache, model):
        other = copy.deepcopy(cache)
        model(IDS[1:, :5], **{CACHE: other})
        return cache

    # What is right may not be refused.
    yield "right: deep copy", lambda: through(lambda cache, model: copy.deepcopy(cache))
    yield "right: two branches", lambda: through(branches)
    yield "right: pickled", lambda: through(lambda cache, model: pickle.loads(pickle.dumps(cache)))
    yield "right: saved", lambda: through(saved)
    yield "right: saved, one kept", lambda: through(saved, options=dict(keep=(0,)))
    yield "right: reset", lambda: through(reset)
    for name, change in {
        "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
        "repeated": lambda cache: cache.batch_repeat_interleave(2),
    }.items():
        yield f"right: {name}", lambda change=change: _rearranged(change)
    yield "right: saved, for the same weights elsewhere", lambda: _elsewhere(saved)
    yield "right: the same weights again", lambda: _elsewhere(lambda cache, model: cache)
    yield "right: another head", lambda: _another_head()
    yield "cropped", lambda: through(lambda cache, model: cache.crop(-1))
    yield "two rows for one", lambda: through(lambda cache, model: fill(model, 2))
    yield "one row for two", lambda: go_on(make(), fill(make()), rows=2)
    for name, wrong in {"longer": HELD + 4, "shorter": HELD + 2, "of what is new": 3}.items():
        mask = torch.ones(1, wrong, dtype=torch.long)
        yield f"a mask that is {name}", lambda mask=mask: through(lambda c, m: c, attention_mask=mask)
    hiding = torch.ones(1, HELD + 3, dtype=torch.long)
    hiding[0, 2] = 0
    yield "a mask that hides", lambda: through(lambda c, m: c, attention_mask=hiding)
    yield "positions from the start", lambda: through(lambda c, m: c, position_ids=torch.arange(3)[None])


def _rearranged(change):
    """Rows of a cache in another order; other numbers of them go on as the first."""
    model = make()
    cache, rows = fill(model, 2), torch.arange(2)
    change(cache)
    size = len(cache.layers[0].account.columns)
    rows = {1: rows[1:], 4: rows.repeat_interleave(2), 2: rows.flip(0)}[size]
    found = model(IDS[rows, HELD : HELD + 3], **{CACHE: cache}).logits
    return found, model(IDS[rows, : HELD + 3], use_cache=False).logits[:, -3:]


def _another_head():
    model = make()
    cache = fill(model)
    model.lm_head.weight.mul_(2)
    return go_on(model, cache)


def _elsewhere(saved):
    model, other = make(), make(seed=1)
    cache = saved(fill(model), model)
    other.load_state_dict(model.state_dict())
    return go_on(other, cache)


def foreign():
    """Things that are no cache of a linearized model."""
    for name, thing in {
        "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
        "encoder and decoder": lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "legacy": lambda model: tuple((torch.zeros(1, 2, HELD, 12),) * 2 for _ in range(3)),
        "list": lambda model: make_cache(model.config).layers,
        "dict": lambda model: {"layers": []},
        "of the original": lambda model: fill(tiny()),
        "from scratch": lambda model: fill(scratch()),
    }.items():
        for keep in ((), (1,)):
            yield f"{name}, {len(keep)} kept", lambda thing=thing, keep=keep: _foreign(thing, keep)
    # Layers that keep keys and values are moved by transformers, which asks for a GPU.
    yield "offloading", lambda: _foreign(lambda model: DynamicCache(config=model.config, offloading=True), ())
    yield "one of ours to the original", lambda: go_on(tiny(), fill(make()))


def _foreign(thing, keep):
    model = make(keep=keep)
    cache = thing(model)
    model(IDS[:1, :HELD], **{CACHE: cache})
    return go_on(model, cache)


GROUPS = (told_otherwise, other_weights, switched, tampered, handled, foreign)


def judge(case) -> str:
    """ "right", "refused: why", or what went wrong."""
    with torch.no_grad():
        try:
            found, wanted = case()
        except (ValueError, RuntimeError) as error:
            clear = any(
                words in str(error) for words in (": expected ", "cannot forget", "a Liger layer keeps a state")
            )
            return f"{'refused' if clear and len(str(error).splitlines()) == 1 else 'unclear'}: {error}"
        except Exception as error:
            return f"unclear: {type(error).__name__}: {error}"
    close = found.shape == wanted.shape and torch.allclose(found.float(), wanted.float(), atol=1e-3)
    return "right" if close else "wrong"
