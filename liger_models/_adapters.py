"""The modules that peft adapts where nobody names any, for the model types of this package."""

from peft.utils import constants

from liger_models.families import KNOWN, PREFIX
from liger_models.from_scratch import LigerModelConfig

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
# Where queries, keys and values are one projection.
_FUSED = {"phi3": ["qkv_proj"]}


def register_targets() -> None:
    """Give every linearized type the row of its family in each of peft's tables; known types keep theirs.

    A family that peft does not know, and models from random weights, take Llama's row if it names projections of
    attention alone, which they have too.
    """
    for name, table in vars(constants).items():
        if not name.startswith("TRANSFORMERS_MODELS_TO_"):
            continue
        usual = table.get("llama", ())
        if not usual or not set(usual) <= _PROJECTIONS:
            usual = None
        rows = {PREFIX + base: table.get(base, usual and _FUSED.get(base, usual)) for base in KNOWN}
        rows[LigerModelConfig.model_type] = usual
        for kind, row in rows.items():
            if row is not None:
                table.setdefault(kind, row)
