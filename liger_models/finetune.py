"""LoRA fine-tuning of a linearized (or any) causal LM: peft for the adapters, transformers' Trainer for the loop."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from liger_layers import routing_modules
from liger_models import checkpoint
from liger_models.data import Rows, collate, to_rows
from liger_models.evaluation import mean_loss
from liger_models.modeling import AnyModel, LigerMixin, forget_name
from liger_ops.errors import fail


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. steps None means `epochs` passes over the text.

    features: train, beside the adapters on `targets`, the feature maps and the mix (where learn_mix allows). Routers of
    memories and the mix behind them are always trained, and their load is balanced.
    """

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 1e-3
    length: int = 512
    batch: int = 2
    epochs: float = 1.0
    steps: int | None = None
    warmup: int = 6
    features: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self):
        for name, low in (("rank", 1), ("length", 2), ("batch", 1), ("steps", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not (value is None and name == "steps") and (
                isinstance(value, bool) or not isinstance(value, int) or value < low
            ):
                fail(name, f"an integer >= {low}", repr(value))
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                fail(name, "a number > 0", repr(getattr(self, name)))


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


class _Interrupt(TrainerCallback):
    """Ctrl-C finishes the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self):
        self.asked = False

    @contextmanager
    def listening(self):
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


class _Trainer(Trainer):
    """Evaluates as `perplexity` does: every token with a label counts alike, and routers do not count."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        loss = mean_loss(cast(PreTrainedModel, self.model), cast(Rows, eval_dataset or self.eval_dataset))
        figures = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(loss)}
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


@overload
def finetune(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Any,
    recipe: str | Recipe = "default",
    *,
    merge: Literal[True] = True,
    **changes: Any,
) -> AnyModel: ...


@overload
def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Any,
    recipe: str | Recipe = "default",
    *,
    merge: Literal[False],
    **changes: Any,
) -> PeftModel: ...


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Any,
    recipe: str | Recipe = "default",
    *,
    eval_text: Any = None,
    eval_steps: int | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    merge: bool = True,
    report_to: str | Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> PreTrainedModel | PeftModel:
    """Fine-tune on text with LoRA, merge the adapters into the weights and return the model.

    Args:
        model: a causal LM; changed in place.
        tokenizer: its tokenizer.
        text: what to learn, in rows of at most `length` tokens: a text; a list of documents; rows of a list or a
            dataset with `text`, with `messages` (what the assistant says is learned), or with `prompt` and
            `completion` (the completion is); or a path to .txt, .md, .jsonl or .json. One text is cut into full
            blocks, each document of several by itself.
        recipe: "default", "paper", or a Recipe.
        eval_text: the same forms, to measure eval_loss and eval_perplexity on at the end; the log has them.
        eval_steps: measure them also every so many steps.
        checkpoints: folder for the checkpoint that Ctrl-C leaves; None leaves none.
        resume: continue from the last checkpoint in that folder, under the same settings and on the same text.
        seed: of the order of rows and the adapters.
        merge: False returns the peft model with its adapters, which is all that its save_pretrained then writes.
        report_to: where the Trainer reports to, such as "tensorboard".
        callbacks: further callbacks of the Trainer; state.log_history holds the losses.
        changes: fields of Recipe: steps, length, batch, learning_rate, rank, ...

    Raises:
        ValueError: no model of transformers, or one in adapters; unknown recipe or field, a field out of range, text
            that cannot be read or teaches nothing, nothing to resume, or a folder that holds something else.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written; the model then has no adapters.
    """
    if not isinstance(model, PreTrainedModel):
        fail("model", "a causal LM of transformers, adapters merged first", type(model).__name__)
    recipe = _recipe(recipe, changes)
    _check_eval(eval_text, eval_steps)
    reports = _reports(report_to, checkpoints)
    rows = to_rows(tokenizer, text, recipe.length)
    held_out = None if eval_text is None else to_rows(tokenizer, eval_text, recipe.length, "eval_text")
    pad = next((cast(int, x) for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    job = _Job(rows, held_out, pad, recipe, seed, merge, eval_steps, reports, tuple(callbacks))
    return _run(model, job, checkpoints, resume)


def _check_eval(text: Any, steps: int | None) -> None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        fail("eval_steps", "an integer >= 1", repr(steps))
    if steps is not None and text is None:
        fail("eval_steps", "an eval_text to measure", "none")


def _reports(report_to: str | Sequence[str], checkpoints: str | Path | None) -> list[str]:
    """Where the Trainer reports to."""
    reports = {report_to} if isinstance(report_to, str) else set(report_to)
    if reports & {"tensorboard", "all"} and not (checkpoints or os.getenv("TENSORBOARD_LOGGING_DIR")):
        fail("report_to", "a folder of checkpoints for tensorboard to write to", "none")
    return sorted(reports)


def _run(
    model: PreTrainedModel, job: _Job, checkpoints: str | Path | None, resume: bool
) -> PreTrainedModel | PeftModel:
    """Train, with a folder for the checkpoint that Ctrl-C leaves, if there is one."""
    if checkpoints is None:
        if resume:
            fail("resume", "a folder of checkpoints to resume from", "none")
        with tempfile.TemporaryDirectory() as folder:
            return _train(model, job, Path(folder), None)
    folder = Path(checkpoints)
    run = {**asdict(job.recipe), "targets": list(job.recipe.targets), "seed": job.seed, "text": job.rows.digest()}
    run["model"] = f"{type(model).__name__} with {model.num_parameters():,} parameters"
    run["liger"] = getattr(model.config, "liger", None)
    last = checkpoint.claim(folder, run, resume)
    try:
        return _train(model, job, folder, last)
    except KeyboardInterrupt as error:
        if get_last_checkpoint(str(folder)):
            raise KeyboardInterrupt(f"fine-tuning interrupted; the checkpoint in {folder} can be resumed") from error
        raise
    finally:
        checkpoint.discard(folder, unless_checkpoint=True)


def _recipe(recipe: str | Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe of a name with some of its fields changed; None changes nothing."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            fail("recipe", f"one of {', '.join(RECIPES)}", repr(recipe))
        recipe = RECIPES[recipe]
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{unknown[0]}: unknown; expected one of {', '.join(sorted(known))}")
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def _measured(state: TrainerState) -> bool:
    """Whether the Trainer measured after the last step by itself, as some versions do."""
    return any("eval_loss" in x and x["step"] == state.global_step for x in state.log_history)


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """TrainingArguments under the name that the installed transformers uses."""
    if not wanted:
        return {}
    known = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


@dataclass(frozen=True)
class _Job:
    """What to train on, how, and what to tell of it."""

    rows: Rows
    held_out: Rows | None
    pad: int
    recipe: Recipe
    seed: int
    merge: bool
    eval_steps: int | None
    report_to: list[str]
    callbacks: tuple[TrainerCallback, ...]

    def arguments(self, folder: Path) -> TrainingArguments:
        recipe = self.recipe
        return TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=recipe.batch,
            num_train_epochs=recipe.epochs,
            max_steps=recipe.steps or -1,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=recipe.warmup,
            weight_decay=0.0,
            logging_steps=10,
            save_strategy="no",
            eval_strategy="steps" if self.eval_steps else "no",
            eval_steps=self.eval_steps,
            report_to=self.report_to,
            seed=self.seed,
            # Rows of like lengths in a batch, so that little is padded.
            train_sampling_strategy="random" if self.rows.even else "group_by_length",
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
            **_checkpointing(recipe.gradient_checkpointing),
        )


def _adapted(model: PreTrainedModel, recipe: Recipe) -> tuple[PeftModel, bool]:
    """The model with adapters, and whether it has routers to train."""
    whole = []
    if recipe.features and isinstance(model, LigerMixin):
        whole = ["feature_map", "mix"] if model.config.liger["learn_mix"] else ["feature_map"]
    names = ["." + name for name, _ in model.named_modules()]
    parts = {name.rsplit(".", 1)[-1] for name in names}
    # A pattern may leave no layer that recurs.
    whole = [x for x in whole if any(name.endswith("." + x) for name in names)]
    routed = sorted(routing_modules(model))
    targets = [*recipe.targets, *(["qkv_proj"] if "qkv_proj" in parts else [])]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=[x for x in targets if x in parts],
        modules_to_save=[*whole, *routed] or None,
        task_type="CAUSAL_LM",
    )
    with checkpoint.quiet_peft():
        return get_peft_model(model, config), bool(routed)


def _train(model: PreTrainedModel, job: _Job, folder: Path, last: str | None) -> PreTrainedModel | PeftModel:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    arguments, interrupt = job.arguments(folder), _Interrupt()
    torch.manual_seed(job.seed)
    adapted, routed = _adapted(model, job.recipe)
    done, told = False, vars(model.config).get("output_router_logits")
    try:
        trainer = _Trainer(
            model=adapted,
            args=arguments,
            train_dataset=job.rows,
            eval_dataset=job.held_out,
            data_collator=partial(collate, pad=job.pad),
            callbacks=[interrupt, *job.callbacks],
        )
        if routed:
            # The load of memories is to be balanced while they learn.
            model.config.output_router_logits = True
        with interrupt.listening(), checkpoint.quiet_peft():
            trainer.train(resume_from_checkpoint=last)
        done = not interrupt.asked
        if done and job.held_out and not _measured(trainer.state):
            trainer.evaluate()
    finally:
        if routed and told is None:
            del vars(model.config)["output_router_logits"]
        elif routed:
            model.config.output_router_logits = told
        if not done or job.merge:
            model = adapted.merge_and_unload() if done else adapted.unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)
    if not done:
        raise KeyboardInterrupt("fine-tuning interrupted")
    model.config.use_cache = True
    if job.merge:
        forget_name(model)
    return (model if job.merge else adapted).eval()
