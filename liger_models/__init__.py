"""Linearize pretrained Transformers, or train small decoders. Importing this registers the models with transformers."""

# First, for what is untested may not even import.
import liger_models._versions  # noqa: F401
from liger_linear import __version__ as __version__
from liger_models._adapters import register_targets
from liger_models.cache import LigerCacheLayer, cache_bytes, make_cache
from liger_models.checkpoint import load, save
from liger_models.configuration import PRESETS, LigerConfig
from liger_models.drawing import draw
from liger_models.evaluation import evaluate, perplexity
from liger_models.families import Family
from liger_models.figures import measure_variants
from liger_models.finetune import finetune
from liger_models.from_scratch import LigerForCausalLM, LigerModelConfig
from liger_models.generation import generate
from liger_models.linearize import linearize
from liger_models.modeling import FAMILIES
from liger_models.on_disk import linearize_on_disk
from liger_models.recipe import Recipe
from liger_models.registration import register_family
from liger_models.retrieval import retrieval
from liger_models.selection import select_layers
from liger_models.tasks import run_tasks
from liger_models.teacher import as_original
from liger_models.text import standard_text

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Family",
    "LigerCacheLayer",
    "LigerConfig",
    "LigerForCausalLM",
    "LigerModelConfig",
    "Recipe",
    "as_original",
    "cache_bytes",
    "draw",
    "evaluate",
    "finetune",
    "generate",
    "linearize",
    "linearize_on_disk",
    "load",
    "make_cache",
    "measure_variants",
    "perplexity",
    "register_family",
    "retrieval",
    "run_tasks",
    "save",
    "select_layers",
    "standard_text",
]

register_targets()
