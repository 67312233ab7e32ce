"""A conversion, planned once: measure, build, fit and swap, layer by layer, for whoever converts or loads a model.

Shapes: H key/value heads, D head width.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_layers import FEATURE_MAPS, RecallScore, SoftmaxKernel
from liger_layers.choices import Choices
from liger_layers.patterns import split
from liger_models._calibration import Moments, check_calibration, draw_text, measure, slow_channels
from liger_models._decoder import Decoder, Rotation
from liger_models._inputs import argument_names, check_ids
from liger_models._linearized import LinearizedAttention, LinearizedWindow, after_decoder, before_decoder
from liger_models._mixing import fit_mixes
from liger_models._need import asking_rows, fit_scores
from liger_models._snapshot import looked_at
from liger_models.configuration import LigerConfig
from liger_models.families import longest_text, own_windows
from liger_models.text import find_tokenizer
from liger_ops.errors import fail

_log = logging.getLogger(__name__)
# Rows at most to weigh recurrences on, of those that ask for something and of the others.
_WEIGHED = 8


@dataclass(frozen=True)
class LayerPlan:
    """What takes the place of the attention in one layer, its options settled, and whether it has features to fit, and
    weights of the recurrence."""

    index: int
    name: str
    kind: type[LinearizedAttention] | type[LinearizedWindow]
    options: Mapping[str, Any]
    fitted: bool
    mixed: bool = False

    @property
    def recalls(self) -> bool:
        """Whether it has a score to fit."""
        return bool(self.options.get("recall"))


def plan_layers(hf: PreTrainedConfig, liger: LigerConfig) -> tuple[LayerPlan, ...]:
    """A plan for each layer that is not to stay, as a resolved config says; ValueError if a gate's choices do not go
    together."""
    windows, names = own_windows(hf), [str(name) for name in liger.pattern]
    told = {name: _recurrent(liger, name) for name in dict.fromkeys(names) if split(name)[0] in ("liger", "memories")}
    plans = []
    for index, name in enumerate(names):
        if name == "own":
            plans.append(LayerPlan(index, name, LinearizedWindow, dict(window=windows[index], sinks=0), False))
        elif name == "window":
            width = min(liger.window, windows[index] or liger.window)
            plans.append(LayerPlan(index, name, LinearizedWindow, dict(window=width, sinks=liger.sinks), False))
        elif name != "full":
            plans.append(LayerPlan(index, name, LinearizedAttention, *told[name]))
    return tuple(plans)


def _recurrent(liger: LigerConfig, name: str) -> tuple[dict[str, Any], bool, bool]:
    """Options of every layer of this name, and whether these layers have features and weights to fit."""
    options = liger.options(name)
    chosen = Choices(**{field: options.pop(field) for field in Choices._fields})
    fitted = hasattr(FEATURE_MAPS[chosen.feature_map], "calibrate")
    return options | dict(gate=chosen), fitted, liger.fit_mix and chosen.mixing == "joint"


def build(plan: LayerPlan, old: nn.Module, hf: PreTrainedConfig) -> LinearizedAttention | LinearizedWindow:
    """What the plan says, on the modules of a pretrained attention, which stays as it is."""
    return plan.kind(old, hf, **plan.options)


def fit(layer: LinearizedAttention, moments: Moments, rotation: Rotation) -> None:
    """Fit the features of a layer, which need not sit in a model, to the moments measured where it will."""
    frequencies, factor = rotation if layer.traits.rotary else Rotation(torch.zeros(0), 1.0)
    # The features must see that factor too.
    cast(SoftmaxKernel, layer.feature_map).calibrate(
        moments.query_mean,
        moments.key_mean,
        moments.query_covariance,
        moments.key_covariance,
        slow_channels(frequencies, layer.head_dim),
        layer.traits.scale * factor**2,
    )


def converted(
    model: PreTrainedModel,
    plans: Iterable[LayerPlan],
    calibration: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[tuple[int, LinearizedAttention | LinearizedWindow]]:
    """Index and new attention, built and fitted, of one planned layer after the other. The model is as before.

    Weights that do not lie in memory are there until the next layer is asked for. ValueError for a calibration that is
    not token ids of the model.
    """
    plans = tuple(plans)
    measured = _measured(model, plans, calibration, tokenizer)
    for plan in plans:
        with _at_hand(Decoder(model).attention(plan.index)):
            yield plan.index, _made(model, plan, measured)


class Measured(NamedTuple):
    """By layer, what features are fitted to, and scores and weights of the recurrence as they are to be."""

    moments: Mapping[int, Moments]
    scores: Mapping[int, RecallScore]
    mixes: Mapping[int, torch.Tensor]


def _made(model: PreTrainedModel, plan: LayerPlan, measured: Measured) -> LinearizedAttention | LinearizedWindow:
    """The new attention of a layer, whose old one is at hand, built and fitted as far as it was measured."""
    decoder = Decoder(model)
    new = build(plan, decoder.attention(plan.index), model.config)
    if isinstance(new, LinearizedAttention):
        if plan.fitted:
            fit(new, measured.moments[plan.index], decoder.rotation(plan.index))
        if new.score is not None:
            new.score.load_state_dict(measured.scores[plan.index].state_dict())
        if plan.index in measured.mixes:
            with torch.no_grad():
                new.mix.weight.copy_(measured.mixes[plan.index])
    _check_finite(new, decoder.attention(plan.index), plan.index)
    return new


def _check_finite(new: nn.Module, old: nn.Module, index: int) -> None:
    """ValueError where what a layer has beside the old one is no number: what it was fitted to has overflowed."""
    known = dict(old.named_parameters()).keys()
    for name, x in new.named_parameters():
        if name not in known and not x.isfinite().all():
            given = f"NaN or infinity in {name}, as from activations that overflow {x.dtype}"
            fail("model", f"layer {index} to be fitted to finite numbers", given)


def _measured(
    model: PreTrainedModel,
    plans: Sequence[LayerPlan],
    calibration: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Measured:
    """By layer, what is fitted to a calibration or else to text that the model draws."""
    if calibration is not None:
        check_calibration(calibration, model.config.vocab_size)
    fitted = [plan.index for plan in plans if plan.fitted]
    recalling = {plan.index: plan.options["window"] for plan in plans if plan.recalls}
    mixed = [plan for plan in plans if plan.mixed]
    if not fitted and not recalling and not mixed:
        return Measured({}, {}, {})
    with looked_at(model):
        asked = recalling or mixed
        # Scores have more to be fitted.
        ids = draw_text(model, batch=16 if asked else 8) if calibration is None else calibration
        measured = Measured(measure(model, ids, fitted) if fitted else {}, {}, {})
        if not asked:
            return measured
        tokenizer = tokenizer or find_tokenizer(model)
        if tokenizer is None:
            _log.warning("calibration: no tokenizer given or found; what is fitted to text said again finds fewer keys")
        window = max(plan.options["window"] for plan in plans if plan.recalls or plan.mixed)
        rows = asking_rows(ids, tokenizer, window, longest_text(model.config))
        check_ids(model, rows)
        if recalling:
            measured = measured._replace(scores=fit_scores(model, rows, recalling))
        if mixed:
            layers = {}
            for plan in mixed:
                with _at_hand(Decoder(model).attention(plan.index)):
                    layers[plan.index] = cast(LinearizedAttention, _made(model, plan, measured))
            # As many that ask for nothing, as far as there are any.
            rows = rows[:_WEIGHED] + rows[_WEIGHED:][-_WEIGHED:]
            measured = measured._replace(mixes=fit_mixes(model, rows, layers))
        return measured


@contextmanager
def _at_hand(attention: nn.Module):
    """The weights of an attention in memory for a while, wherever they lie."""
    with ExitStack() as stack:
        for module in attention.modules():
            stack.enter_context(align_module_device(module))
        yield


def swap_attention(model: PreTrainedModel, attention: Mapping[int, nn.Module]) -> None:
    """Put each attention in its layer, in place."""
    decoder = Decoder(model)
    for index, module in attention.items():
        decoder.put(index, module)
    hook = functools.partial(before_decoder, argument_names(decoder.module))
    decoder.module.register_forward_pre_hook(hook, with_kwargs=True)
    decoder.module.register_forward_hook(after_decoder, with_kwargs=True)
