"""LoRA fine-tuning of a linearized (or any) causal LM: peft for the adapters, transformers' Trainer for the loop."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments

from liger_layers import LigerAttention
from liger_models import checkpoint
from liger_models._hidden import with_hidden
from liger_models._inputs import check_ids
from liger_models._objectives import Objective
from liger_models._runs import Reading, Sealed, claimed_run, is_finished, last_whole
from liger_models._snapshot import fingerprint
from liger_models._training import (
    ExactDropout,
    Interrupt,
    LigerTrainer,
    activation_checkpointing,
    adapted,
    frozen,
    without_adapters,
)
from liger_models.data import Rows, collate, to_rows
from liger_models.modeling import AnyModel, forget_name
from liger_models.recipe import Recipe, recipe_of
from liger_models.teacher import mark_tuned
from liger_models.variants import seen_exactly
from liger_ops.errors import fail

_log = logging.getLogger(__name__)


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
    teacher: PreTrainedModel | None = None,
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
        seed: of the order of rows, the adapters, which exact tokens are dropped and what is hidden in rows.
        merge: False returns the peft model with its adapters, which is all that its save_pretrained then writes.
        teacher: the model that an objective with "kl" or "match" learns from; None is the pretrained model that this
            one was linearized from, on the same weights (see `as_original`).
        report_to: where the Trainer reports to, such as "tensorboard".
        callbacks: further callbacks of the Trainer; state.log_history holds the losses.
        changes: fields of Recipe: steps, length, batch, learning_rate, rank, objective, window_dropout, recall_dropout,
            retrieval, ...

    Raises:
        ValueError: no model of transformers, or one in adapters; unknown recipe, objective or field, a field out of
            range, text that cannot be read, is too short or teaches nothing, nothing to resume, a folder that holds
            something else, a teacher asked of a model whose adapters were merged, or in which nothing was
            linearized.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written; the model then has no adapters.
    """
    if not isinstance(model, PreTrainedModel):
        fail("model", "a causal LM of transformers, adapters merged first", type(model).__name__)
    recipe = recipe_of(recipe, changes)
    _check_eval(eval_text, eval_steps)
    reports = _reports(report_to, checkpoints)
    objective = checked_objective(model, recipe, teacher)
    rows = with_hidden(tokenizer, to_rows(tokenizer, text, recipe.length), recipe.retrieval, recipe.length, seed)
    check_ids(model, rows.ids)
    objective.check_rows(model, rows)
    _say_what_is_idle(model, recipe, rows)
    held_out = None if eval_text is None else to_rows(tokenizer, eval_text, recipe.length, "eval_text")
    check_ids(model, held_out.ids if held_out else ())
    pad = next((cast(int, x) for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    job = _Job(rows, held_out, pad, recipe, objective, seed, merge, eval_steps, reports, tuple(callbacks))
    return _run(model, job, checkpoints, resume)


def checked_objective(model: PreTrainedModel, recipe: Recipe, teacher: PreTrainedModel | None = None) -> Objective:
    """What a recipe learns from; ValueError unless the model has all that the recipe asks of it."""
    objective = Objective(cast(dict[str, float], recipe.objective), teacher)
    objective.check(model)
    ExactDropout(model, recipe, seed=0)
    if recipe.freeze_kept:
        frozen(model)
    return objective


def _say_what_is_idle(model: PreTrainedModel, recipe: Recipe, rows: Rows) -> None:
    """A warning where every row is exact as a whole in every layer: recurrences would learn nothing."""
    layers = [m for m in model.modules() if isinstance(m, LigerAttention)]
    # Memories, and recurrences beside the window, read every token.
    exact = [seen_exactly(m) if m.delayed and m.memories is None else 0 for m in layers]
    dropped = recipe.window_dropout or recipe.recall_dropout
    if exact and not dropped and max(map(len, rows.ids)) <= min(exact):
        _log.warning(
            "text: no row of more than %d tokens, all of which are exact: recurrences learn nothing; longer rows, "
            "window_dropout or recall_dropout would teach them",
            min(exact),
        )


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
    teacher = job.objective.teacher
    run["teacher"] = None if teacher is None else f"{type(teacher).__name__}, {teacher.num_parameters():,} parameters"
    run["dtype"], run["weights"] = str(model.dtype), fingerprint(model)
    with claimed_run(folder, run, resume) as last:
        try:
            return _train(model, job, folder, last)
        except KeyboardInterrupt as error:
            if last_whole(folder):
                said = f"fine-tuning interrupted; the checkpoint in {folder} can be resumed"
                raise KeyboardInterrupt(said) from error
            raise


def _measured(state: TrainerState) -> bool:
    """Whether the Trainer measured after the last step by itself, as some versions do."""
    return any("eval_loss" in x and x["step"] == state.global_step for x in state.log_history)


@dataclass(frozen=True)
class _Job:
    """What to train on, how, and what to tell of it."""

    rows: Rows
    held_out: Rows | None
    pad: int
    recipe: Recipe
    objective: Objective
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
            gradient_accumulation_steps=recipe.accumulate,
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
            bf16=recipe.bf16,
            **activation_checkpointing(recipe.gradient_checkpointing),
        )


def _train(model: PreTrainedModel, job: _Job, folder: Path, last: str | None) -> PreTrainedModel | PeftModel:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    arguments, interrupt, reading = job.arguments(folder), Interrupt(), Reading(last)
    torch.manual_seed(job.seed)
    dropout = ExactDropout(model, job.recipe, job.seed)
    peft, routed = adapted(model, job.recipe)
    done, told = False, vars(model.config).get("output_router_logits")
    try:
        trainer = LigerTrainer(
            objective=job.objective,
            dropout=dropout,
            model=peft,
            args=arguments,
            train_dataset=job.rows,
            eval_dataset=job.held_out,
            data_collator=partial(collate, pad=job.pad),
            callbacks=[reading, interrupt, Sealed(), *job.callbacks],
        )
        job.objective.place(arguments.device)
        if routed:
            # The load of memories is to be balanced while they learn.
            model.config.output_router_logits = True
        with interrupt.listening(), checkpoint.quiet_peft(), reading.told():
            if last and is_finished(last):
                trainer._load_from_checkpoint(last)
            else:
                trainer.train(resume_from_checkpoint=last)
        # To stop when nothing is left to do is to be done.
        done = not interrupt.asked or trainer.state.global_step >= trainer.state.max_steps > 0
        if done and job.held_out and not _measured(trainer.state):
            trainer.evaluate()
    finally:
        if routed and told is None:
            del vars(model.config)["output_router_logits"]
        elif routed:
            model.config.output_router_logits = told
        if not done or job.merge:
            model = without_adapters(peft, keep=done)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)
    if not done:
        raise KeyboardInterrupt("fine-tuning interrupted")
    model.config.use_cache = True
    if job.merge:
        forget_name(model)
        mark_tuned(model)
    return (model if job.merge else peft).eval()
