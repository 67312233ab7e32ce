"""Text from a prompt, through transformers' own generate."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def without_settings(model: PreTrainedModel):
    """The model without its own generation settings for a while: generate fills with them what its caller leaves out.

    Yields those settings.
    """
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    settings = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield settings[0]
    finally:
        for holder, own in zip(holders, settings, strict=True):
            holder.generation_config = own


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
    """The continuation of a prompt. chat wraps it in the tokenizer's chat template; options go to model.generate."""
    device = model.get_input_embeddings().weight.device
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].shape[1]:
        raise ValueError("prompt: expected at least one token, got none")
    inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, **options}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
