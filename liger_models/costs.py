"""What models cost side by side: prefill, decoding and cache, measured in turns, so that a busy machine favours none.

Shapes: T time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from liger_models._inputs import CACHE, input_device
from liger_models.cache import cache_bytes, make_cache
from liger_models.modeling import LigerMixin
from liger_ops.errors import fail

# What is timed, in wall time, beside the processor time that all threads together took.
PROCESS = {"prefill_s": "prefill_process_s", "decode_ms": "decode_process_ms"}


@torch.no_grad()
def measure_costs(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    *,
    rounds: int = 3,
    seconds: float = 0.0,
    decode_tokens: int = 16,
    threads: int | None = 1,
) -> dict[str, list[dict]]:
    """For each model, a row a context length: what prefill and a decoded token take, and the bytes of cache they fill.

    The models take turns, A B B A A B ..., with every prefill and every decoded token, all on the same random tokens,
    so that whatever else the machine does meets all alike. Nothing is counted before each has run once.

    Args:
        models: name to model; with one name there are no turns to take.
        contexts: numbers of tokens of prefill.
        rounds: prefills of each model at each context, at least 2; each is followed by the decoding.
        seconds: go on with more rounds until this much time is spent at a context.
        decode_tokens: tokens that each model decodes after each prefill, at least 1.
        threads: of the processor while measuring; None leaves as many as there are. Several wait for each other at
            every operation, on a busy machine most of the time, and longest in the model that has the most operations.

    Returns:
        Rows with context, rounds, cache_bytes after the prefill, and median, low and high (the quartiles) of prefill_s
        and decode_ms (wall time) and of prefill_process_s and decode_process_ms (processor time of all threads).
    """
    if not models:
        fail("models", "at least one", "none")
    for name, value, least in (("rounds", rounds, 2), ("decode_tokens", decode_tokens, 1)):
        if value < least:
            fail(name, f"at least {least}", value)
    if not contexts or min(contexts) < 1:
        fail("contexts", "lengths of at least 1", list(contexts))
    if threads is not None and threads < 1:
        fail("threads", "at least 1 or None", threads)
    for model in models.values():
        model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (1, max(contexts) + decode_tokens), generator=generator)
    inputs = {name: ids.to(input_device(model)) for name, model in models.items()}
    rows = {name: [] for name in models}
    with with_threads(threads):
        _round(models, inputs, min(contexts), 1, list(models))
        for context in tqdm(contexts, desc="Measuring costs, in turns", leave=False):
            for name, row in _at(models, inputs, context, rounds, seconds, decode_tokens).items():
                rows[name].append(row)
    return rows


@contextmanager
def with_threads(number: int | None):
    """Torch on so many threads of the processor for a while; None changes nothing."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)


def compare(costs: Mapping[str, Sequence[dict]], one: str, other: str) -> list[dict]:
    """How many times the cost of the other one model has: a row a context, ratios of medians under the same names."""
    rows = []
    for a, b in zip(costs[one], costs[other], strict=True):
        rows.append({"context": a["context"], "cache_bytes": a["cache_bytes"] / b["cache_bytes"]})
        for key in (name for pair in PROCESS.items() for name in pair):
            rows[-1][key] = a[key]["median"] / b[key]["median"]
    return rows


def _at(models, inputs, context: int, rounds: int, seconds: float, decode_tokens: int) -> dict[str, dict]:
    """One row a model."""
    order, start, taken = list(models), _clock()[0], []
    while len(taken) < rounds or _clock()[0] - start < seconds:
        taken.append(_round(models, inputs, context, decode_tokens, order))
        order = order[::-1]
    rows = {}
    for name in models:
        rows[name] = {"context": context, "rounds": len(taken), "cache_bytes": taken[0][name]["cache_bytes"]}
        for key, scale in (("prefill_s", 1.0), ("decode_ms", 1e3)):
            wall, process = zip(*(pair for found in taken for pair in found[name][key]), strict=True)
            rows[name] |= {key: _spread(wall, scale), PROCESS[key]: _spread(process, scale)}
    return rows


def _round(models, inputs, context: int, decode_tokens: int, order: list[str]) -> dict[str, dict]:
    """One prefill and the decoding of each model in turn: pairs of (wall, processor) seconds, and bytes of cache."""
    found, caches = {}, {}
    for name in order:
        caches[name] = _empty_cache(models[name])
        taken = _timed(models[name], inputs[name][:, :context], caches[name])
        found[name] = {"prefill_s": [taken], "decode_ms": [], "cache_bytes": cache_bytes(caches[name])}
    for step in range(context, context + decode_tokens):
        for name in order:
            found[name]["decode_ms"].append(_timed(models[name], inputs[name][:, step : step + 1], caches[name]))
        order = order[::-1]
    return found


def _timed(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> tuple[float, float]:
    """(wall, processor) seconds of the model over ids [1,T] behind what the cache holds."""
    _wait(ids.device)
    wall, process = _clock()
    _forward(model, ids, cache)
    _wait(ids.device)
    end, process_end = _clock()
    return end - wall, process_end - process


def _forward(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> ModelOutput:
    """The model over ids [1,T] behind what the cache holds, which takes them in; logits of the last."""
    return model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)


def _empty_cache(model: PreTrainedModel) -> Cache:
    return make_cache(model.config) if isinstance(model, LigerMixin) else DynamicCache(config=model.config)


def _spread(values: Iterable[float], scale: float) -> dict[str, float]:
    low, median, high = statistics.quantiles([scale * v for v in values], n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _clock() -> tuple[float, float]:
    """Wall time, and processor time of all threads of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
