"""How to fine-tune: hyperparameters, objectives, and what is asked of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from liger_ops.errors import check_flag, check_positive, fail

# What a model may learn from, as `Recipe.objective` says.
OBJECTIVES = ("next", "kl", "match")


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. steps None means `epochs` passes over the text.

    batch: rows in a forward pass; accumulate: how many of them make a step.
    features: train, beside the adapters on `targets`, the feature maps and the mix (where learn_mix allows), as a whole
    and in float32. Routers of memories and the mix behind them are always trained so, and their load is balanced.
    freeze_kept: no adapters on queries and keys of layers that stayed full attention.
    bf16: products of matrices in bfloat16 while it learns, the student's and the teacher's, on weights that stay what
    they are; faster where the processor multiplies such numbers.

    objective: weights of what is learned from, by name; a string such as "kl" or "kl=1,next=0.2" says the same, and a
    name alone weighs 1. With T the tokens that have a label, all are means over them:
    "next", the loss -log p(token) on the text; "kl", the divergence KL(teacher || student) over the whole vocabulary,
    end to end (Hinton et al., arXiv 1503.02531); "match", for each linearized layer on what the teacher's layer reads,
    |student - teacher|^2 / |teacher - its mean|^2 of what the two attentions put out, over tokens beyond window,
    sinks and recall, whose attention is not exact (attention transfer, LoLCATs, arXiv 2410.10254).

    window_dropout: share of batches, from 0 to 1, that are run with a shorter window, drawn from 1 to one less than the
    window, so that the recurrence has to carry what the window no longer shows (arXiv 2510.05901).
    recall_dropout: share of batches, from 0 to 1, in which layers recall fewer tokens, drawn from 0 to one less than
    they do otherwise, for the same end.
    retrieval: share of rows, from 0 to 1, that are replaced by ones that ask for what was hidden in the text before.
    """

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 1e-3
    length: int = 512
    batch: int = 2
    accumulate: int = 1
    epochs: float = 1.0
    steps: int | None = None
    warmup: int = 6
    features: bool = True
    gradient_checkpointing: bool = False
    objective: str | Mapping[str, float] = "next"
    window_dropout: float = 0.0
    recall_dropout: float = 0.0
    retrieval: float = 0.0
    freeze_kept: bool = False
    bf16: bool = False

    def __post_init__(self):
        for name, low in (("rank", 1), ("length", 2), ("batch", 1), ("accumulate", 1), ("steps", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not (value is None and name == "steps"):
                check_positive(name, value, low)
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                fail(name, "a number > 0", repr(getattr(self, name)))
        for name in ("window_dropout", "recall_dropout", "retrieval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                fail(name, "a share from 0 to 1", repr(value))
        check_flag("freeze_kept", self.freeze_kept)
        check_flag("bf16", self.bf16)
        object.__setattr__(self, "objective", read_objective(self.objective))


def read_objective(objective: object) -> dict[str, float]:
    """Weights above 0 by name, in the order of OBJECTIVES; ValueError lists the names.

    Takes such a mapping, or names joined by + or commas, each of them alone or with = and its weight.
    """
    wanted = f"a mix of {', '.join(OBJECTIVES)}, each alone or with =weight"
    if isinstance(objective, str):
        parts = [part.partition("=") for part in objective.replace("+", ",").split(",")]
        given = [(name.strip(), weight.strip() if equals else 1.0) for name, equals, weight in parts]
    elif isinstance(objective, Mapping):
        given = list(objective.items())
    else:
        fail("objective", wanted, repr(objective))
    weights: dict[str, float] = {}
    for name, weight in given:
        if name not in OBJECTIVES:
            fail("objective", wanted, repr(name))
        if name in weights:
            fail("objective", "each name once", f"{name!r} twice")
        try:
            number = math.nan if isinstance(weight, bool) else float(weight)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            fail("objective", f"a weight >= 0 of {name}", repr(weight))
        weights[name] = number
    weights = {name: weights[name] for name in OBJECTIVES if weights.get(name)}
    if not weights:
        fail("objective", wanted, "no weight above 0")
    return weights


RECIPES = {
    "default": Recipe(),
    # The published recipe, arXiv 2503.01496, section 4.1.
    "paper": Recipe(
        rank=8,
        alpha=8,
        targets=("q_proj", "k_proj", "v_proj"),
        learning_rate=1e-3,
        length=1024,
        batch=8,
        epochs=2.0,
        warmup=0,
        features=False,
    ),
}


def recipe_of(recipe: str | Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe of a name with some of its fields changed; None changes nothing."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            fail("recipe", f"one of {', '.join(RECIPES)}", repr(recipe))
        recipe = RECIPES[recipe]
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{unknown[0]}: unknown; expected one of {', '.join(sorted(known))}")
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})
