"""Families of the user's own, beside those that linearize knows."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from liger_models._adapters import register_targets
from liger_models.families import Family
from liger_models.modeling import add_family
from liger_ops.errors import fail


def register_family(family: Family) -> None:
    """Make one more kind of causal LM known to `linearize` and all that follows, under its config's model_type.

    Its config has a Llama's names for sizes. Its decoder takes input_ids, attention_mask, position_ids, inputs_embeds,
    use_cache and the cache by name, and hands all further arguments on to every attention. That has projections
    q_proj, k_proj, v_proj (or one, qkv_proj) and o_proj, and says head_dim, scaling and layer_idx; q_norm, k_norm and
    use_rope are heeded where it has them. It is called with hidden_states, alone by position or by name, and by name
    with position_embeddings, attention_mask and the cache, and returns its output first of two. Who loads a linearized
    model of the family registers it too.

    Args:
        family: a Family: the config's class, the causal LM's class, and where that holds decoder, layers, attention
            and rotary embedding, as far as it is elsewhere than in a Llama.

    Raises:
        ValueError: no Family; classes that are none of transformers' or do not belong together; places and fields that
            are no names; a model type or a class's name that is taken.
    """
    if not isinstance(family, Family):
        fail("family", "a Family", repr(family))
    for name, kind in (("config", PreTrainedConfig), ("model", PreTrainedModel)):
        given = getattr(family, name)
        if not isinstance(given, type) or not issubclass(given, kind):
            fail(name, f"a class derived from {kind.__name__}", repr(given))
    if family.model.config_class is not family.config:
        fail("model", f"a class with config_class {family.config.__name__}", family.model.__name__)
    if not isinstance(family.config.model_type, str) or not family.config.model_type:
        fail("config", "a class with a model_type", family.config.__name__)
    for name in ("decoder", "layers", "attention", "rotary", "softcap", "clip"):
        given, optional = getattr(family, name), name in ("rotary", "softcap", "clip")
        if not (given is None and optional) and not (isinstance(given, str) and given):
            fail(name, f"a name{', or None' if optional else ''}", repr(given))
    add_family(family)
    register_targets()
