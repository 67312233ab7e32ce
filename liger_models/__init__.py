"""Linearize pretrained Transformers, or train small decoders. Importing this registers the models with transformers."""

# First, for what is untested may not even import.
import liger_models._versions  # noqa: F401
from liger_linear import __version__ as __version__
from liger_models._adapters import register_targets
from liger_models.cache import LigerCacheLayer, cache_bytes, make_cache
from liger_models.configuration import PRESETS, LigerConfig
from liger_models.evaluation import evaluate, perplexity
from liger_models.finetune import finetune
from liger_models.from_scratch import LigerForCausalLM, LigerModelConfig
from liger_models.linearize import linearize
from liger_models.modeling import FAMILIES
from liger_models.on_disk import linearize_on_disk
from liger_models.retrieval import retrieval
from liger_models.selection import select_layers

__all__ = [
    "FAMILIES",
    "PRESETS",
    "LigerCacheLayer",
    "LigerConfig",
    "LigerForCausalLM",
    "LigerModelConfig",
    "cache_bytes",
    "evaluate",
    "finetune",
    "linearize",
    "linearize_on_disk",
    "make_cache",
    "perplexity",
    "retrieval",
    "select_layers",
]

register_targets()
