"""Rotary position embedding (arXiv 2104.09864), halves convention, for layers used without Hugging Face.

Shapes: B batch, T time, D head width.
"""

import torch


def rotary_tables(position: torch.Tensor, width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """position [B,T] -> cos, sin [B,T,D] in float32; the last channel of an odd width does not turn."""
    width -= width % 2
    inverse = theta ** (-torch.arange(0, width, 2, device=position.device, dtype=torch.float32) / width)
    angle = (position.float().unsqueeze(-1) * inverse).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B,T,H,D] with tables [B or 1,T,D'] whose D' <= D channels turn."""
    width = cos.shape[-1]
    cos, sin, half = cos.unsqueeze(2), sin.unsqueeze(2), width // 2
    a, b = x[..., :half], x[..., half:width]
    turned = x[..., :width] * cos
    turned[..., :half].addcmul_(b, sin[..., :half], value=-1)
    turned[..., half:].addcmul_(a, sin[..., half:])
    turned = turned.to(x.dtype)
    return torch.cat([turned, x[..., width:]], -1) if width < x.shape[-1] else turned
