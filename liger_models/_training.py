"""The parts of fine-tuning: a model in adapters, the Trainer with our objectives, and what Ctrl-C does."""

from __future__ import annotations

import functools
import math
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from liger_layers import LigerAttention, routing_modules
from liger_layers.calls import with_recall, with_window
from liger_models import checkpoint
from liger_models._decoder import Decoder
from liger_models._objectives import Objective
from liger_models.data import Rows
from liger_models.evaluation import mean_loss
from liger_models.modeling import LigerMixin
from liger_models.recipe import Recipe
from liger_ops.errors import fail

# What a linearized layer has that no pretrained one has, and learns as a whole where it may learn.
_NEW = ("feature_map", "mix")


class Interrupt(TrainerCallback):
    """Ctrl-C finishes the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self):
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def ask(number, frame):
            self.asked = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True


class ExactDropout:
    """Fewer exact tokens for shares of batches, which a seed and a batch's place decide about, and nothing else."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, seed: int):
        self.window_share, self.recall_share, self.seed = recipe.window_dropout, recipe.recall_dropout, seed
        self.layers = [module for module in model.modules() if isinstance(module, LigerAttention)]
        self.recalling = [layer for layer in self.layers if layer.recall]
        self.window = min((layer.window.size for layer in self.layers), default=0)
        self.recall = min((layer.recall for layer in self.recalling), default=0)
        if self.window_share and self.window < 2:
            given = "none in " + type(model).__name__ if not self.layers else f"a window of {self.window}"
            fail("window_dropout", "layers with a recurrence and a window of at least 2", given)
        if self.recall_share and not self.recall:
            fail("recall_dropout", "layers that recall", "none in " + type(model).__name__)

    def sizes(self, step: int, batch: int) -> tuple[int | None, int | None]:
        """The window and the recall of a batch of a step; None leaves either as it is."""
        draw = random.Random(f"{self.seed} {step} {batch}")
        window, shorter = draw.randint(1, max(1, self.window - 1)), draw.random() < self.window_share
        recall, fewer = draw.randint(0, max(0, self.recall - 1)), draw.random() < self.recall_share
        return window if shorter else None, recall if fewer else None

    @contextmanager
    def __call__(self, step: int, batch: int) -> Iterator[None]:
        """A context in which the layers have that window and that recall."""
        window, recall = self.sizes(step, batch)
        with ExitStack() as stack:
            if window is not None:
                stack.enter_context(with_window(self.layers, window))
            if recall is not None:
                stack.enter_context(with_recall(self.recalling, recall))
            yield


class LigerTrainer(Trainer):
    """The Trainer on an Objective, with fewer exact tokens for some batches.

    Evaluates as `perplexity` does: every token with a label counts alike, and routers do not count.
    """

    def __init__(self, *, objective: Objective, dropout: ExactDropout, **options: Any):
        super().__init__(**options)
        self.objective, self.dropout = objective, dropout
        # The last batch: its step, and its place in it.
        self._place = (-1, 0)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        step = self.state.global_step
        self._place = (step, self._place[1] + 1 if self._place[0] == step else 0)
        # Around the backward pass too, where checkpointing computes again.
        with self.dropout(*self._place):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        if self.objective.plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own = cast(PreTrainedModel, self.accelerator.unwrap_model(model))
        # A teacher of its own is not the Trainer's to switch.
        with self.accelerator.autocast():
            loss, count = self.objective(model, own, inputs)
        if num_items_in_batch is not None:
            # As the Trainer wants it: a part of the mean over all that is accumulated, on all devices.
            loss = loss * count.to(loss.device) / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """OSError where the disk does not hold it, of which torch and safetensors make errors of their own."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (RuntimeError, SafetensorError) as error:
            raise OSError(f"checkpoints: could not write one: {str(error).splitlines()[0]}") from error

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Beside the loss, the mean of each of several that it is made of."""
        super().log({**logs, **self.objective.means()} if "loss" in logs else logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        loss = mean_loss(cast(PreTrainedModel, self.model), cast(Rows, eval_dataset or self.eval_dataset))
        figures = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(loss)}
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


def activation_checkpointing(wanted: bool) -> dict[str, Any]:
    """TrainingArguments under the name that the installed transformers uses."""
    if not wanted:
        return {}
    known = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def adapted(model: PreTrainedModel, recipe: Recipe) -> tuple[PeftModel, bool]:
    """The model with adapters, and whether it has routers to train.

    What learns as a whole is in float32, whatever the model is in: steps may be smaller than its numbers can tell.
    """
    named: list[tuple[str, nn.Module]] = [("." + name, module) for name, module in model.named_modules()]
    parts = {name.rsplit(".", 1)[-1] for name, _ in named}
    whole = [x for x in _NEW if _learns(named, x)] if recipe.features and isinstance(model, LigerMixin) else []
    routed = sorted(routing_modules(model))
    targets = [*recipe.targets, *(["qkv_proj"] if "qkv_proj" in parts else [])]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=[x for x in targets if x in parts],
        exclude_modules=frozen(model) if recipe.freeze_kept else None,
        modules_to_save=[*whole, *routed] or None,
        task_type="CAUSAL_LM",
    )
    with checkpoint.quiet_peft():
        made = get_peft_model(model, config)
    for module in made.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copied in module.modules_to_save.values():
                _widen(copied)
    return made, bool(routed)


def _learns(named: list[tuple[str, nn.Module]], part: str) -> bool:
    """Whether a layer has a part of this name that may learn; a pattern may leave no layer that recurs."""
    found = (module for name, module in named if name.endswith("." + part))
    return any(parameter.requires_grad for module in found for parameter in module.parameters())


def frozen(model: PreTrainedModel) -> list[str]:
    """The projections to queries and keys of layers that stayed as they were."""
    kept = model.config.liger["keep"] if isinstance(model, LigerMixin) else ()
    if not kept:
        fail("freeze_kept", "a linearized model in which layers stayed full attention", "none")
    decoder = Decoder(model)
    if hasattr(decoder.attention(kept[0]), "qkv_proj"):
        fail("freeze_kept", "projections to queries and keys alone", "one to queries, keys and values")
    return [f"{decoder.where(i)}.{name}" for i in kept for name in ("q_proj", "k_proj")]


def _widen(module: nn.Module) -> None:
    """A module's parameters in float32, if they are in less; projections still take and give what they did."""
    narrow = {p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if not narrow:
        return
    module.float()
    if isinstance(module, nn.Linear):
        module.register_forward_pre_hook(_to_float)
        module.register_forward_hook(functools.partial(_given_in, narrow.pop()))


def _to_float(module: nn.Module, args: tuple) -> tuple:
    return tuple(x.float() for x in args)


def _given_in(dtype: torch.dtype, module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out.to(dtype)


def without_adapters(model: PeftModel, keep: bool) -> PreTrainedModel:
    """The model behind adapters, with what they learned merged into it, or as it was before."""
    dtypes = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtypes[name] = {key: p.dtype for key, p in module.original_module.named_parameters()}
            if not keep:
                # peft would leave what was trained.
                for adapter in module.modules_to_save:
                    module.modules_to_save[adapter] = module.original_module
    plain = cast(PreTrainedModel, model.merge_and_unload() if keep else model.unload())
    for name, wanted in dtypes.items():
        part = plain.get_submodule(name)
        for key, parameter in part.named_parameters():
            parameter.data = parameter.data.to(wanted[key])
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for number in [i for i, hook in hooks.items() if getattr(hook, "func", hook) in (_to_float, _given_in)]:
                del hooks[number]
    return plain
