"""What a Liger layer remembers between calls: constant in size from the first token on.

Shapes: B batch, H key/value heads, D width, V value width, W window, P sinks, M features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass
class LigerState:
    """Columns are the sinks, then the last W tokens; `visible` [B,P+W] hides unfilled slots, padding and repeats.

    k [B,P+W,H,D] as the window scores them, v [B,P+W,H,V], raw [B,W,H,D] the unrotated keys that the recurrence reads
    when a token leaves the window (None when it reads tokens at once), recurrent [B,H,M,V+1] or [B,H,M,V] in
    float32, position [B] the tokens seen, padding excluded.
    """

    k: torch.Tensor | None
    v: torch.Tensor | None
    visible: torch.Tensor | None
    raw: torch.Tensor | None
    recurrent: torch.Tensor | None
    position: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LigerState:
        """Apply a function of a batch-first tensor to every tensor held: reorder beams, move, repeat."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return LigerState(**{name: None if x is None else function(x) for name, x in held.items()})

    def nbytes(self) -> int:
        return sum(x.nbytes for f in fields(self) if (x := getattr(self, f.name)) is not None)
