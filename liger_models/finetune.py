"""LoRA fine-tuning of a linearized (or any) causal LM: peft for the adapters, transformers' Trainer for the loop."""

from __future__ import annotations

import math
import signal
import tempfile
import threading
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from liger_models import checkpoint
from liger_models.modeling import LigerMixin
from liger_models.text import to_blocks


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
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)!r}")


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


# What decides about memories: in a linearized layer, and in a mixer from random weights.
_ROUTING = ("memories.router", "memories.mix", "mixer.router", "mixer.router_gate")


class Blocks(torch.utils.data.Dataset):
    """Rows of token ids as inputs and labels of next-token prediction."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


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


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    recipe: str | Recipe = "default",
    *,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """Fine-tune on text with LoRA, merge the adapters into the weights and return the model.

    Args:
        model: a causal LM; changed in place.
        tokenizer: its tokenizer.
        text: training text, cut into blocks of `length` tokens.
        recipe: "default", "paper", or a Recipe.
        checkpoints: folder for the checkpoint that Ctrl-C leaves; None leaves none.
        resume: continue from the last checkpoint in that folder, under the same settings.
        seed: of the order of blocks and the adapters.
        changes: fields of Recipe: steps, length, batch, learning_rate, rank, ...

    Raises:
        ValueError: unknown recipe or field, a field out of range, a text shorter than a block, nothing to resume, or a
            folder that holds something else.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written; the model then has no adapters.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        recipe = RECIPES[recipe]
    known = {f.name for f in fields(Recipe)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{unknown[0]}: unknown; expected one of {', '.join(sorted(known))}")
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    blocks = to_blocks(tokenizer, text, recipe.length)
    if checkpoints is None:
        if resume:
            raise ValueError("resume: expected a folder of checkpoints to resume from, got none")
        with tempfile.TemporaryDirectory() as folder:
            return _train(model, blocks, recipe, Path(folder), None, seed)
    folder = Path(checkpoints)
    run = {**asdict(recipe), "targets": list(recipe.targets), "seed": seed, "blocks": len(blocks)}
    run["model"] = f"{type(model).__name__} with {model.num_parameters():,} parameters"
    last = checkpoint.claim(folder, run, resume)
    try:
        return _train(model, blocks, recipe, folder, last, seed)
    except KeyboardInterrupt as error:
        if get_last_checkpoint(str(folder)):
            raise KeyboardInterrupt(f"fine-tuning interrupted; the checkpoint in {folder} can be resumed") from error
        raise
    finally:
        checkpoint.discard(folder, unless_checkpoint=True)


@contextmanager
def _quiet_peft():
    """peft still asks transformers about gradient checkpointing by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """TrainingArguments under the name that the installed transformers uses."""
    if not wanted:
        return {}
    known = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _train(model, blocks, recipe: Recipe, folder: Path, last: str | None, seed: int) -> PreTrainedModel:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = []
    if recipe.features and isinstance(model, LigerMixin):
        whole = ["feature_map", "mix"] if model.config.liger["learn_mix"] else ["feature_map"]
    names = ["." + name for name, _ in model.named_modules()]
    parts = {name.rsplit(".", 1)[-1] for name in names}
    # A pattern may leave no layer that recurs.
    whole, routed = ([x for x in xs if any(name.endswith("." + x) for name in names)] for xs in (whole, _ROUTING))
    targets = [*recipe.targets, *(["qkv_proj"] if "qkv_proj" in parts else [])]
    torch.manual_seed(seed)
    with _quiet_peft():
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,
                target_modules=[x for x in targets if x in parts],
                modules_to_save=[*whole, *routed] or None,
                task_type="CAUSAL_LM",
            ),
        )
    interrupt = _Interrupt()
    arguments = TrainingArguments(
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
        report_to="none",
        seed=seed,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
        **_checkpointing(recipe.gradient_checkpointing),
    )
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=Blocks(blocks),
        data_collator=default_data_collator,
        callbacks=[interrupt],
    )
    done, told = False, vars(model.config).get("output_router_logits")
    try:
        if routed:
            # The load of memories is to be balanced while they learn.
            model.config.output_router_logits = True
        with interrupt.listening(), _quiet_peft():
            trainer.train(resume_from_checkpoint=last)
        done = not interrupt.asked
    finally:
        model = adapted.merge_and_unload() if done else adapted.unload()
        if routed and told is None:
            del model.config.output_router_logits
        elif routed:
            model.config.output_router_logits = told
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
    if not done:
        raise KeyboardInterrupt("fine-tuning interrupted")
    model.config.use_cache = True
    return model.eval()
