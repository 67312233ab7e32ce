"""A linearized model with parts of it switched off for a while: what each of them carries.

For the calls of one thread: those of others see the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from liger_layers import LigerAttention, Mix, calls
from liger_models.generation import base_of
from liger_models.modeling import LigerMixin
from liger_models.teacher import linearized_layers
from liger_ops.errors import check_known, fail


@contextmanager
def without_recurrence(model: nn.Module):
    """Take every layer's mix, and that of its routed memories, for zero for a while: only exact tokens count.

    Caches that were filled before are refused inside, and those filled inside afterwards.
    """
    with calls.with_mix([m for m in model.modules() if isinstance(m, Mix)], 0.0):
        yield


@contextmanager
def without_recall(model: nn.Module):
    """Let every layer keep no exact token beyond its window and sinks for a while: all of them enter the recurrence.

    Caches that were filled before are refused inside, and those filled inside afterwards.
    """
    with with_recall(model, 0):
        yield


@contextmanager
def with_recall(model: nn.Module, recall: int):
    """Let every layer that recalls keep another number of exact tokens for a while, by the same scores.

    Caches that were filled before are refused inside, and those filled inside afterwards. ValueError where no layer
    recalls and a number above 0 is asked for.
    """
    layers = [m for m in model.modules() if isinstance(m, LigerAttention) and m.score is not None]
    if recall and not layers:
        fail("model", "layers that recall", "none")
    with calls.with_recall(layers, recall):
        yield


@contextmanager
def window_alone(model: nn.Module):
    """Only the window and the sinks: neither recall nor the recurrence."""
    with without_recall(model), without_recurrence(model):
        yield


# Name and what is switched off, in the order of reports; the last is the model as it is.
VARIANTS: dict[str, Callable[[nn.Module], AbstractContextManager]] = {
    "window": window_alone,
    "no_recall": without_recall,
    "no_recurrence": without_recurrence,
    "everything": nullcontext,
}
# What no model beside the linearized one is called.
ORIGINAL = "original"


def distinct_variants(model: PreTrainedModel) -> list[str]:
    """The variants of a model that differ from each other: one that coincides with a later or simpler one is left out.

    A model without recurrent layers is itself alone; one without recall has no row of its own for that.
    """
    if _recalling(model):
        return list(VARIANTS)
    return ["window", "everything"] if any(isinstance(m, Mix) for m in model.modules()) else ["everything"]


def chosen_variants(model: PreTrainedModel, names: Sequence[str] | None) -> list[str]:
    """The named variants in the order of the table, or those that differ; ValueError for an unknown name."""
    if names is None:
        return distinct_variants(model)
    for name in names:
        check_known("variants", name, [ORIGINAL, *VARIANTS])
    return [name for name in VARIANTS if name in names]


def exact_tokens(model: PreTrainedModel) -> int:
    """The most tokens that a linearized layer sees exactly, not one with its own window; 0 where there is none."""
    linearized = isinstance(base_of(model), LigerMixin)
    layers = linearized_layers(model).values() if linearized else model.modules()
    return max((seen_exactly(x) for x in layers if hasattr(getattr(x, "window", None), "sinks")), default=0)


def seen_exactly(layer: Any) -> int:
    """Tokens in window, sinks and recall of a layer with a window."""
    return layer.window.size + layer.window.sinks + getattr(layer, "recall", 0)


def _recalling(model: nn.Module) -> list[LigerAttention]:
    return [m for m in model.modules() if isinstance(m, LigerAttention) and m.recall]
