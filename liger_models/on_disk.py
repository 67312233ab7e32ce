"""Linearize a model that is larger than memory: from one folder to another, a tensor at a time."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from liger_models import checkpoint
from liger_models._calibration import check_calibration
from liger_models._checks import FLOATS
from liger_models._conversion import LayerPlan, converted, plan_layers
from liger_models._decoder import Decoder
from liger_models._folders import check_folder
from liger_models._settings import check_config, check_tokenizer
from liger_models._whole import check_output, read_json, write_json, written_whole
from liger_models.configuration import LigerConfig
from liger_models.linearize import linearized_config, resolved
from liger_models.text import standard_text, to_blocks
from liger_ops.errors import fail

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights in any format: what is converted comes from safetensors, and nothing else goes along; nor does code.
_LEFT = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".py"}
_TOKENIZER = "tokenizer_config.json"
# Numbers looked at together: more would cost memory, fewer time.
_PIECE = 1 << 22
_ROWS, _LENGTH = 8, 256


def linearize_on_disk(
    source: str | Path,
    out: str | Path,
    config: LigerConfig | None = None,
    *,
    preset: str = "default",
    keep: Iterable[int] | None = None,
    calibration: torch.Tensor | None = None,
    overwrite: bool = False,
    **changes: Any,
) -> Path:
    """Linearize the model in a folder of safetensors into another folder, without ever holding it in memory.

    The pretrained weights are copied file by file, whatever their dtype, and what is new follows in a file of its own;
    `from_pretrained` reads the result like any other. Features and scores are fitted to text that passes through
    layers which are read when their turn comes, once for every 2,048 tokens. A model that does not fit in memory is too
    slow to draw that text itself: unless `calibration` is given, it is 2,048 tokens of the help topics of Python's
    standard library, and for scores 24 rows of them that ask for something.

    Args:
        source: a local folder with config.json and safetensors, in one file or several.
        out: the folder to write, whole or not at all.
        config, preset, keep, calibration, changes: as for `linearize`.
        overwrite: replace a model that is already there.

    Returns:
        The folder written.

    Raises:
        ValueError: as for `linearize`; weights that are quantized or not in safetensors; no tokenizer in the folder
            to read text with, where a calibration is needed and not given; a source that lies in `out`.
    """
    if not isinstance(source, str | Path):
        fail("model", "a local folder", type(source).__name__)
    source, out = Path(source), check_output(out, overwrite)
    if out.resolve() in source.resolve().parents:
        fail("out", "a folder that does not hold the model to read", out)
    with checkpoint.told(str(source)):
        check_folder(source, every=True)
    files, skeleton = _files(source), _skeleton(source)
    if "auto_map" in read_json(source / _TOKENIZER) and _tokenizer(source, needed=False) is None:
        fail("model", "a tokenizer that needs no code of its own", repr(str(source)))
    config = resolved(skeleton, config, preset, keep, changes)
    plans = plan_layers(skeleton.config, config)
    tokenizer = None
    if any(plan.fitted or plan.recalls or plan.mixed for plan in plans):
        tokenizer = _tokenizer(source, needed=calibration is None)
    if calibration is None and tokenizer is not None:
        calibration = _standard_rows(tokenizer)
    if calibration is not None:
        check_calibration(calibration, skeleton.config.vocab_size)
    with written_whole(out, overwrite) as part, tempfile.TemporaryDirectory(dir=part) as scratch:
        written, size = _copy(source, files, part, skeleton)
        model = _open(source, files, skeleton, scratch)
        limit = max(path.stat().st_size for path in written) // 2
        for tensors in _pieces(_new_tensors(model, plans, calibration, tokenizer), limit):
            path = part / f"{len(written)}.part"
            save_file(tensors, path, metadata={"format": "pt"})
            size += sum(tensor.nbytes for tensor in tensors.values())
            written[path] = list(tensors)
        _name(written, size)
        _copy_others(source, part)
        linearized_config(model, config).save_pretrained(part)
    return out


def _files(folder: Path) -> dict[str, list[str]]:
    """The files of weights in a folder, in order, and the names of the tensors in each."""
    single, index = folder / _SINGLE, folder / _INDEX
    if not (folder / "config.json").is_file():
        fail("model", "a local folder with a config.json", repr(str(folder)))
    if (folder / "adapter_config.json").exists():
        fail("model", "no adapters, which are to be merged first", f"some in {str(folder)!r}")
    try:
        if single.is_file():
            with safe_open(single, "pt") as file:
                return {_SINGLE: list(file.keys())}
        if not index.is_file():
            raise ValueError(f"model: expected {_SINGLE} or {_INDEX} in {folder}, found neither")
        files = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, []).append(name)
        for file, names in files.items():
            if not (folder / file).is_file():
                raise ValueError(f"model: expected every file of {index.name}, found no {file} in {folder}")
            with safe_open(folder / file, "pt") as opened:
                if missing := set(names) - set(opened.keys()):
                    raise ValueError(f"model: expected {min(missing)} in {folder / file}, as {index.name} says")
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model: could not read the weights in {folder}: {error}") from error
    return dict(sorted(files.items()))


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model in a folder without its weights."""
    with checkpoint.told(str(folder)), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_config(config)
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        fail("model", "weights that are not quantized", repr(str(folder)))
    return skeleton


def _copy(
    source: Path, files: dict[str, list[str]], part: Path, skeleton: PreTrainedModel
) -> tuple[dict[Path, list[str]], int]:
    """Copies of the files of weights, with the names in each, and the bytes of all tensors together."""
    shapes = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    written, size = {}, 0
    for file, names in tqdm(files.items(), desc="Copying weights", leave=False):
        path = part / f"{len(written)}.part"
        shutil.copyfile(source / file, path)
        size += _check(path, names, shapes)
        written[path] = names
    return written, size


def _copy_others(source: Path, part: Path) -> None:
    """Whatever lies beside weights goes along, but for code and the names of it."""
    templates = [*(source / CHAT_TEMPLATE_DIR).glob("*.jinja")]
    if templates:
        (part / CHAT_TEMPLATE_DIR).mkdir()
    for path in (*source.iterdir(), *templates):
        if path.is_file() and path.suffix not in _LEFT and not path.name.endswith(".index.json"):
            shutil.copyfile(path, part / path.relative_to(source))
    settings = read_json(part / _TOKENIZER)
    if settings.pop("auto_map", None) is not None:
        write_json(part / _TOKENIZER, settings)


def _open(folder: Path, files: dict[str, list[str]], skeleton: PreTrainedModel, scratch: str) -> PreTrainedModel:
    """The model in a folder with its weights left there: each is read when its module runs, then dropped.

    If they lie in files otherwise than in memory, as experts do, they are rewritten into the folder scratch.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options: dict[str, Any] = dict(device_map=_places(skeleton), offload_folder=scratch)
    with _quiet("accelerate.big_modeling"):
        if get_checkpoint_conversion_mapping(config.model_type) is None:
            return checkpoint.open_weights(str(folder), str(folder), dtype="auto", **options)
        # Read, not mapped: transformers keeps all files open, and what has been mapped stays in memory until then.
        state = {}
        for file, names in files.items():
            opened = safe_open(folder / file, "pt", backend="pread")
            state |= {name: opened.get_slice(name) for name in names}
        dtype = config.dtype or next(iter(state.values()))[...].dtype
        options |= dict(config=config, state_dict=state, dtype=dtype)
        model = checkpoint.open_weights(str(folder), None, type(skeleton), **options)
        # Under which its tokenizer is looked for: it would be asked of the hub as "None".
        model.config.name_or_path = model.name_or_path = str(folder)
        return model


def _places(skeleton: PreTrainedModel) -> dict[str, str]:
    """Where each part of a model is to lie: on the disk what is large, in memory all else."""
    ends = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    large, places = {*ends, Decoder(skeleton).layers}, {}
    for name, module in skeleton.named_modules():
        if any(name.startswith(f"{place}.") for place in places):
            continue
        if module in large:
            places[name] = "disk"
        elif not large.intersection(module.modules()):
            places[name] = "cpu"
    return places


@contextmanager
def _quiet(name: str):
    """A logger that says errors only: weights that lie on a disk are no news here."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check(path: Path, names: list[str], shapes: dict[str, list[int]]) -> int:
    """Bytes of the tensors in a file; ValueError for one of another shape, or one that holds NaN or infinity."""
    size = 0
    for name in names:
        with safe_open(path, "pt") as file:
            shape = file.get_slice(name).get_shape()
        if shape != shapes.get(name, shape):
            fail(name, f"shape {shapes[name]}", shape)
        step = max(1, _PIECE // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0] if shape else 1, step):
            # Opened again for each piece: what has been read stays in memory until a file is closed.
            with safe_open(path, "pt") as file:
                piece = file.get_slice(name)[start : start + step] if shape else file.get_tensor(name)
            if name in shapes and piece.dtype not in FLOATS:
                fail(name, f"one of {', '.join(str(x) for x in FLOATS)}", piece.dtype)
            if piece.is_floating_point() and not piece.isfinite().all():
                fail(name, "finite values", "NaN or infinity")
            size += piece.nbytes
    return size


def _tokenizer(folder: Path, needed: bool) -> PreTrainedTokenizerBase | None:
    try:
        with checkpoint.told(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            check_tokenizer(tokenizer)
    except ValueError as error:
        if not needed:
            return None
        raise ValueError(f"calibration: expected token ids, or a tokenizer in {folder} to read text with") from error
    return tokenizer


def _standard_rows(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [_ROWS,_LENGTH] from all over the standard text."""
    blocks = to_blocks(tokenizer, standard_text()[0], _LENGTH)
    return blocks[:: max(1, len(blocks) // _ROWS)][:_ROWS]


def _new_tensors(
    model: PreTrainedModel, plans: Iterable[LayerPlan], calibration: torch.Tensor | None, tokenizer: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of everything that linearizing adds to a model whose weights lie on a disk, layer by layer."""
    decoder = Decoder(model)
    for index, attention in converted(model, plans, calibration, tokenizer):
        found = attention.state_dict()
        for key in found.keys() - decoder.attention(index).state_dict().keys():
            yield f"{decoder.where(index)}.{key}", found[key].detach().clone().contiguous()


def _pieces(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in groups that hold no more bytes than limit, or one tensor alone."""
    group, size = {}, 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    if group:
        yield group


def _name(written: dict[Path, list[str]], size: int) -> None:
    """Give files of weights their names in a sharded checkpoint, and write its index."""
    weight_map = {}
    for number, (path, names) in enumerate(written.items(), 1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(path.with_name(name))
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    path.with_name(_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
