"""Gates pooled from the key (Liger, arXiv 2503.01496, table 1): no parameters of their own.

Shapes: B batch, T time, H key/value heads, K key width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Gate(NamedTuple):
    """per_channel keeps the key's width (pooling to K is the identity), otherwise the key is averaged to one number.

    log_decay maps the pooled key and tau to a log decay <= 0.
    """

    per_channel: bool
    log_decay: Callable[[torch.Tensor, float], torch.Tensor]


GATES: dict[str, Gate] = {
    "gla": Gate(True, lambda pooled, tau: F.logsigmoid(pooled) / tau),
    "gated_retention": Gate(False, lambda pooled, tau: F.logsigmoid(pooled) / tau),
}


def register_gate(name: str, gate: Gate) -> None:
    """Add a gate under a new name; ValueError if the name is taken."""
    if name in GATES:
        raise ValueError(f"gate: expected a new name, got {name!r}, which exists ({', '.join(GATES)})")
    GATES[name] = gate


def log_decay(name: str, k: torch.Tensor, tau: float) -> torch.Tensor:
    """k [B,T,H,K] -> log decay [B,T,H,K] or [B,T,H] in float32."""
    gate = GATES[name]
    k = k.float() if k.dtype in (torch.float16, torch.bfloat16) else k
    return gate.log_decay(k if gate.per_channel else k.mean(-1), tau)
