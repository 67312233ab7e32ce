"""Second moments of a pretrained model's queries and keys, on text that the model draws from itself.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from liger_models._decoder import Decoder
from liger_models._inputs import input_device
from liger_models.families import project, traits
from liger_models.generation import continued, without_settings
from liger_ops.errors import fail

# A rotary channel counts as slow when it turns by less than a radian over this many tokens.
_REACH = 512
# The first tokens are attention sinks, whose keys are unlike all others.
_SKIP = 8
# Tokens in a forward pass: weights that lie on a disk are read once for each.
AT_ONCE = 2048


class _Bar(BaseStreamer):
    """A progress bar that moves with every generated token."""

    def __init__(self, tokens: int):
        self.bar = tqdm(total=tokens, desc="Drawing calibration text", leave=False)

    def put(self, value) -> None:
        self.bar.update()

    def end(self) -> None:
        self.bar.close()


def check_calibration(ids: torch.Tensor, vocabulary: int) -> None:
    """ValueError unless ids are token ids [rows, length] with enough behind the attention sinks to measure."""
    wanted = f"token ids [rows, length] with length > {_SKIP} and rows * (length - {_SKIP}) >= 2"
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        fail("calibration", wanted, given)
    if len(ids) * (ids.shape[1] - _SKIP) < 2:
        fail("calibration", wanted, tuple(ids.shape))
    if ids.min() < 0 or ids.max() >= vocabulary:
        fail("calibration", f"ids from 0 to {vocabulary - 1}", f"{int(ids.min())} to {int(ids.max())}")


@torch.no_grad()
def draw_text(model: PreTrainedModel, batch: int = 8, length: int = 256) -> torch.Tensor:
    """Token ids [batch, length] that the model samples from itself; the same every time."""
    device = input_device(model)
    start = model.config.bos_token_id
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if isinstance(start, int) and 0 <= start < model.config.vocab_size:
            first = torch.full((batch, 1), start)
        else:
            first = torch.randint(model.config.vocab_size, (batch, 1))
        return continued(
            without_settings(model),
            first.to(device),
            streamer=_Bar(length),
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                eos_token_id=model.generation_config.eos_token_id,
                pad_token_id=0,
            ),
        )


class Moments(NamedTuple):
    """Of a layer's unrotated queries, pooled over each group, and of its keys: means [H,D] and covariances [H,D,D]."""

    query_mean: torch.Tensor
    query_covariance: torch.Tensor
    key_mean: torch.Tensor
    key_covariance: torch.Tensor


class _Running:
    """Running mean and covariance per head."""

    def __init__(self, heads: int, width: int):
        self.heads, self.width, self.count = heads, width, 0
        self.sum = torch.zeros(heads, width, dtype=torch.float64)
        self.square = torch.zeros(heads, width, width, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """x [B,T,heads or a multiple,width]."""
        x = x[:, _SKIP:].unflatten(2, (self.heads, -1)).movedim(2, 0).reshape(self.heads, -1, self.width).float()
        self.count += x.shape[1]
        self.sum += x.sum(1).double().cpu()
        self.square += (x.transpose(1, 2) @ x).double().cpu()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.sum / self.count
        return mean, self.square / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)


@torch.no_grad()
def measure(model: PreTrainedModel, ids: torch.Tensor, layers: list[int]) -> dict[int, Moments]:
    """The moments of layers by index, over one pass of token ids [rows, length]."""
    found = {}
    for index in layers:
        own = traits(Decoder(model).attention(index), model.config)
        found[index] = tuple(_Running(own.kv_heads, own.width) for _ in range(2))

    def look(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Any) -> None:
        for moments, part in zip(found[index], (q, k), strict=True):
            moments.add(part)

    at_once = ids.split(max(1, AT_ONCE // ids.shape[1]))
    look_into(model, at_once, layers, look, "Measuring queries and keys")
    return {index: Moments(*q.result(), *k.result()) for index, (q, k) in found.items()}


def look_into(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], layers: Iterable[int], look: Callable[..., None], name: str
) -> None:
    """look(index, q, k, v, tables) on unrotated queries, keys and values of layers, for token ids [rows,length] each.

    tables are the cos and sin of positions as the decoder hands them on, or None. name is what a progress bar says.
    """
    decoder, hooks = Decoder(model), []
    for index in layers:
        attention = decoder.attention(index)
        own = traits(attention, model.config)

        def projected(module, args, kwargs, index=index, own=own):
            x = args[0] if args else kwargs["hidden_states"]
            look(index, *project(module, x, own), kwargs.get("position_embeddings") if own.rotary else None)

        hooks.append(attention.register_forward_pre_hook(projected, with_kwargs=True))
    device = input_device(model)
    if device.type == "meta":
        # Weights that lie on a disk are read into ordinary memory.
        device = torch.device("cpu")
    try:
        for rows in tqdm(batches, desc=name, leave=False):
            decoder.module(rows.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def slow_channels(frequencies: torch.Tensor, width: int) -> torch.Tensor:
    """[D] bool: channels whose rotary angle, of these frequencies, stays below one radian over _REACH tokens."""
    slow = (frequencies.detach().float().cpu() * _REACH < 1).repeat(2)
    slow = torch.cat([slow, torch.ones(width - len(slow), dtype=torch.bool)])
    return slow if slow.any() else torch.ones(width, dtype=torch.bool)
