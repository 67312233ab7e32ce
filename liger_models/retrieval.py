"""Keys hidden in text: what a model can look up beyond its window. Greedy, no chat template.

Shapes: T tokens.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_models._hidden import key_question, key_text
from liger_models._inputs import input_device
from liger_models.generation import continued, evaluating, without_settings
from liger_models.text import framing, token_ids
from liger_ops.errors import fail

# Filler starts at a multiple of so many tokens, one of the first hundred.
_STEP, _STARTS = 512, 100
_NAMES = ("apple", "river", "stone", "cloud", "tiger", "piano", "candle", "garden")


class Prompt(NamedTuple):
    """Token ids of a text with keys in it and of the question, and the keys that answer it."""

    ids: list[int]
    answers: tuple[str, ...]

    @property
    def key(self) -> str:
        """The only answer, or the first."""
        return self.answers[0]


def check_tokenizer(tokenizer: object) -> None:
    """ValueError for what turns no text into tokens."""
    if not callable(tokenizer):
        fail("tokenizer", "the model's tokenizer", "None" if tokenizer is None else type(tokenizer).__name__)


def _one_of_several(name: str, key: str) -> str:
    return f"\n\nOne pass key{name} is {key}. Remember it: {key} is one pass key{name}.\n\n"


def _question_for_all(name: str) -> str:
    return f"\n\nWhat are all the pass keys{name}? The pass keys{name} are"


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    filler: torch.Tensor,
    length: int,
    seed: int,
    depth: float,
    keys: int = 1,
    values: int = 1,
) -> Prompt:
    """`length` tokens of filler [tokens] from a place that seed draws, with keys in it, and the question for one.

    One key stands at depth (0 to 1) and has no name; several have names and stand evenly, and the one nearest to depth
    is asked for. Several values stand evenly too, all under one name, and all are asked for, whatever the depth. The
    tokenizer begins the prompt as it begins a text.
    """
    if length < 1:
        fail("length", "at least one token of filler", length)
    for name, number in (("keys", keys), ("values", values)):
        if not 1 <= number <= len(_NAMES):
            fail(name, f"1 to {len(_NAMES)}", number)
    if keys > 1 and values > 1:
        fail("values", "1 where there are several keys", values)
    draw, several = random.Random(seed), max(keys, values)
    hidden = [str(draw.randint(10_000, 99_999)) for _ in range(several)]
    rows = len(filler) // _STEP
    start = _STEP * draw.randint(0, max(min(_STARTS, rows - 1 - length // _STEP), 0))
    text = filler[start : start + length].tolist()
    if len(text) < length:
        fail("text", f"at least {length} tokens of filler", len(text))
    names = [""] if several == 1 else [f" of the {name}" for name in draw.sample(_NAMES, keys)]
    depths = [depth] if several == 1 else [(i + 0.5) / several for i in range(several)]
    asked = min(range(keys), key=lambda i: abs(depths[i] - depth))

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    if values > 1:
        words, question, answers = _one_of_several, _question_for_all(names[0]), tuple(hidden)
    else:
        words, question, answers = key_text, key_question(names[asked]), (hidden[asked],)
    ids, before = list(framing(tokenizer)[0]), 0
    for i, (value, place) in enumerate(zip(hidden, depths, strict=True)):
        cut = int(length * place)
        ids += text[before:cut] + encode(words(names[i % keys], value))
        before = cut
    return Prompt(ids + text[before:] + encode(question), answers)


@torch.no_grad()
def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    *,
    depths: int = 8,
    keys: int = 1,
    values: int = 1,
) -> float:
    """Share of five-digit keys, hidden at (i + 1/2) / depths of `length` tokens of text, that greedy decoding finds.

    keys > 1 hides as many under names of their own and asks for one; values > 1 hides as many under one name, in
    `depths` texts, and counts a text whose values are all found. ValueError if the text is too short, or for no depth,
    too many keys or values, or both.
    """
    check_tokenizer(tokenizer)
    if depths < 1:
        fail("depths", "at least 1", depths)
    filler, found = torch.tensor(token_ids(tokenizer, text)), 0
    prompts = [make_prompt(tokenizer, filler, length, i, (i + 0.5) / depths, keys, values) for i in range(depths)]
    device = input_device(model)
    # The model's own settings may sample or penalise repetition.
    plain = without_settings(model)
    with evaluating(model):
        for prompt in tqdm(prompts, desc=f"Keys in {length} tokens", leave=False):
            ids = torch.tensor([prompt.ids], device=device)
            answer = "".join(f" {key}," for key in prompt.answers)[:-1]
            new = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            # Room for words between several.
            new += 4 * (len(prompt.answers) - 1)
            greedy = GenerationConfig(do_sample=False, max_new_tokens=new + 1, pad_token_id=0)
            out = continued(plain, ids, generation_config=greedy)
            said = tokenizer.decode(out[0, ids.shape[1] :])
            found += all(key in said for key in prompt.answers)
    return found / depths
