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
    """

    per_channel: bool
    log_decay: Callable[[torch.Tensor, float], torch.Tensor] | None
    strength: Callable[[torch.Tensor], torch.Tensor] | None = None


def _sigmoid(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    return F.logsigmoid(pooled) / tau


GATES: dict[str, Gate] = {
    "gla": Gate(True, _sigmoid),
    "gated_retention": Gate(False, _sigmoid),
    "deltanet": Gate(False, None, torch.sigmoid),
    "gated_deltanet": Gate(False, _sigmoid, torch.sigmoid),
    "kda": Gate(True, _sigmoid, torch.sigmoid),
}


def register_gate(name: str, gate: Gate) -> None:
    """Add a gate under a new name; ValueError if the name is taken."""
    if name in GATES:
        raise ValueError(f"gate: expected a new name, got {name!r}, which exists ({', '.join(GATES)})")
    GATES[name] = gate


def erases(name: str) -> bool:
    return GATES[name].strength is not None


def _precise(k: torch.Tensor) -> torch.Tensor:
    return k.float() if k.dtype in (torch.float16, torch.bfloat16) else k


def log_decay(name: str, k: torch.Tensor, tau: float) -> torch.Tensor | None:
    """k [B,T,H,K] -> log decay [B,T,H,K] or [B,T,H] in float32, or None."""
    gate, k = GATES[name], _precise(k)
    if gate.log_decay is None:
        return None
    return gate.log_decay(k if gate.per_channel else k.mean(-1), tau)


def strength(name: str, k: torch.Tensor) -> torch.Tensor:
    """k [B,T,H,K] -> write strength [B,T,H] in float32."""
    return GATES[name].strength(_precise(k).mean(-1))
