"""A constant-size cache layer inside transformers' own DynamicCache.

Shapes: B batch.
"""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from liger_layers import LigerState, MemoryState


class LigerCacheLayer(CacheLayerMixin):
    """One layer's state and the number of columns, padding included, that it has seen."""

    # Kept layers may slide or not, and masks take their size from the first layer of their own kind.
    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: LigerState | MemoryState | None = None
        self.seen = 0

    def store(self, state: LigerState | MemoryState, tokens: int) -> None:
        self.state = state.map(torch.Tensor.detach) if not torch.is_grad_enabled() else state
        self.seen += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None:
        raise RuntimeError("a Liger layer keeps a state, not keys and values: it is filled by its own attention")

    update = lazy_initialization

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a linearized model's cache cannot forget tokens it has already absorbed; start a new cache")

    def _map(self, function) -> None:
        if self.state is not None:
            self.state = self.state.map(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """The layer moves its state to its own device when it reads it."""

    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes()


def layer_and_state(
    cache: Cache | None, index: int, device: torch.device
) -> tuple[LigerCacheLayer | None, LigerState | MemoryState | None]:
    """The cache's layer, if there is a cache, and what it holds, if anything, on the device."""
    layer = None if cache is None else cache.layers[index]
    state = None if layer is None or layer.state is None else layer.state.map(lambda x: x.to(device))
    return layer, state


def make_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model of this package: constant-size layers, growing ones where full attention was kept."""
    return fit_cache(DynamicCache(config=config), config)


def fit_cache(cache: DynamicCache, config: PreTrainedConfig) -> DynamicCache:
    """Put Liger layers where an empty cache, however it was made, has others; ValueError if it already holds tokens."""
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values: expected a Cache, got a {type(cache).__name__}")
    # Only linearized models keep layers of full attention.
    depth, keep = config.num_hidden_layers, set(config.liger["keep"]) if hasattr(config, "liger") else set()
    ours = [isinstance(layer, LigerCacheLayer) for layer in cache.layers]
    if len(ours) == depth and all(mine or i in keep for i, mine in enumerate(ours)):
        return cache
    if any(layer.is_initialized for layer in cache.layers):
        raise ValueError(
            "past_key_values: expected an empty cache or one this linearized model filled (liger_models.make_cache), "
            "got one that holds another model's keys and values"
        )
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"past_key_values: expected a DynamicCache, got a {type(cache).__name__}")
    plain = cache.layers if len(ours) == depth else DynamicCache(config=config).layers
    cache.layers = [plain[i] if i in keep else LigerCacheLayer() for i in range(depth)]
    cache.layer_class_to_replicate = None
    return cache


class ConstantCacheMixin:
    """How a causal LM whose layers hold states, not keys and values, generates."""

    # Assisted decoding must roll the cache back, which a recurrent state cannot do; transformers refuses on this flag.
    _is_stateful = True

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = make_cache(self.config)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values=None, **kwargs):
        return attention_mask


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes held by all layers of a cache, linearized or not."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, LigerCacheLayer):
            total += layer.nbytes()
        elif layer.is_initialized:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
