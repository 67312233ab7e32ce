"""Gates pooled from the key (Liger, arXiv 2503.01496, table 1): no parameters of their own.

Shapes: B batch, T time, H key/value heads, K key width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Gate(NamedTuple):
    """per_channel keeps the key's width (pooling to K is the identity), otherwise the key is averaged to one number.

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


def _precise(k: torch.Tensor) -> torch.Tensor:
    return k.float() if k.dtype in (torch.float16, torch.bfloat16) else k


def log_decay(gate: Gate, k: torch.Tensor, tau: float, pool: str | None = None) -> torch.Tensor | None:
    """k [B,T,H,K] -> log decay [B,T,H,K], or [B,T,H] where the key is pooled over its width, in float32, or None.

    pool is a name in POOLINGS: "width", over the heads ("heads"), or not at all ("identity"); None is the gate's own.
    """
    if gate.log_decay is None:
        return None
    return gate.log_decay(POOLINGS[pool or ("identity" if gate.per_channel else "width")](_precise(k)), tau)


def strength(gate: Gate, k: torch.Tensor) -> torch.Tensor | None:
    """k [B,T,H,K] -> write strength [B,T,H] in float32, or None where nothing is erased."""
    return None if gate.strength is None else gate.strength(_precise(k).mean(-1))
