"""Settings that come with a model, where loading takes what use would trip over."""

from __future__ import annotations

import math
from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from liger_ops.errors import fail

# Whatever has more layers is no model, but would be built before its weights are missed.
_LAYERS = 2048
# A state has room for as many exact ones before the first is seen; no model was trained on longer texts.
_TOKENS = 1 << 20
# What torch counts with.
_LARGEST = 2**63 - 1
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_FLAGS = ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits")
_FLAGS += ("return_dict_in_generate", "remove_invalid_values", "renormalize_logits", "low_memory", "disable_compile")
_COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k")
_COUNTS += ("num_beam_groups", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "prompt_lookup_num_tokens")
_NUMBERS = ("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "length_penalty")
_NUMBERS += ("repetition_penalty", "encoder_repetition_penalty", "diversity_penalty", "guidance_scale", "penalty_alpha")
_NUMBERS += ("max_time",)


def check_config(config: PreTrainedConfig) -> None:
    """ValueError for sizes that no model has; before it is built, which takes as long as they are large."""
    layers = getattr(config, "num_hidden_layers", 1)
    if not _is_whole(layers, 1) or layers > _LAYERS:
        fail("num_hidden_layers", f"an integer from 1 to {_LAYERS}", repr(layers))
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    # Other families do not read it, nor layers that see everything.
    slides = hasattr(type(config), "sliding_window") and (kinds is None or "sliding_attention" in kinds)
    if slides and window is not None and not _is_whole(window, 1):
        fail("sliding_window", "an integer >= 1", repr(window))
    liger = getattr(config, "liger", None)
    told = liger if isinstance(liger, Mapping) else vars(config)
    for name in ("window", "sinks", "recall"):
        if isinstance(given := told.get(name), int) and given > _TOKENS:
            fail(name, f"at most {_TOKENS:,} tokens", given)
    chosen = getattr(config, "num_experts_per_tok", None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if chosen is not None and isinstance(experts, int) and not (_is_whole(chosen, 1) and chosen <= experts):
        fail("num_experts_per_tok", f"an integer from 1 to {experts}", repr(chosen))


def check_model(model: PreTrainedModel) -> None:
    """ValueError for settings of another kind than generating and evaluating take."""
    for settings in (model.config, model.generation_config):
        for name in _IDS:
            given = getattr(settings, name, None)
            if given is not None and not all(_is_whole(x, -1) for x in (given if isinstance(given, list) else [given])):
                fail(name, "token ids", repr(given))
        for name in _FLAGS:
            if not isinstance(given := getattr(settings, name, None), bool | None):
                fail(name, "true or false", repr(given))
    for name in _COUNTS:
        if (given := getattr(model.generation_config, name, None)) is not None and not _is_whole(given, 0):
            fail(name, "an integer >= 0", repr(given))
    for name in _NUMBERS:
        if (given := getattr(model.generation_config, name, None)) is not None and not _is_finite(given):
            fail(name, "a number", repr(given))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer that makes no token ids of a text, or whose own settings are of another kind."""
    if not _is_finite(tokenizer.model_max_length):
        fail("model_max_length", "a number", repr(tokenizer.model_max_length))
    if not isinstance(tokenizer.chat_template, str | dict | None):
        fail("chat_template", "a text", type(tokenizer.chat_template).__name__)
    # With a character that hardly any vocabulary has.
    tokenizer.decode(tokenizer("a \ue000")["input_ids"], skip_special_tokens=True)


def _is_whole(x: object, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= _LARGEST


def _is_finite(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
