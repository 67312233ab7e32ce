"""How many functions a call of one linearized layer runs through, and how often it goes on in another file.

Every call of Python costs a microsecond, which decoding of small models notices, and every change of file a reader.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from liger_models import make_cache
from liger_models._inputs import CACHE
from tests.models.tiny import linearize_tiny, tiny

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(f"{ROOT / package}/" for package in ("liger_ops", "liger_layers", "liger_models"))
# Later versions of Python run them where they stand, without a call.
INLINE = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}


def functions_called(call) -> list[tuple[str, str]]:
    """File and name of every function of the three packages, in the order of their calls."""
    found = []

    def look(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_name not in INLINE and code.co_filename.startswith(PACKAGES):
            found.append((code.co_filename.removeprefix(f"{ROOT}/"), code.co_name))

    # Once before, for what is only done the first time.
    call()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.fixture(scope="module")
def layer():
    """A layer of a linearized Llama as `linearize` makes it, and arguments for T tokens at its place in the model."""
    model = linearize_tiny(tiny("llama"))

    def arguments(T, start=0):
        x = model.model.embed_tokens(torch.arange(T).unsqueeze(0) % 90 + 3)
        return x, model.model.rotary_emb(x, torch.arange(start, start + T).unsqueeze(0))

    return model, model.model.layers[0].self_attn, arguments


def check(found, calls, moves):
    gone = sum(one[0] != other[0] for one, other in itertools.pairwise(found))
    listed = "\n".join(" ".join(pair) for pair in found)
    assert len(found) <= calls and gone <= moves, f"{len(found)} calls, {gone} moves between files:\n{listed}"


@torch.no_grad()
def test_a_prompt(layer):
    _, attention, arguments = layer
    x, tables = arguments(200)
    check(functions_called(lambda: attention(x, tables)), calls=75, moves=26)


@torch.no_grad()
def test_one_token(layer):
    model, attention, arguments = layer
    cache = make_cache(model.config)
    x, tables = arguments(200)
    attention(x, tables, **{CACHE: cache})
    x, tables = arguments(1, 200)
    check(functions_called(lambda: attention(x, tables, **{CACHE: cache})), calls=50, moves=14)
