"""Models in from a folder, a GGUF file or a hub name; folders out, whole or not at all."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from liger_models._folders import check_beside, check_folder
from liger_models._gguf import blocks
from liger_models._settings import check_config, check_model, check_tokenizer
from liger_models._whole import written_whole
from liger_models.modeling import forget_name
from liger_models.teacher import mark_tuned
from liger_ops.errors import check_flag, fail

# A model's, and that of adapters without the model.
_CONFIGS = ("config.json", "adapter_config.json")
# What transformers says where it will not run code.
_TRUST = "trust_remote_code"


def load(
    name: str | Path, dtype: torch.dtype | str = "auto", *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) from a local folder, a GGUF file (dequantized to float32 unless dtype says) or a hub name.

    A folder of adapters gives the model they name, with them merged in. Before a folder is read, its files are looked
    at. Code that comes with a model is never run unless trust_remote_code says so, and nobody is asked.

    Raises:
        ValueError: nothing there, a folder without a config, a file that cannot be read or leads out of the folder,
            settings that no model has, code that is not trusted, or a weight that is missing or has another shape;
            names what was looked for.
    """
    check_flag("trust_remote_code", trust_remote_code)
    path, source = Path(name), str(name)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: expected a GGUF file, found nothing at {path}")
        source, options = str(path.parent), {"gguf_file": path.name}
    elif path.is_dir():
        with told(str(name)):
            check_folder(path)
        if (path / _CONFIGS[1]).is_file() and not (path / _CONFIGS[0]).is_file():
            return _with_adapters(path, dtype, trust_remote_code)
        if not (path / "config.json").is_file():
            fail("model", "a folder with a config.json", path)
    elif path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        fail("model", "a folder, a .gguf file or a hub name", repr(name))
    trust: dict[str, Any] = {_TRUST: trust_remote_code}
    with told(str(name)):
        if options:
            check_beside(path)
        config = AutoConfig.from_pretrained(source, **options, **trust)
        check_config(config)
        if options and (held := blocks(path)) is not None and config.num_hidden_layers > held:
            fail("num_hidden_layers", f"at most the {held} that the file holds", config.num_hidden_layers)
        tokenizer = AutoTokenizer.from_pretrained(source, **options, **trust)
        check_tokenizer(tokenizer)
    if options:
        dtype = torch.float32 if dtype == "auto" else dtype
        options["quantization_config"] = GgufConfig(dequantize=True)
    # Read once: of a GGUF file it takes seconds.
    return open_weights(str(name), source, config=config, dtype=dtype, **options, **trust), tokenizer


def _with_adapters(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that adapters in a folder were trained on, with them merged in, and its tokenizer."""
    with told(str(folder)):
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        fail("model", "adapters that name their model", folder)
    model, tokenizer = load(name, dtype, trust_remote_code=trust_remote_code)
    with told(str(folder)), quiet_peft():
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    forget_name(merged)
    mark_tuned(merged)
    return merged, tokenizer


@contextmanager
def quiet_peft():
    """peft asks transformers about gradient checkpointing by its old name, and wants models to come from a folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Could not find a config file in ", UserWarning)
        yield


def open_weights(name: str, source: str | None, kind: type = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """kind.from_pretrained(source) with these options; ValueError names what cannot be read, or is missing, in name."""
    with told(name):
        model, found = kind.from_pretrained(source, output_loading_info=True, **{_TRUST: False, **options})
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"model: expected every weight in {name!r}, found no {missing[0]}{more}")
    with told(name):
        check_model(model)
    return model.eval()


@contextmanager
def told(name: str):
    """A model that cannot be loaded as one ValueError."""
    try:
        yield
    # What a loader raises over a malformed file may be anything.
    except Exception as error:
        lines = [line.strip() for line in (str(error) or repr(error)).splitlines() if line.strip()]
        if _TRUST in str(error):
            lines = [f"it comes with code of its own, which runs with --trust-remote-code ({_TRUST}=True) alone"]
        raise ValueError(f"model: could not load {name!r}: {' '.join(lines[:2])}") from error


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, overwrite: bool = False
) -> Path:
    """Write model and tokenizer to a folder that from_pretrained reads, or leave nothing behind."""
    with written_whole(folder, overwrite) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return Path(folder)
