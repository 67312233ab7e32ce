"""Text from a prompt, through transformers' own generate."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_models.text import chat_ids, framing, token_ids


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
    """The continuation of a prompt, begun as the tokenizer begins a text.

    chat wraps the prompt in the tokenizer's chat template; options go to model.generate. ValueError for no token at
    all, or chat without a template.
    """
    device = model.get_input_embeddings().weight.device
    if chat:
        ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = framing(tokenizer)[0] + token_ids(tokenizer, prompt)
    if not ids:
        raise ValueError("prompt: expected at least one token, got none")
    ids = torch.tensor([ids], device=device)
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, **options}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
