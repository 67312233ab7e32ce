"""Gates pooled from the key (Liger, arXiv 2503.01496, table 1), and the weight at which a head lets a recurrence in.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from liger_layers._told import HERE


class Gate(NamedTuple):
    """How a key, pooled, becomes a decay: no parameters of its own.

    per_channel keeps the key's width (pooling to K is the identity), otherwise the key is averaged to one number.
    log_decay maps the pooled key and tau to a log decay <= 0; None forgets nothing. strength maps the key, averaged to
    one number, to a write strength from 0 to 2: the memory then follows the delta rule, which erases what a key held.
    recurrence names the entry of RECURRENCES whose rule takes decay and strength; None is the plainest one that does.
    "hgrn2" writes under 1 - decay, "gsa" into as many slots as there are channels, all others under the key's features.
    """

    per_channel: bool
    log_decay: Callable[[torch.Tensor, float], torch.Tensor] | None
    strength: Callable[[torch.Tensor], torch.Tensor] | None = None
    recurrence: str | None = None


def sigmoid(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    return F.logsigmoid(pooled) / tau


def sigmoid_alone(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    return F.logsigmoid(pooled)


def softplus(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    return -F.softplus(pooled)


def exponential(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    # Beyond exp(8) nothing outlives a step, and the gradient would overflow.
    return -pooled.clamp(max=8.0).exp()


def floored(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    """log(gamma + (1 - gamma) sigmoid(P)) with gamma = 1 - 1 / tau, or 0 where that is negative."""
    return F.logsigmoid(pooled) if tau <= 1 else torch.log1p(-torch.sigmoid(-pooled) / tau)


def fixed(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    """1 - 2 ** -(5 + h) of head h, whatever the token (RetNet, arXiv 2307.08621, eq. 8)."""
    head = torch.arange(pooled.shape[2], device=pooled.device, dtype=pooled.dtype)
    decay = torch.log1p(-torch.exp2(-5 - head))
    return decay.view(-1, *(1,) * (pooled.ndim - 3)).expand_as(pooled)


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda k: k,
    "width": lambda k: k.mean(-1),
    "heads": lambda k: k.mean(2, keepdim=True).expand_as(k),
}


def log_decay(gate: Gate, k: torch.Tensor, tau: float, pool: str | None = None) -> torch.Tensor | None:
    """k [B,T,H,K] -> log decay [B,T,H,K], or [B,T,H] where the key is pooled over its width, in float32, or None.

    pool is a name in POOLINGS: "width", over the heads ("heads"), or not at all ("identity"); None is the gate's own.
    """
    if gate.log_decay is None:
        return None
    pooled = POOLINGS[pool or ("identity" if gate.per_channel else "width")]
    return gate.log_decay(pooled(k.to(torch.promote_types(k.dtype, torch.float32))), tau)


def strength(gate: Gate, k: torch.Tensor) -> torch.Tensor | None:
    """k [B,T,H,K] -> write strength [B,T,H] in float32, or None where nothing is erased."""
    return None if gate.strength is None else gate.strength(k.to(torch.promote_types(k.dtype, torch.float32)).mean(-1))


class Mix(nn.Module):
    """A weight per query head, [HQ]: a module, so that tools that train or save modules reach it."""

    # What all heads have instead, if anything: never by itself (`calls.with_mix`).
    told: float | None = None

    def __init__(self, num_heads: int, value: float, learn: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_heads,), float(value)), requires_grad=learn)

    def forward(self) -> torch.Tensor:
        told = HERE.told.get(self, self.told)
        return self.weight if told is None else torch.full_like(self.weight, told)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        # It runs in a thread of its own, where nobody has told anything.
        vars(replica)["told"] = HERE.told.get(self, self.told)
        return replica
