"""Rows that ask at their end for what was hidden in them before, made out of the text of other rows.

Their draws have seeds of their own, apart from those of `retrieval` and `select_layers`, and other names.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from liger_models.data import IGNORED, Rows
from liger_models.text import framing
from liger_ops.errors import fail

_THINGS = ("anchor", "basket", "bridge", "button", "camera", "carpet", "copper", "desert", "engine", "feather")
_THINGS += ("forest", "hammer", "island", "jacket", "ladder", "lantern", "mirror", "needle", "orange", "pepper")
_PEOPLE = ("Alma", "Boris", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Karin", "Mina")
_PLACES = ("Athens", "Bergen", "Cairo", "Dublin", "Havana", "Lima", "Lisbon", "Nairobi", "Oslo", "Porto", "Riga")
# Fewer tokens of text than this around what is hidden hide nothing.
_LEAST = 32
# Draws until one fits into a row.
_TRIES = 50


class Hidden(NamedTuple):
    """What is said in a text, here and there, and questions about it at the end with their answers."""

    facts: list[str]
    asked: list[tuple[str, str]]


def key_text(name: str, key: str) -> str:
    return f"\n\nThe pass key{name} is {key}. Remember it: {key} is the pass key{name}.\n\n"


def key_question(name: str) -> str:
    return f"\n\nWhat is the pass key{name}? The pass key{name} is"


def _number(draw: random.Random) -> str:
    """A value that nobody guesses: five digits mostly, or letters among digits."""
    if draw.random() < 0.7:
        return str(draw.randint(10_000, 99_999))
    return "".join(draw.choice("0123456789abcdef") for _ in range(draw.randint(4, 8)))


def _some(draw: random.Random, asked: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return draw.sample(asked, draw.randint(1, min(4, len(asked))))


def _pass_key(draw: random.Random) -> Hidden:
    key = _number(draw)
    return Hidden([key_text("", key)], [(key_question(""), f" {key}")])


def _named_keys(draw: random.Random) -> Hidden:
    names = [f" of the {thing}" for thing in draw.sample(_THINGS, draw.randint(2, 6))]
    keys = [(name, _number(draw)) for name in names]
    return Hidden(
        [key_text(*key) for key in keys], _some(draw, [(key_question(name), f" {key}") for name, key in keys])
    )


def _entries(draw: random.Random) -> Hidden:
    """Lines of a table, in one of several notations."""
    before, between, behind = draw.choice([("", ": ", ""), ('{"', '": "', '"}'), ("", " = ", ""), ("- ", " -> ", "")])
    names = draw.sample(_THINGS, draw.randint(3, 8)) if draw.random() < 0.5 else []
    names = names or [_number(draw) for _ in range(draw.randint(3, 8))]
    rows = [(name, _number(draw)) for name in dict.fromkeys(names)]
    lines = [f"\n{before}{name}{between}{value}{behind}\n" for name, value in rows]
    # The blank before a value is a part of its first token.
    head, blank = (between[:-1], " ") if between.endswith(" ") else (between, "")
    return Hidden(lines, _some(draw, [(f"\n{before}{name}{head}", f"{blank}{value}") for name, value in rows]))


def _sentences(draw: random.Random) -> Hidden:
    """Things that are said of people."""
    said, question = draw.choice(
        [
            ("{} lives in {}.", "\n\nWhere does {0} live? {0} lives in"),
            ("{} was born in {}.", "\n\nQuestion: Where was {0} born?\nAnswer:"),
            ("The last letter from {} came from {}.", "\n\nThe last letter from {0} came from"),
        ]
    )
    people = draw.sample(_PEOPLE, draw.randint(2, 5))
    told = list(zip(people, draw.sample(_PLACES, len(people)), strict=True))
    facts = [f" {said.format(*pair)} " for pair in told]
    return Hidden(facts, _some(draw, [(question.format(person), f" {place}") for person, place in told]))


KINDS: dict[str, Callable[[random.Random], Hidden] | None] = {
    "pass-key": _pass_key,
    "named keys": _named_keys,
    "entries": _entries,
    "sentences": _sentences,
    # What stood in the text itself, begun once more.
    "passage": None,
}


def with_hidden(tokenizer: PreTrainedTokenizerBase, rows: Rows, share: float, length: int, seed: int) -> Rows:
    """Rows of which a share is replaced by ones of `length` tokens, with something hidden in text of the others.

    The text and the answers have labels; what is hidden and the questions are only read. ValueError for too little
    text, or a length that nothing fits into.
    """
    if not share:
        return rows
    before = framing(tokenizer)[0]
    text = [x for row in rows.ids for x in row.tolist()[len(before) if row[: len(before)].tolist() == before else 0 :]]
    ids, labels = list(rows.ids), list(rows.labels)
    chosen = random.Random(f"rows {seed}").sample(range(len(rows)), math.ceil(share * len(rows)))
    for i in sorted(chosen):
        ids[i], labels[i] = _row(tokenizer, before, text, length, f"hidden {seed} {i}")
    return Rows(tuple(ids), tuple(labels))


def _row(
    tokenizer: PreTrainedTokenizerBase, before: list[int], text: list[int], length: int, seed: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [length]."""
    draw = random.Random(seed)

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    for _ in range(_TRIES):
        make = KINDS[draw.choice(list(KINDS))]
        if make is None:
            found = _passage(draw, before, text, length)
        else:
            hidden = make(draw)
            facts = [encode(fact) for fact in hidden.facts]
            end = [(part, i % 2 == 1) for pair in hidden.asked for i, part in enumerate(map(encode, pair))]
            room = length - len(before) - sum(map(len, facts)) - sum(len(part) for part, _ in end)
            found = None if room < _LEAST else _laid_out(draw, before, _piece(draw, text, room), facts, end)
        if found is not None:
            tokens, asked = (torch.tensor([x[i] for x in found]) for i in (0, 1))
            return tokens, torch.where(asked, tokens, IGNORED)
    fail("retrieval", "longer rows, into which a question fits", f"rows of {length} tokens")


def _piece(draw: random.Random, text: list[int], room: int) -> list[int]:
    if len(text) < room:
        fail("text", f"at least {room} tokens to hide something in", len(text))
    start = draw.randint(0, len(text) - room)
    return text[start : start + room]


def _laid_out(
    draw: random.Random, before: list[int], filler: list[int], facts: list[list[int]], end: list[tuple[list[int], bool]]
) -> list[tuple[int, bool]]:
    """Tokens, and whether each has a label: facts at places of their own in the text, then the end."""
    found, last = [(x, True) for x in before], 0
    places = sorted(draw.randint(0, len(filler)) for _ in facts)
    for place, fact in zip(places, facts, strict=True):
        found += [(x, True) for x in filler[last:place]] + [(x, False) for x in fact]
        last = place
    found += [(x, True) for x in filler[last:]]
    return found + [(x, asked) for part, asked in end for x in part]


def _passage(draw: random.Random, before: list[int], text: list[int], length: int) -> list[tuple[int, bool]] | None:
    """Text, of which a passage comes again at the end: its first tokens are only read, the others asked for."""
    size = draw.randint(16, 48)
    room = length - len(before) - size
    if room < size + _LEAST:
        return None
    filler = _piece(draw, text, room)
    start = draw.randint(0, room - size)
    again = [(x, i >= size // 3) for i, x in enumerate(filler[start : start + size])]
    return [(x, True) for x in before + filler] + again
