"""Text from a prompt, through transformers' own generate."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from liger_models._inputs import check_ids, input_device
from liger_models.text import chat_ids, framing, token_ids
from liger_ops.errors import fail


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model itself, where adapters that are not merged wrap it."""
    unwrap = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if unwrap is None else unwrap())


# Of each module that somebody evaluates: how many do, and whether it was training before.
_EVALUATED: dict[nn.Module, tuple[int, bool]] = {}
_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module):
    """A model in its evaluation mode for a while, for all threads; when the last leaves, all modules are as before."""
    modules = list(model.modules())
    with _LOCK:
        for module in modules:
            count, training = _EVALUATED.get(module, (0, module.training))
            _EVALUATED[module] = count + 1, training
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                count, training = _EVALUATED.pop(module)
                if count > 1:
                    _EVALUATED[module] = count - 1, training
                else:
                    module.training = training


def without_settings(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its own generation settings: generate fills with them what its caller leaves out.

    It is an object of its own on the same modules, so that the model keeps its settings for all others. A generate
    that somebody put on the model itself, and bound to it, still has them.
    """
    # What torch.compile returns generates by the model in it.
    model = getattr(model, "_orig_mod", model)
    return cast(PreTrainedModel, _unset(model, base_of(model)))


def _unset(module: nn.Module, base: nn.Module) -> nn.Module:
    """Adapters hand their settings on to what they wrap, down to the base."""
    bare = object.__new__(type(module))
    vars(bare).update(vars(module))
    if module is base or "generation_config" in vars(module):
        vars(bare)["generation_config"] = GenerationConfig()
    if module is not base:
        inner = {name: _unset(x, base) for name, x in module.named_children() if base in list(x.modules())}
        vars(bare)["_modules"] = {**module._modules, **inner}
    return bare


class _Numbers(LogitsProcessor):
    """ValueError for scores that are no numbers, of which the likeliest token would be a token all the same."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Those that are never to be said are minus infinity.
        if not (scores < torch.inf).all():
            fail("model", "finite scores of tokens", "NaN or infinity; its weights may be damaged")
        return scores


def continued(
    model: PreTrainedModel, ids: torch.Tensor, shown: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """Token ids [B,T+N] that begin with ids [B,T], all of them shown or those where shown [B,T] is 1.

    Options go to model.generate. ValueError for ids that the model does not know, or scores that are no numbers.
    """
    check_ids(model, [ids])
    processors = LogitsProcessorList([_Numbers(), *(options.pop("logits_processor", None) or ())])
    # Not every pretrained model has it, but every causal LM.
    mask = torch.ones_like(ids) if shown is None else shown
    return cast(Any, model).generate(ids, attention_mask=mask, logits_processor=processors, **options)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    **options: Any,
) -> str:
    """The continuation of a prompt, begun as the tokenizer begins a text.

    chat wraps the prompt in the tokenizer's chat template; options go to model.generate. ValueError for no token at
    all, chat without a template, or scores that are no numbers.
    """
    device = input_device(model)
    if chat:
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = framing(tokenizer)[0] + token_ids(tokenizer, prompt)
    if not ids:
        fail("prompt", "at least one token", "none")
    ids = torch.tensor([ids], device=device)
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, **options}
    out = continued(model, ids, max_new_tokens=max_new_tokens, **options)
    return cast(str, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
