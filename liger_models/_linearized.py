"""What takes the place of a pretrained attention, and what the decoder around it hands on.

Shapes: B batch, T time, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from liger_layers import LigerAttention, LigerState, SlidingWindowAttention, calls
from liger_models._inputs import CACHE, by_name, token_positions
from liger_models._rollback import Given
from liger_models.cache import (
    admit,
    check_source,
    end_call,
    fit_cache,
    layer_and_state,
    make_cache,
    read_call,
    take_cache,
)
from liger_models.families import Projections, traits
from liger_ops.documents import Documents
from liger_ops.errors import fail

# What stands behind it is one layer or another.
_Layer = LigerAttention if TYPE_CHECKING else object


class _Pretrained(Projections, _Layer):
    """A layer of liger_layers on the modules of a pretrained attention, under their own names, with its signature."""

    layer_idx: int

    def __init__(self, old: nn.Module, hf: PreTrainedConfig, **options: Any):
        # Before the modules are there, which routed memories ask for their keys and values.
        self.traits = own = traits(old, hf)
        super().__init__(
            hf.hidden_size,
            own.heads,
            own.kv_heads,
            own.width,
            projections=dict(old.named_children()),
            scale=own.scale,
            softcap=own.softcap,
            rope_theta=None,
            **options,
        )
        self.layer_idx, self.training = cast(int, old.layer_idx), old.training
        pretrained = dict(old.named_children())
        for name, module in self.named_children():
            # Those of the pretrained attention are as they are to be.
            if name not in pretrained:
                module.to(cast(nn.Linear, old.o_proj).weight.device).train(old.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        liger_router_logits: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None and "liger_mask" not in kwargs:
            fail("attention_mask", "liger_mask beside it, as the decoder hands it on", "it alone")
        told = kwargs.get("liger_told")
        if told is not None and told is not calls.HERE.told:
            # Checkpointing computes again in a thread of autograd, which nobody has told anything.
            with calls.telling(told):
                given = hidden_states, position_embeddings, attention_mask, liger_router_logits
                return self.forward(*given, **{**kwargs, "liger_told": None})
        layer, state = layer_and_state(take_cache(kwargs), self.layer_idx, hidden_states.device)
        tables = position_embeddings if self.traits.rotary else None
        held = cast("LigerState | None", state)
        # The decoder's door has checked what it hands on.
        documents, mask = kwargs.get("liger_documents"), kwargs.get("liger_mask")
        if layer is not None and layer.past is not None:
            return layer.run(self._given, Given(hidden_states, tables, mask), held, liger_router_logits), None
        out, after = self.attend(hidden_states, mask, held, tables, liger_router_logits, documents)
        if layer is not None and after is not None:
            layer.store(after, hidden_states.shape[1])
        return out, None

    def _given(self, given: Given, state: LigerState | None, router_logits: list[torch.Tensor] | None):
        return self.attend(given.x, given.mask, state, cast(Any, given.tables), router_logits)


class LinearizedAttention(_Pretrained, LigerAttention):
    """Window and recurrence."""


class LinearizedWindow(_Pretrained, SlidingWindowAttention):
    """The window alone."""


def before_decoder(names: tuple[str, ...], module: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hand the padding mask to the Liger layers, spare them the square one, check mask, positions and cache."""
    kwargs = by_name(names, args, kwargs)
    cache, ids = take_cache(kwargs), kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    if tokens is None:
        # The decoder says what it wants.
        return (), kwargs
    use_cache = kwargs.get("use_cache")
    if cache is not None:
        fit_cache(cache, module.config, tokens.shape[0])
    call = read_call(cache, tokens, kwargs.get("attention_mask"), kwargs.get("position_ids"), kwargs)
    if call.documents is not None:
        kwargs |= _apart(call.documents, tokens, kwargs, len(module.config.liger["keep"]) > 0)
    elif cache is None and (module.training or (use_cache is None and calls.attends_in_full(module))):
        # Nobody reads a cache while training, and with gradient checkpointing none may be written.
        kwargs["use_cache"] = False
    elif cache is None and (module.config.use_cache if use_cache is None else use_cache):
        cache = make_cache(module.config)
    check_source(cache, module, tokens.shape[1])
    admit(cache, call, ids, tokens.shape[:2])
    # Those of documents are there.
    if call.mask is not None and kwargs.get("position_ids") is None:
        # Padding takes no position, wherever it stands.
        kwargs["position_ids"] = token_positions(call.mask, tokens.shape[1])
    kwargs |= {CACHE: cache, "liger_mask": call.shown}
    if not torch.compiler.is_compiling():
        kwargs["liger_told"] = calls.HERE.told
    if len(module.config.liger["keep"]) == 0:
        # A mask that is already four-dimensional is passed through, so no T x T mask is built for nobody.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    return (), kwargs


def _apart(documents: Documents, tokens: torch.Tensor, kwargs: dict, keep: bool) -> dict[str, Any]:
    """What tells the layers of a decoder of several documents in a row: linearized ones, and full attention."""
    if kwargs.get("use_cache"):
        fail("use_cache", "False beside several documents in a row, which a cache has one state for", True)
    given = kwargs.get("position_ids")
    position = documents.positions.view(tokens.shape[:2]) if given is None else given
    if documents.mask is not None and position.ndim == 2:
        if keep and any((rows.diff(dim=1) > 1).any() for rows in documents.groups):
            fail("attention_mask", "no padding inside a document beside layers of full attention", "some")
        # transformers parts documents by their positions, where there is no mask: padding is one by itself.
        position = position.expand(tokens.shape[:2]).masked_fill(~documents.mask.view(tokens.shape[:2]), 0)
    return dict(position_ids=position, use_cache=False, attention_mask=None, liger_documents=documents)


def after_decoder(module: PreTrainedModel, args: tuple, kwargs: dict, output: object) -> None:
    """The layers have seen what they were to see."""
    end_call(kwargs.get(CACHE))
