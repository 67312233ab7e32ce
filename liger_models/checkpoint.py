"""Models in from a folder, a GGUF file or a hub name; folders out, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load(name: str | Path, dtype: torch.dtype | str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) from a local folder, a GGUF file (dequantized to float32 unless dtype says) or a hub name.

    Raises:
        ValueError: nothing there, or a folder without a config; names what was looked for.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: expected a folder with a config.json, got {path}")
    elif path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ValueError(f"model: expected a folder, a .gguf file or a hub name, got {name!r}")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: could not load {str(name)!r}: {str(error).splitlines()[0]}") from error
    return model.eval(), tokenizer


def _load_gguf(path: Path, dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise ValueError(f"model: expected a GGUF file, found nothing at {path}")
    from transformers import GgufConfig

    folder, dtype = str(path.parent), torch.float32 if dtype == "auto" else dtype
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    return model.eval(), tokenizer


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """The folder as a Path; ValueError if it exists and may not be replaced."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"out: {folder} exists; pass --overwrite to replace it")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    return folder


@contextmanager
def written_whole(folder: str | Path, overwrite: bool = False):
    """Yield a sibling folder to write into; it takes the name of `folder` only after everything in it was written."""
    folder = check_output(folder, overwrite)
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


def discard(folder: str | Path) -> None:
    """Remove a folder of training checkpoints once the result is safe."""
    shutil.rmtree(folder, ignore_errors=True)
