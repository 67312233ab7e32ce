"""What outputs, queries and keys are divided by."""

import torch


def normalized(o: torch.Tensor) -> torch.Tensor:
    """o [...,V+1] -> [...,V], divided by the last column except where that is zero: nothing was seen there."""
    total = o[..., -1:]
    return o[..., :-1] / total.masked_fill(total == 0, 1.0)


def length(x: torch.Tensor) -> torch.Tensor:
    """sqrt(|x|^2 + 1e-6) over the last dimension [...,1], in float32 or float64."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind).square() + 1e-6).sqrt()
