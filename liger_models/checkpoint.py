"""Models in from a folder, a GGUF file or a hub name; folders out, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from liger_models.modeling import forget_name
from liger_models.teacher import mark_tuned
from liger_ops.errors import fail

# The settings of the run, beside its checkpoints.
_RUN = "run.json"
# What the Trainer reports to files, which lies there too and is nobody's to remove.
_REPORTS = "runs"
# A model's, and that of adapters without the model.
_CONFIGS = ("config.json", "adapter_config.json")


def load(name: str | Path, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) from a local folder, a GGUF file (dequantized to float32 unless dtype says) or a hub name.

    A folder of adapters gives the model they name, with them merged in.

    Raises:
        ValueError: nothing there, a folder without a config, a file that cannot be read, or a weight that is missing
            or has another shape; names what was looked for.
    """
    path, source = Path(name), str(name)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: expected a GGUF file, found nothing at {path}")
        source, options = str(path.parent), {"gguf_file": path.name}
    elif (path / _CONFIGS[1]).is_file() and not (path / _CONFIGS[0]).is_file():
        return _with_adapters(path, dtype)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            fail("model", "a folder with a config.json", path)
    elif path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        fail("model", "a folder, a .gguf file or a hub name", repr(name))
    with told(str(name)):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if options:
        dtype = torch.float32 if dtype == "auto" else dtype
        options["quantization_config"] = GgufConfig(dequantize=True)
    return open_weights(str(name), source, dtype=dtype, **options), tokenizer


def _with_adapters(folder: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that adapters in a folder were trained on, with them merged in, and its tokenizer."""
    with told(str(folder)):
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        fail("model", "adapters that name their model", folder)
    model, tokenizer = load(name, dtype)
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
        model, found = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"model: expected every weight in {name!r}, found no {missing[0]}{more}")
    return model.eval()


@contextmanager
def told(name: str):
    """A model that cannot be loaded as one ValueError."""
    try:
        yield
    # What a loader raises over a malformed file may be anything.
    except Exception as error:
        lines = [line.strip() for line in (str(error) or repr(error)).splitlines() if line.strip()]
        raise ValueError(f"model: could not load {name!r}: {' '.join(lines[:2])}") from error


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """The folder as a Path; ValueError if it exists and may not be replaced."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"out: {folder} exists; pass --overwrite to replace it")
    if folder.exists() and not folder.is_dir():
        fail("out", "a folder", f"the file {folder}")
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).is_file() for name in _CONFIGS):
        fail("out", "a model's folder to replace", f"{folder}, which holds something else")
    return folder


@contextmanager
def written_whole(folder: str | Path, overwrite: bool = False):
    """Yield a sibling folder to write into; it takes the name of `folder` only after everything in it was written."""
    # Through links, and a name even for ".".
    folder = check_output(folder, overwrite).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield part
        # mkdtemp makes folders private; the result gets the permissions of an ordinary one.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            folder.rename(old / "was")
            part.rename(folder)
            shutil.rmtree(old)
        else:
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, overwrite: bool = False
) -> Path:
    """Write model and tokenizer to a folder that from_pretrained reads, or leave nothing behind."""
    with written_whole(folder, overwrite) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return Path(folder)


def claim(folder: Path, run: dict, resume: bool) -> str | None:
    """Take a folder for the checkpoints of a run; the checkpoint to resume from, if so asked.

    ValueError if the folder holds something else, an interrupted run that nobody asked to resume, or a run with other
    settings.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if folder.is_dir():
        if others := [x.name for x in folder.iterdir() if not _ours(x) and x.name != _REPORTS]:
            fail("checkpoints", "a folder of checkpoints", f"{folder}, which holds {others[0]}")
        if last and not resume:
            raise ValueError(f"checkpoints: {folder} holds an interrupted run; resume it, or remove the folder")
    if resume:
        if last is None:
            raise ValueError(f"resume: expected a checkpoint in {folder}, found none")
        before = json.loads((folder / _RUN).read_text(encoding="utf-8"))
        for name, value in run.items():
            if before.get(name) != value:
                fail(name, f"{before.get(name)!r}, as in the run to resume", repr(value))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RUN).write_text(json.dumps(run), encoding="utf-8")
    return last


def _ours(path: Path) -> bool:
    return path.name == _RUN or (path.is_dir() and path.name.startswith("checkpoint-"))


def discard(folder: Path, unless_checkpoint: bool = False) -> None:
    """Remove what a run left in its folder of checkpoints, and nothing else; optionally only if it left none."""
    if not folder.is_dir() or (unless_checkpoint and get_last_checkpoint(str(folder))):
        return
    for path in folder.iterdir():
        if _ours(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
