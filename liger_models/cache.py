"""A constant-size cache layer inside transformers' own DynamicCache.

Shapes: B batch, T columns at hand, S columns seen before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig

from liger_layers import LigerState, MemoryState
from liger_layers.calls import told_mixes
from liger_models._cache_layer import LigerCacheLayer as LigerCacheLayer
from liger_models._inputs import (
    CACHE,
    Account,
    find_documents,
    read_mask,
    read_positions,
    require,
    shown_columns,
)
from liger_models._rollback import Past
from liger_models._weights import name_of_weights
from liger_ops.documents import Documents
from liger_ops.errors import check_positive, fail

_CACHES = ("cache", "past_key_values")
AnyCache = TypeVar("AnyCache", bound=Cache)


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Remove the cache from keyword arguments, whichever of its two names it has, and return it.

    ValueError for two caches, or for one under a name that nobody reads.
    """
    given = [kwargs.pop(name, None) for name in _CACHES]
    if given[0] is not None and given[1] is not None and given[0] is not given[1]:
        fail(CACHE, "one cache", f"two, under the names {' and '.join(_CACHES)}")
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            fail(name, f"a cache under the name {CACHE}", "one under a name that is not read")
    return given[0] if given[0] is not None else given[1]


def layer_and_state(
    cache: Cache | None, index: int, device: torch.device
) -> tuple[LigerCacheLayer | None, LigerState | MemoryState | None]:
    """The cache's layer, if there is a cache, and what it holds, if anything, on the device."""
    layer = None if cache is None else cast(LigerCacheLayer, cache.layers[index])
    if layer is None or layer.state is None:
        return layer, None
    held = layer.state.position if isinstance(layer.state, LigerState) else layer.state.memories[0]
    # Offloading leaves a state elsewhere.
    return layer, layer.state if held.device == device else layer.state.map(lambda x: x.to(device))


def make_cache(config: PreTrainedConfig, rollback: int | None = None) -> DynamicCache:
    """An empty cache for a model of this package: constant-size layers, growing ones where full attention was kept.

    rollback: how many of the last tokens that it was given `cache.crop(-n)` can take back, as if they had never been.
    The cache then holds up to two states more, and what each layer was given of fewer than four times as many tokens;
    None holds nothing and refuses. ValueError for a number below 1.
    """
    if rollback is not None:
        check_positive("rollback", rollback)
    cache = fit_cache(DynamicCache(config=config), config)
    if rollback is not None:
        for layer in cast("list[Any]", cache.layers):
            if isinstance(layer, LigerCacheLayer):
                layer.past = Past(rollback)
            elif hasattr(layer, "activate_past_recording"):
                # Of transformers, whose windows forget too.
                layer.activate_past_recording()
    return cache


# What decides about the states of a model's layers.
_TOLD = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_TOLD += ("sliding_window", "mixers", "mixer_options", "memories", "memories_per_token", "conv_size")


def _told(config: PreTrainedConfig) -> dict[str, Any]:
    told = {name: getattr(config, name, None) for name in _TOLD} | (getattr(config, "liger", None) or {})
    told.pop("router_aux_loss_coef", None)
    return told


def fit_cache(cache: AnyCache, config: PreTrainedConfig, batch: int | None = None) -> AnyCache:
    """Put Liger layers where an empty cache, however it was made, has others.

    ValueError if it already holds tokens: of a model that keeps keys and values, of one that was told something else
    than config says, or of another number of rows than batch.
    """
    if not isinstance(cache, Cache):
        fail(CACHE, "a Cache", f"a {type(cache).__name__}")
    # Only linearized models keep layers of full attention.
    depth, keep = config.num_hidden_layers, set(config.liger["keep"]) if hasattr(config, "liger") else set()
    if not isinstance(getattr(cache, "layers", None), list):
        fail(CACHE, "a DynamicCache", f"a {type(cache).__name__}")
    ours, filled = [isinstance(layer, LigerCacheLayer) for layer in cache.layers], _first(cache)
    if filled is not None:
        _check_filled(cache, filled, config, batch)
    if len(ours) == depth and all(mine or i in keep for i, mine in enumerate(ours)):
        return cache
    if any(layer.is_initialized for layer in cast("list[Any]", cache.layers)):
        expected = "an empty cache or one this linearized model filled (liger_models.make_cache)"
        fail(CACHE, expected, "one that holds another model's keys and values")
    if not isinstance(cache, DynamicCache):
        fail(CACHE, "a DynamicCache", f"a {type(cache).__name__}")
    plain = cache.layers if len(ours) == depth else DynamicCache(config=config).layers
    cache.layers = [plain[i] if i in keep else LigerCacheLayer() for i in range(depth)]
    cache.layer_class_to_replicate = None
    # As a tuple beside them, from which copies know their own.
    cache.liger_layers = tuple(cache.layers)  # type: ignore[attr-defined]
    if first := _first(cache):
        first.told = _told(config)
    return cache


def _first(cache: Cache | None) -> LigerCacheLayer | None:
    """The layer that keeps account, if there is one."""
    layers = getattr(cache, "layers", ())
    return next((x for x in layers if isinstance(x, LigerCacheLayer)), None)


def _check_filled(cache: Cache, first: LigerCacheLayer, config: PreTrainedConfig, batch: int | None) -> None:
    mine = _told(config)
    if first.told is not None and first.told != mine:
        names = [name for name in (*mine, *first.told) if mine.get(name) != first.told.get(name)]
        wanted, given = mine.get(names[0]), first.told.get(names[0])
        fail(CACHE, f"one of a model with {names[0]} {wanted!r}", f"one with {given!r}")
    if batch is not None and first.account is not None and len(first.account.columns) != batch:
        fail(CACHE, f"{batch} rows as in the batch", len(first.account.columns))
    if first.account is not None and first.account.columns.is_meta:
        fail(CACHE, "one that holds data", "one on the meta device")
    placed = getattr(cache, "liger_layers", ())
    if len(placed) != len(cache.layers) or any(x is not y for x, y in zip(placed, cache.layers, strict=True)):
        fail(CACHE, "the layers that the model put there, in their order", "others")
    # Their classes in transformers share no attribute.
    seen = {first.ended, *(layer.get_seq_length() for layer in cast("list[Any]", cache.layers))}
    if len(seen) > 1:
        fail(CACHE, "layers that have seen as much", f"{sorted(seen)}: a call was cut short")


def check_source(cache: Cache | None, decoder: nn.Module, tokens: int) -> None:
    """ValueError if a cache was filled with other weights than the decoder's, or while its mixes were told others."""
    first = _first(cache)
    # A graph has no weights of its own to ask for.
    if first is None or torch.compiler.is_compiling():
        return
    # One token alone is decoding, where modules stay.
    source = name_of_weights(decoder, tokens > 1), told_mixes(decoder)
    if not first.seen:
        first.source = source
    elif first.source is not None and first.source != source:
        expected = "the same weights" if first.source[0] != source[0] else "the same parts switched off"
        fail(CACHE, f"one that was filled with {expected}", "one of others")


def end_call(cache: Cache | None) -> None:
    """Note that a call has ended well, as far as the decoder goes."""
    if (first := _first(cache)) is not None:
        first.ended = first.seen


_AnyCall = TypeVar("_AnyCall", bound=Callable[..., Any])


def one_at_a_time(forward: _AnyCall) -> _AnyCall:
    """A forward whose cache no other call may use meanwhile, nor any call after it, if it fails on the way.

    ValueError for a cache that a call of another thread is filling.
    """

    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        if cache is None or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        mine = object()
        # In one step, between which no other thread comes.
        if vars(cache).setdefault("liger_call", mine) is not mine:
            fail(CACHE, "one that no other call is filling", "one that another thread uses")
        ended = getattr(_first(cache), "ended", 0)
        try:
            return forward(self, *args, **kwargs)
        except BaseException:
            if (first := _first(cache)) is not None:
                first.ended = ended
            raise
        finally:
            vars(cache).pop("liger_call")

    return cast(_AnyCall, call)


def seen_columns(cache: Cache | None) -> int:
    """Columns, padding included, that a cache holds."""
    first = _first(cache)
    return first.seen if first is not None else cache.get_seq_length() if cache is not None else 0


class Call(NamedTuple):
    """What a call says of its tokens.

    mask [B,S+T], and shown [B,T] of the columns at hand, are None where they are known to show everything; position is
    as given; documents are those that share rows, None where none do.
    """

    mask: torch.Tensor | None
    shown: torch.Tensor | None
    position: torch.Tensor | None
    documents: Documents | None


def read_call(
    cache: Cache | None, tokens: torch.Tensor, mask: object, position: object, others: Mapping[str, Any]
) -> Call:
    """What a call says, checked. tokens [B,T,...] are ids or embeddings; mask, position and others as given.

    ValueError for several documents in a row beside a cache, which has one state a row.
    """
    (B, T), seen = tokens.shape[:2], seen_columns(cache)
    known = read_mask(mask, B, T, seen, tokens.device)
    positions = read_positions(position, B, T)
    shown = shown_columns(known, seen)
    documents = find_documents(positions, shown, others, (B, T), tokens.device)
    if documents is not None and cache is not None:
        fail(CACHE, "none beside several documents in a row", f"a {type(cache).__name__}")
    return Call(known, shown, positions, documents)


def admit(cache: Cache | None, call: Call, ids: torch.Tensor | None, shape: tuple[int, int]) -> None:
    """Enter the columns of a call of a shape (B, T) into the cache's account; ids [B,T], None for embeddings."""
    _check_onward(cache, call.position, call.shown)
    _take_in(cache, call.mask, ids, shape)


def _check_onward(cache: Cache | None, position: torch.Tensor | None, shown: torch.Tensor | None) -> None:
    """ValueError if positions start again behind what a cache holds: the next document would enter its states."""
    state = getattr(_first(cache), "state", None)
    if position is None or position.ndim != 2 or not isinstance(state, LigerState):
        return
    onward = position >= state.position.to(position.device).unsqueeze(1)
    onward = onward if shown is None else onward | ~shown
    require(onward.all(), "position_ids", "positions behind the tokens in the cache", "some that start again")


def _take_in(cache: Cache | None, mask: torch.Tensor | None, ids: torch.Tensor | None, shape: tuple[int, int]) -> None:
    """Check that mask [B,S+T] shows of the first S columns what the cache holds, and enter the T at hand.

    ids [B,T] are their tokens, None where embeddings were given; shape is (B, T). ValueError for a mask that hides
    what a state has taken in, or shows what it has not: neither can be made up for.
    """
    first, (B, T) = _first(cache), shape
    if first is None:
        return
    device = mask.device if mask is not None else ids.device if ids is not None else torch.device("cpu")
    account, S = first.account or Account.empty(B, device), first.seen
    tracing = torch.compiler.is_compiling()
    if S and (tracing or not first.whole or (mask is not None and not mask[:, :S].all())):
        shown = torch.ones(B, S, dtype=torch.bool, device=device) if mask is None else mask[:, :S]
        held = Account.empty(B, device).add(0, shown, None).columns
        expected = "the columns that the cache holds shown or hidden as they were when it took them in"
        same = (held == account.columns.to(device)).all()
        require(same, "attention_mask", expected, lambda: _difference(mask, first))
    shown = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask[:, S:]
    ids = None if ids is None else ids.to(device)
    after = account.add(S, shown, ids)
    if first.past is not None:
        first.remember(shown, ids)
    first.pending = after, first.whole and not tracing and (mask is None or bool(shown.all()))


def _difference(mask: torch.Tensor | None, first: LigerCacheLayer) -> str:
    """How a mask differs from what a cache holds, in the words of an error."""
    if mask is None or not isinstance(first.state, LigerState):
        return "others" if mask is not None else "none, which shows all of them"
    held, given = first.state.position.tolist(), mask[:, : first.seen].sum(1).tolist()
    row = next((i for i, pair in enumerate(zip(held, given, strict=True)) if pair[0] != pair[1]), None)
    return "others" if row is None else f"{given[row]} shown in row {row}, where it took in {held[row]}"


def check_prompt(cache: Cache | None, ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """ValueError if ids [B,S+T], with mask of that shape or None, do not begin with the tokens that the cache holds."""
    first = _first(cache)
    if first is None or first.account is None or first.account.tokens is None or ids is None:
        return
    if not first.seen or len(ids) != len(first.account.tokens):
        return
    if ids.shape[1] <= first.seen:
        fail("input_ids", f"more than the {first.seen} columns in the cache", ids.shape[1])
    ids = ids[:, : first.seen]
    shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, : first.seen].bool()
    held = Account.empty(len(ids), ids.device).add(0, shown, ids)
    told = first.account.map(lambda x: x.to(ids.device))
    # Where the mask differs, that is what is wrong, and the forward says so.
    if torch.equal(held.columns, told.columns) and not _same(held.tokens, told.tokens):
        fail(CACHE, "one that holds the beginning of input_ids", "one of another prompt")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes held by all layers of a cache, linearized or not."""
    total = 0
    for layer in cast("list[Any]", cache.layers):
        if isinstance(layer, LigerCacheLayer):
            total += layer.nbytes()
        elif layer.is_initialized:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
