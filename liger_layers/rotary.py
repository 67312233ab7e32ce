"""Rotary position embedding (arXiv 2104.09864), halves convention, for layers used without Hugging Face.

Shapes: B batch, T time, D head width.
"""

import torch


def rotary_tables(position: torch.Tensor, width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """position [B,T] -> cos, sin [B,T,D] in float32."""
    inverse = theta ** (-torch.arange(0, width, 2, device=position.device, dtype=torch.float32) / width)
    angle = (position.float().unsqueeze(-1) * inverse).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B,T,H,D] with tables [B or 1,T,D'] whose D' <= D channels turn."""
    width = cos.shape[-1]
    turned, still = x[..., :width], x[..., width:]
    a, b = turned.chunk(2, -1)
    turned = (turned * cos.unsqueeze(2) + torch.cat([-b, a], -1) * sin.unsqueeze(2)).to(x.dtype)
    return turned if not still.shape[-1] else torch.cat([turned, still], -1)
