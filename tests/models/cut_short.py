"""Calls that an exception ends somewhere, and what the cache leads to then."""

import contextlib
import itertools

import torch

from liger_models._inputs import CACHE
from liger_models.variants import window_alone
from tests.models.misuse import HELD, IDS, fill, go_on, make, scratch

ERRORS = (RuntimeError("mine"), KeyboardInterrupt(), torch.OutOfMemoryError("mine"), ValueError("mine"))
PLACES = ("model.embed_tokens", "model.layers.0.self_attn", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp")
PLACES += ("model.layers.2.self_attn.mix", "model.layers.2.self_attn", "model.layers.2.mlp", "model.norm", "lm_head")


def cut_short():
    """Calls that an exception ends, and the same tokens again."""

    def again(model, place, error, more, call=None):
        cache = fill(model)

        def fail(module, args):
            raise error

        hook = model.get_submodule(place).register_forward_pre_hook(fail)
        try:
            (call or model)(IDS[:1, HELD : HELD + more], **{CACHE: cache})
        except type(error):
            pass
        finally:
            hook.remove()
        return go_on(model, cache, more)

    for (error, place), more in zip(itertools.product(ERRORS, PLACES), itertools.cycle((1, 3))):
        name = f"{type(error).__name__} in {place}, {more} again"
        yield name, lambda place=place, error=error, more=more: again(make(), place, error, more)
    for keep, place in itertools.product(((0,), (2,)), (*PLACES[:2], *PLACES[5:])):
        if place != "model.layers.2.self_attn.mix":
            yield f"{keep} kept, in {place}", lambda keep=keep, place=place: again(make(keep=keep), place, ERRORS[0], 3)
    for place in ("model.layers.0.mlp", "model.layers.1.mixer", "model.norm", "lm_head"):
        yield f"from scratch, in {place}", lambda place=place: again(scratch(), place, ERRORS[0], 3)
    model = make()
    yield "the decoder alone", lambda: again(model, "model.norm", ERRORS[0], 1, model.model)
    yield "right: a call that was refused", lambda: _refused()


def _refused():
    model = make()
    cache = fill(model)
    with contextlib.suppress(ValueError):
        model(IDS[:1, HELD : HELD + 3], attention_mask=torch.ones(1, 9), **{CACHE: cache})
    with window_alone(model), contextlib.suppress(ValueError):
        model(IDS[:1, HELD : HELD + 3], **{CACHE: cache})
    return go_on(model, cache)
