"""Gates pooled from the key (Liger, arXiv 2503.01496, table 1): no parameters of their own.

Shapes: B batch, T time, H key/value heads, K key width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

WRITES = ("key", "complement", "slots")


class Gate(NamedTuple):
    """per_channel keeps the key's width (pooling to K is the identity), otherwise the key is averaged to one number.

    log_decay maps the pooled key and tau to a log decay <= 0; None forgets nothing. strength maps the key, averaged to
    one number, to a write strength from 0 to 2: the memory then follows the delta rule, which erases what a key held.
    writes is what a token writes its value under: the features of its "key", the "complement" 1 - decay, or the key
    itself into "slots", each of which takes up 1 - decay of it (gated slot attention, as many slots as channels).
    """

    per_channel: bool
    log_decay: Callable[[torch.Tensor, float], torch.Tensor] | None
    strength: Callable[[torch.Tensor], torch.Tensor] | None = None
    writes: str = "key"


def _sigmoid(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    return F.logsigmoid(pooled) / tau


def _sigmoid_alone(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    return F.logsigmoid(pooled)


def _softplus(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    return -F.softplus(pooled)


def _exponential(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    # Beyond exp(8) nothing outlives a step, and the gradient would overflow.
    return -pooled.clamp(max=8.0).exp()


def _floored(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    """log(gamma + (1 - gamma) sigmoid(P)) with gamma = 1 - 1 / tau, or 0 where that is negative."""
    return F.logsigmoid(pooled) if tau <= 1 else torch.log1p(-torch.sigmoid(-pooled) / tau)


def _fixed(pooled: torch.Tensor, tau: float) -> torch.Tensor:
    """1 - 2 ** -(5 + h) of head h, whatever the token (RetNet, arXiv 2307.08621, eq. 8)."""
    head = torch.arange(pooled.shape[2], device=pooled.device, dtype=pooled.dtype)
    decay = torch.log1p(-torch.exp2(-5 - head))
    return decay.view(-1, *(1,) * (pooled.ndim - 3)).expand_as(pooled)


GATES: dict[str, Gate] = {
    "gla": Gate(True, _sigmoid),
    "gsa": Gate(True, _sigmoid, writes="slots"),
    "hgrn2": Gate(True, _floored, writes="complement"),
    "mamba2": Gate(False, _softplus),
    "mlstm": Gate(False, _sigmoid_alone),
    "gated_retention": Gate(False, _sigmoid),
    "rwkv6": Gate(True, _exponential),
    "retention": Gate(False, _fixed),
    "linear": Gate(False, None),
    "deltanet": Gate(False, None, torch.sigmoid),
    "gated_deltanet": Gate(False, _sigmoid, torch.sigmoid),
    "kda": Gate(True, _sigmoid, torch.sigmoid),
}

POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda k: k,
    "width": lambda k: k.mean(-1),
    "heads": lambda k: k.mean(2, keepdim=True).expand_as(k),
}


# What a layer of a pattern may be besides a gate: "liger" is the gate that the rest of the options name, "own" a window
# that a layer has by itself.
PLACES = ("liger", "full", "window", "own", "memories")


def register_gate(name: str, gate: Gate) -> None:
    """Add a gate under a new name; ValueError if the name is taken or the gate contradicts itself."""
    if not isinstance(name, str) or not name or name in PLACES:
        raise ValueError(f"name: expected a name other than {', '.join(PLACES)}, got {name!r}")
    if not isinstance(gate, Gate):
        raise ValueError(f"gate: expected a Gate, got {type(gate).__name__}")
    if name in GATES:
        raise ValueError(f"gate: expected a new name, got {name!r}, which exists ({', '.join(GATES)})")
    if gate.writes not in WRITES:
        raise ValueError(f"writes: expected one of {', '.join(WRITES)}, got {gate.writes!r}")
    if gate.writes != "key" and (gate.log_decay is None or gate.strength is not None or not gate.per_channel):
        raise ValueError(
            f"writes: expected 'key' unless a gate decays per channel and does not erase, got {gate.writes!r}"
        )
    GATES[name] = gate


def erases(name: str) -> bool:
    return GATES[name].strength is not None


def _precise(k: torch.Tensor) -> torch.Tensor:
    return k.float() if k.dtype in (torch.float16, torch.bfloat16) else k


def log_decay(name: str, k: torch.Tensor, tau: float, pool: str | None = None) -> torch.Tensor | None:
    """k [B,T,H,K] -> log decay [B,T,H,K], or [B,T,H] where the key is pooled over its width, in float32, or None.

    pool is a name in POOLINGS: "width", over the heads ("heads"), or not at all ("identity"); None is the gate's own.
    """
    gate, k = GATES[name], _precise(k)
    if gate.log_decay is None:
        return None
    return gate.log_decay(POOLINGS[pool or ("identity" if gate.per_channel else "width")](k), tau)


def strength(name: str, k: torch.Tensor) -> torch.Tensor:
    """k [B,T,H,K] -> write strength [B,T,H] in float32."""
    return GATES[name].strength(_precise(k).mean(-1))
