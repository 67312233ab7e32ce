"""Keys hidden in text: what a model can look up beyond its window. Greedy, no chat template.

Shapes: T tokens.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_models._inputs import input_device
from liger_models.generation import continued, without_settings
from liger_models.text import framing, token_ids
from liger_ops.errors import fail

# Filler starts at a multiple of so many tokens, one of the first hundred.
_STEP, _STARTS = 512, 100
_NAMES = ("apple", "river", "stone", "cloud", "tiger", "piano", "candle", "garden")


class Prompt(NamedTuple):
    """Token ids of a text with keys in it and of the question, and the key that answers it."""

    ids: list[int]
    key: str


def _key_text(name: str, key: str) -> str:
    return f"\n\nThe pass key{name} is {key}. Remember it: {key} is the pass key{name}.\n\n"


def _question(name: str) -> str:
    return f"\n\nWhat is the pass key{name}? The pass key{name} is"


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, filler: torch.Tensor, length: int, seed: int, depth: float, keys: int = 1
) -> Prompt:
    """`length` tokens of filler [tokens] from a place that seed draws, with keys in it, and the question for one.

    One key stands at depth (0 to 1) and has no name; several have names and stand evenly, and the one nearest to depth
    is asked for. The tokenizer begins the prompt as it begins a text.
    """
    if length < 1:
        fail("length", "at least one token of filler", length)
    if not 1 <= keys <= len(_NAMES):
        fail("keys", f"1 to {len(_NAMES)}", keys)
    draw = random.Random(seed)
    values = [str(draw.randint(10_000, 99_999)) for _ in range(keys)]
    rows = len(filler) // _STEP
    start = _STEP * draw.randint(0, max(min(_STARTS, rows - 1 - length // _STEP), 0))
    text = filler[start : start + length].tolist()
    if len(text) < length:
        fail("text", f"at least {length} tokens of filler", len(text))
    names = [""] if keys == 1 else [f" of the {name}" for name in draw.sample(_NAMES, keys)]
    depths = [depth] if keys == 1 else [(i + 0.5) / keys for i in range(keys)]
    asked = min(range(keys), key=lambda i: abs(depths[i] - depth))

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    ids, before = list(framing(tokenizer)[0]), 0
    for name, value, place in zip(names, values, depths, strict=True):
        cut = int(length * place)
        ids += text[before:cut] + encode(_key_text(name, value))
        before = cut
    return Prompt(ids + text[before:] + encode(_question(names[asked])), values[asked])


@torch.no_grad()
def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    *,
    depths: int = 8,
    keys: int = 1,
) -> float:
    """Share of five-digit keys, hidden at (i + 1/2) / depths of `length` tokens of text, that greedy decoding finds.

    keys > 1 hides as many under names of their own and asks for one. ValueError if the text is too short, or
    for no depth or too many keys.
    """
    if depths < 1:
        fail("depths", "at least 1", depths)
    filler, found = torch.tensor(token_ids(tokenizer, text)), 0
    prompts = [make_prompt(tokenizer, filler, length, i, (i + 0.5) / depths, keys) for i in range(depths)]
    training, device = model.training, input_device(model)
    model.eval()
    # The model's own settings may sample or penalise repetition.
    with without_settings(model):
        for prompt in tqdm(prompts, desc=f"Keys in {length} tokens", leave=False):
            ids = torch.tensor([prompt.ids], device=device)
            new = len(tokenizer(f" {prompt.key}", add_special_tokens=False)["input_ids"])
            plain = GenerationConfig(do_sample=False, max_new_tokens=new + 1, pad_token_id=0)
            out = continued(model, ids, generation_config=plain)
            found += prompt.key in tokenizer.decode(out[0, ids.shape[1] :])
    model.train(training)
    return found / depths
