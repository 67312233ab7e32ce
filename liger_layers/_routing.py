"""Which memory a token goes to: top-k routing, and the order that lets one op run every memory as a sequence.

Shapes: B batch, T time, D documents, M memories, R memories per token, E = B * T * R entries, N sequences. An entry is
a pair of a token and one of its memories.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn


class Routing(nn.Module):
    """A layer that sends tokens to memories: the names of its `routers`, whose logits it gives, and of all parts that
    learn as a whole when they learn; a part may be None."""

    routers: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


def router_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of every router of memories in a model."""
    for layer in model.modules():
        if isinstance(layer, Routing):
            for part in layer.routers:
                router = getattr(layer, part)
                yield from () if router is None else router.parameters()


def routing_modules(model: nn.Module) -> set[str]:
    """What decides about memories in a model, as the last two parts of modules' names."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Routing))
    found = ((name, part) for name, layer in layers for part in layer.whole if getattr(layer, part) is not None)
    return {f"{name.rpartition('.')[2]}.{part}" for name, part in found}


def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [...,M] -> weights in float32 that sum to 1 and distinct memories, both [...,top_k]."""
    weights, chosen = _probabilities(logits).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), chosen


def choose(
    router: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    top_k: int,
    router_logits: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` by a router of x [B,T,hidden], weights and memories [B,T,top_k]; its logits [B*T,M] join the list."""
    logits = router(x.flatten(0, 1))
    if router_logits is not None:
        router_logits.append(logits)
    return route(logits.view(*x.shape[:2], logits.shape[-1]), top_k)


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Dispatch(NamedTuple):
    """Entries sorted by sequence and memory, in time order within each; those of padding come last.

    order [E] is the entry at each place, inverse [E] the place of each entry, rows [E] the place's row among tokens
    times memories. cu_seqlens [N+1] bounds (B or D) * M sequences and one last for padding. mask [B,T] or None.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    rows: torch.Tensor
    cu_seqlens: torch.Tensor
    mask: torch.Tensor | None
    entries: tuple[int, int, int]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,...] -> [1,E,...], every token once for each of its memories."""
        # A row may be taken once only: a gradient that collects several has no fixed order on a GPU.
        x = x.unsqueeze(2).expand(*self.entries, *x.shape[2:])
        return x.flatten(0, 2).index_select(0, self.order).unsqueeze(0)

    def gather_chosen(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,M,...] -> [1,E,...], what each memory made of its tokens."""
        return x.flatten(0, 2).index_select(0, self.rows).unsqueeze(0)

    def scatter(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """y [1,E,...] and weights [B,T,R] -> sums over memories [B,T,...] in the dtype of weights, 0 at padding."""
        y = y.squeeze(0).index_select(0, self.inverse).unflatten(0, self.entries)
        return _weighted(y, weights, self.mask)

    def before(self, state: torch.Tensor) -> torch.Tensor:
        """state [B or D,M,...] -> [N,...]: one row more, for padding."""
        state = state.flatten(0, 1)
        return torch.cat([state, state.new_zeros(1, *state.shape[1:])])

    def after(self, state: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """state as in `before` and what became of it [N,...] -> the next state [B or D,M,...]."""
        return last[:-1].view_as(state).clone()


class OneToken(NamedTuple):
    """Dispatch of a single token per row: nothing to sort, each entry is a row of its own, [E,1,...].

    chosen [B,R]; rows [E] are those of the chosen memories among B * M; mask [B,1] or None.
    """

    chosen: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor | None
    cu_seqlens: None = None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,1,...] -> [E,1,...]."""
        return x.expand(-1, self.chosen.shape[1], *x.shape[2:]).flatten(0, 1).unsqueeze(1)

    def gather_chosen(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,1,M,...] -> [E,1,...]."""
        return x.flatten(0, 2).index_select(0, self.rows).unsqueeze(1)

    def scatter(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """y [E,1,...] and weights [B,1,R] -> [B,1,...]."""
        return _weighted(y.view(*weights.shape, *y.shape[2:]), weights, self.mask)

    def before(self, state: torch.Tensor) -> torch.Tensor:
        """state [B,M,...] -> [E,...], the chosen memories."""
        return state.flatten(0, 1).index_select(0, self.rows)

    def after(self, state: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """state [B,M,...] with the chosen memories as they became, [E,...]; at padding they stay."""
        if self.mask is not None:
            real = self.mask.expand_as(self.chosen).flatten()
            last = torch.where(_behind(real, last), last, self.before(state))
        return state.flatten(0, 1).index_copy(0, self.rows, last).view_as(state)


def one_token(chosen: torch.Tensor, memories: int, mask: torch.Tensor | None = None) -> OneToken:
    """chosen [B,1,R] as in `dispatch`."""
    chosen = chosen.squeeze(1)
    first = memories * torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
    return OneToken(chosen, (first + chosen).flatten(), mask)


def _weighted(y: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """y [B,T,R,...] and weights [B,T,R] -> sums over memories [B,T,...] in the dtype of weights, 0 at padding."""
    o = (y.to(weights.dtype) * _behind(weights, y)).sum(2)
    return o if mask is None else o.masked_fill(~_behind(mask, o), 0.0)


def _behind(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x with as many dimensions as `like`, the new ones last."""
    return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def dispatch(
    chosen: torch.Tensor, memories: int, mask: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None
) -> Dispatch:
    """Sort entries by (sequence, memory) on the device alone: nothing is read back to the host.

    chosen [B,T,R] holds memories below `memories`, distinct per token. mask [B,T] bool marks real tokens; cu_seqlens
    [D+1] bounds documents packed along time (batch 1), each with memories of its own.
    """
    (B, T, R), device = chosen.shape, chosen.device
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is None:
        sequence = torch.arange(B, device=device).view(B, 1, 1)
    else:
        time = torch.arange(T, device=device)
        sequence = torch.searchsorted(cu_seqlens[1:].to(time), time, right=True).view(1, T, 1)
    key = sequence * memories + chosen
    last = sequences * memories
    if mask is not None:
        key = key.masked_fill(~mask.unsqueeze(-1), last)
    key, order = key.flatten().sort(stable=True)
    places = torch.arange(B * T * R, device=device)
    inverse = torch.zeros_like(order).scatter(0, order, places)
    bounds = torch.searchsorted(key, torch.arange(last + 1, device=device))
    bounds = torch.cat([bounds, bounds.new_full((1,), B * T * R)])
    rows = order // max(R, 1) * memories + chosen.flatten().index_select(0, order)
    return Dispatch(order, inverse, rows, bounds, mask, (B, T, R))


def check_router_mask(mask: torch.Tensor | None, tokens: int) -> None:
    """mask marks as many tokens as the router saw."""
    if mask is not None and mask.numel() != tokens:
        raise ValueError(f"mask: expected {tokens} tokens as in router_logits, got {tuple(mask.shape)}")


def memory_load(logits: torch.Tensor, top_k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """logits [tokens,M] -> fraction of real tokens sent to each memory, [M] in float32: they sum to top_k."""
    chosen = route(logits, top_k)[1]
    sent = (chosen.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)).any(-2)
    return _mean(sent, mask)


def _mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over real tokens of x [tokens,M]; 0 where there are none."""
    real = torch.ones_like(x[:, :1], dtype=torch.float32) if mask is None else mask.reshape(-1, 1).float()
    return (x * real).sum(0) / real.sum().clamp(min=1.0)


def load_balancing_loss(
    router_logits: torch.Tensor | Sequence[torch.Tensor], top_k: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """M sum_m f_m p_m: the fraction of tokens that go to a memory times its mean probability.

    The auxiliary loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) for top_k choices, in the scale that
    transformers uses: an even router scores top_k. Of several layers, of memories or of experts, it is the mean:
    every layer has to spread its tokens. transformers pools the layers first, where one may starve what another feeds.
    Without real tokens it is 0.

    Args:
        router_logits: [tokens,M] of one layer, or a list or tuple of layers.
        top_k: memories per token.
        mask: [B,T] or [tokens], true or 1 at real tokens, of one layer.

    Returns:
        A scalar in float32, or float64 as the logits.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    layers = [router_logits] if isinstance(router_logits, torch.Tensor) else list(router_logits)
    if not layers or any(x.ndim != 2 or x.shape != layers[0].shape for x in layers):
        given = [tuple(x.shape) for x in layers]
        raise ValueError(f"router_logits: expected [tokens, memories] of one or more layers, got {given}")
    tokens, memories = layers[0].shape
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= memories:
        raise ValueError(f"top_k: expected a number from 1 to {memories} memories, got {top_k!r}")
    check_router_mask(mask, tokens)
    losses = [_balance(x, top_k, None if mask is None else mask.to(x.device)) for x in layers]
    # The layers of one model may lie on several devices.
    return torch.stack([x.to(layers[0].device) for x in losses]).mean()


def _balance(logits: torch.Tensor, top_k: int, mask: torch.Tensor | None) -> torch.Tensor:
    return logits.shape[-1] * (memory_load(logits, top_k, mask) * _mean(_probabilities(logits), mask)).sum()
