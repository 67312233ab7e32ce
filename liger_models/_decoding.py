"""How a causal LM whose layers hold states, not keys and values, generates through transformers.

Shapes: B batch, T columns at hand, S columns seen before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteriaList

from liger_models._inputs import CACHE
from liger_models.cache import check_prompt, fit_cache, make_cache, seen_columns, take_cache
from liger_ops.errors import fail


class _Ended(StoppingCriteriaList):
    """Stopping criteria that remember the rows [B] which they have ended."""

    rows: torch.Tensor | None = None

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.rows = ended if self.rows is None else self.rows | ended
        return ended


if TYPE_CHECKING:

    class _CausalLM(PreTrainedModel, GenerationMixin):
        """What it stands before."""

else:
    _CausalLM = object


class ConstantCacheMixin(_CausalLM):
    """Stands before a causal LM of transformers."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        kind, cache = generation_config.cache_implementation, take_cache(model_kwargs)
        if kind not in (None, "dynamic"):
            fail("cache_implementation", "None or 'dynamic', whose size is constant", repr(kind))
        if cache is not None:
            # Before transformers asks its layers to hold what guessing ahead takes back.
            fit_cache(cache, self.config)
            # What transformers asks before it rolls a cache back that the caller still holds.
            cache._is_user_defined = True  # type: ignore[attr-defined]  # transformers does so too, undeclared
        elif generation_config.use_cache:
            cache = make_cache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        if cache is not None:
            model_kwargs[CACHE] = cache

    def init_continuous_batching(self, *args, **kwargs) -> NoReturn:
        """ValueError: what generate_batch and its like keep in pages are keys and values."""
        raise ValueError("generate_batch: expected generate with a padded batch, for layers that hold states, no pages")

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        return attention_mask

    # transformers looks for inputs_embeds among the names.
    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, liger_ended: _Ended | None = None, **kwargs
    ):
        # Where generate is to cut off what the cache holds, it was given all ids.
        whole = kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None
        if whole and inputs_embeds is None:
            check_prompt(kwargs.get(CACHE), input_ids, kwargs.get("attention_mask"))
        prepare = super().prepare_inputs_for_generation  # type: ignore[misc]  # a protocol that no model fulfils
        return prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, *args, **kwargs):
        # Only these criteria make generate write padding where a row has ended.
        if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            stopping_criteria = kwargs["liger_ended"] = _Ended(stopping_criteria)
        sample = super()._sample  # type: ignore[misc]  # as above
        return sample(input_ids, logits_processor, stopping_criteria, *args, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs) -> dict[str, Any]:
        """Padding behind a row that has ended is hidden from the start: a state could not forget it afterwards."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        ended, cache = model_kwargs.get("liger_ended"), model_kwargs.get(CACHE)
        if ended is None or ended.rows is None or cache is None or not ended.rows.any():
            return model_kwargs
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            # Left out where every column is shown, as all were so far.
            mask = torch.ones(len(ended.rows), seen_columns(cache) + 1, dtype=torch.long, device=ended.rows.device)
        last = mask[:, -1:].masked_fill(ended.rows.to(mask.device).unsqueeze(1), 0)
        model_kwargs["attention_mask"] = torch.cat([mask[:, :-1], last], 1)
        return model_kwargs
