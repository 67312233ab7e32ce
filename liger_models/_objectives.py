"""What a model learns from: the text, the teacher's predictions, and what the teacher's layers put out.

Shapes: B batch, T time, V vocabulary, N positions with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from liger_layers import load_balancing_loss
from liger_layers.calls import as_it_is
from liger_models._decoder import Decoder
from liger_models.data import IGNORED, Rows
from liger_models.families import KNOWN, PREFIX
from liger_models.generation import base_of
from liger_models.modeling import LigerMixin
from liger_models.teacher import as_original, check_original, linearized_layers
from liger_models.variants import seen_exactly
from liger_ops.errors import fail

# Positions whose distributions over the vocabulary are in float32 at once; on a CPU as many as its caches hold.
_AT_ONCE = {"cpu": 16, "cuda": 256}
# Of what a layer puts out, the share that its variance is taken to be at least.
_LEAST = 1e-6


class _Divergence(torch.autograd.Function):
    """Sum of KL(teacher || student) at positions [N] of logits [B*T,V], chunk by chunk, its gradient formed at once."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        total = student.new_zeros((), dtype=wide)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for rows in where.split(_AT_ONCE.get(student.device.type, _AT_ONCE["cuda"])):
            log_q, log_p = (x[rows].to(wide).log_softmax(-1) for x in (student, teacher))
            p = log_p.exp()
            # What is never said adds nothing, also where its logarithm is minus infinity.
            total += (p * (log_p - log_q)).masked_fill(p == 0, 0).sum()
            if gradient is not None:
                gradient[rows] = (log_q.exp() - p).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None


def divergence(student: torch.Tensor, teacher: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Sum of KL(teacher || student) over the vocabulary, of logits [B,T,V] at the positions that asked [B,T] marks."""
    where = asked.flatten().nonzero().squeeze(-1)
    total = _Divergence.apply(student.flatten(0, 1), teacher.to(student.device).flatten(0, 1), where)
    return cast(torch.Tensor, total)


@contextmanager
def _adapters_on(layer: nn.Module) -> Iterator[None]:
    """A layer with its adapters, though those of its model are off."""
    off = [m for m in layer.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper)) and m.disable_adapters]
    try:
        for module in off:
            module.enable_adapters(True)
        yield
    finally:
        for module in off:
            module.enable_adapters(False)


class _Matches:
    """What linearized layers put out on the hidden states that the teacher's layers read, beside what those put out."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]):
        mask = inputs.get("attention_mask")
        self.mask = None if mask is None or mask.all() else mask.bool()
        self.shares: list[torch.Tensor] = []
        self.router_logits: list[torch.Tensor] = []
        self.layers = linearized_layers(model)

    @contextmanager
    def watching(self, teacher: PreTrainedModel) -> Iterator[None]:
        """Compare whatever the teacher's layers put out in a pass."""
        decoder, hooks = Decoder(base_of(teacher)), []
        for index, layer in self.layers.items():

            def look(module, args, kwargs, out, layer=layer):
                self.add(layer, args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"), out[0])

            hooks.append(decoder.attention(index).register_forward_hook(look, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, layer: Any, x: torch.Tensor, tables: Any, wanted: torch.Tensor) -> None:
        """The share of the variance of `wanted` [B,T,hidden] that a layer misses on x [B,T,hidden]."""
        with torch.enable_grad(), as_it_is(layer), _adapters_on(layer):
            told = dict(liger_mask=self.mask, liger_router_logits=self.router_logits)
            # Not by a call, whose hooks would watch this too.
            given = layer.forward(x.detach(), tables, **told)[0]
            counted = self._inexact(layer, x).unsqueeze(-1)
            wide = torch.promote_types(given.dtype, torch.float32)
            given, wanted = given.to(wide), wanted.to(wide)
            mean = (wanted * counted).sum((0, 1)) / counted.sum().clamp(min=1)
            missed = ((given - wanted).square() * counted).sum()
            spread = ((wanted - mean).square() * counted).sum()
            # One token has no variance to miss, and a layer that always says the same hardly one.
            least = _LEAST * (wanted.square() * counted).sum() + torch.finfo(wide).tiny
            self.shares.append(missed * (counted.sum() > 1) / torch.maximum(spread, least))

    def _inexact(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """[B,T]: tokens that see more than the exact ones, or all where the recurrence is added to the window."""
        shown = torch.ones_like(x[..., 0], dtype=torch.bool) if self.mask is None else self.mask
        return shown & (shown.cumsum(1) > _exact(layer))

    def loss(self) -> torch.Tensor:
        """The mean of the layers' shares."""
        return torch.stack([x.to(self.shares[0].device) for x in self.shares]).mean()


def _exact(layer: Any) -> int:
    """Of the first tokens of a row, how many see exact ones alone; none where the recurrence is added."""
    return seen_exactly(layer) if getattr(layer, "delayed", True) else 0


class Objective:
    """A weighted sum of losses, each a mean over the tokens with a label.

    weights are by name. teacher is the model that predictions and layers are compared with; None is the student itself
    with its adapters off and its attention in full.
    """

    def __init__(self, weights: Mapping[str, float], teacher: PreTrainedModel | None = None):
        self.weights, self.teacher = weights, teacher
        # Of each loss, the sum over batches since somebody asked, and their number.
        self.found: dict[str, list[float]] = {}

    @property
    def plain(self) -> bool:
        """Whether the text alone teaches, as the model's own loss has it."""
        return self.weights == {"next": 1.0}

    def check(self, student: PreTrainedModel) -> None:
        """ValueError unless the student has what is compared and a teacher that knows better."""
        teacher = self.teacher
        if teacher is None:
            if {"kl", "match"} & set(self.weights):
                check_original(student, "teacher")
        elif not isinstance(teacher, PreTrainedModel) or teacher is student:
            given = "the model itself" if teacher is student else type(teacher).__name__
            fail("teacher", "another causal LM of transformers", given)
        elif not {"kl", "match"} & set(self.weights):
            fail("teacher", "an objective with kl or match in it", f"{'+'.join(self.weights)} alone")
        elif teacher.config.vocab_size != student.config.vocab_size:
            fail("teacher", f"a vocabulary of {student.config.vocab_size}", teacher.config.vocab_size)
        nothing = not linearized_layers(student)
        if nothing and "match" in self.weights:
            fail("objective", "linearized layers to match", f"none in a {type(student).__name__}")
        if nothing and teacher is None and "kl" in self.weights:
            fail("teacher", "another model, where no layer was linearized", "the model itself")
        if teacher is not None and "match" in self.weights:
            _check_layers(teacher, student)

    def check_rows(self, student: PreTrainedModel, rows: Rows) -> None:
        """ValueError if all that is asked for is what layers estimate, and no row is long enough for that."""
        if set(self.weights) != {"match"}:
            return
        exact = min(_exact(layer) for layer in linearized_layers(student).values())
        if (longest := max(map(len, rows.ids))) <= exact:
            fail("length", f"rows of more than {exact} tokens, beyond the exact ones, to match", longest)

    def place(self, device: torch.device) -> None:
        """Put a teacher of its own where the student learns, unless it is spread over devices already."""
        if self.teacher is not None and not getattr(self.teacher, "hf_device_map", None):
            cast(nn.Module, self.teacher).to(device)

    def __call__(
        self, model: nn.Module, own: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss [] on a batch, and how many tokens have a label in it.

        model is what is called, own the model in it, without what trains it on several devices.
        """
        inputs, labels = {k: v for k, v in inputs.items() if k != "labels"}, inputs["labels"]
        asked = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        count, losses = asked.sum().clamp(min=1), {}
        wanted = None
        if {"kl", "match"} & set(self.weights):
            matches = _Matches(own, inputs) if "match" in self.weights else None
            wanted = self._ask(model, own, inputs, matches)
            if matches is not None:
                losses["match"] = matches.loss()
                if matches.router_logits and not {"next", "kl"} & set(self.weights):
                    losses["routers"] = _balance(base_of(own), matches.router_logits, matches.mask)
        if {"next", "kl"} & set(self.weights):
            logits, routers = _learn(model, base_of(own), inputs, labels)
            if routers is not None:
                losses["routers"] = routers
            if "next" in self.weights:
                there = logits[:, :-1].flatten(0, 1)
                there = there.to(torch.promote_types(there.dtype, torch.float32))
                told = labels[:, 1:].flatten().to(there.device)
                losses["next"] = F.cross_entropy(there, told, ignore_index=IGNORED, reduction="sum") / count
            if "kl" in self.weights and wanted is not None:
                losses["kl"] = divergence(logits, wanted, asked) / count
        # The routers' loss comes with a weight of its own.
        total = torch.stack([self.weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        for name, loss in losses.items():
            sums = self.found.setdefault(name, [0.0, 0])
            sums[0], sums[1] = sums[0] + loss.detach().item(), sums[1] + 1
        return total, count

    def _ask(self, model: nn.Module, own: PreTrainedModel, inputs: Mapping[str, Any], matches: _Matches | None):
        """The teacher's logits [B,T,V]; its layers are compared on the way, if so asked."""
        teacher = own if self.teacher is None else self.teacher
        call: Callable[..., Any] = model
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.teacher is None:
                stack.enter_context(as_original(own))
            else:
                call = self.teacher
                self.teacher.eval()
            if matches is not None:
                stack.enter_context(matches.watching(teacher))
            # Where nothing is routed, nothing is said of it.
            told = dict(output_router_logits=False) if isinstance(base_of(teacher), LigerMixin) else {}
            return call(**inputs, **told, use_cache=False).logits

    def means(self) -> dict[str, float]:
        """The mean of each loss since this was asked the last time, where there are several."""
        found, self.found = self.found, {}
        return {f"loss_{name}": total / number for name, (total, number) in found.items()} if len(found) > 1 else {}


def _check_layers(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    if teacher.config.model_type.removeprefix(PREFIX) not in KNOWN:
        fail("teacher", "a model of a known family, to match its layers", type(teacher).__name__)
    for name in ("num_hidden_layers", "hidden_size"):
        wanted, given = (getattr(x.config, name) for x in (student, teacher))
        if wanted != given:
            fail("teacher", f"{name} {wanted}, to match its layers", given)


def _learn(
    model: nn.Module, base: PreTrainedModel, inputs: Mapping[str, Any], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The student's logits [B,T,V], and the loss of its routers under its weight, where they tell of one."""
    if not getattr(base.config, "output_router_logits", False):
        return model(**inputs).logits, None
    # The model weighs the loss of routers; that of the text is nothing where nothing is asked.
    out = model(**inputs, labels=torch.full_like(labels, IGNORED), num_items_in_batch=1)
    return out.logits, out.loss


def _balance(base: PreTrainedModel, router_logits: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    liger = base.config.liger
    return liger["router_aux_loss_coef"] * load_balancing_loss(router_logits, liger["top_k"], mask)
