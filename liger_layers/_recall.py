"""Which tokens a layer is to keep exact beyond its window: a score that each has from itself.

Shapes: B batch, T time, H key/value heads, D head width, F features.
"""

import torch
from torch import nn


class RecallScore(nn.Module):
    """A score per token and key/value head, linear in features of its unrotated key and its value.

    Until fitted it is the logarithm of the value's length, which favours keys that are asked for later. The choice
    among scores takes no gradient, so nothing here learns by descent.
    """

    def __init__(self, num_kv_heads: int, head_dim: int):
        super().__init__()
        weight = torch.zeros(num_kv_heads, 2 * head_dim + 4)
        weight[:, -2] = 1.0
        self.weight = nn.Parameter(weight, requires_grad=False)

    def features(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """k, v [B,T,H,D] -> [B,T,H,F] in float32."""
        k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        length = v.norm(dim=-1, keepdim=True)
        sizes = k.norm(dim=-1, keepdim=True), length, length.clamp(min=1e-6).log(), torch.ones_like(length)
        return torch.cat([k, v, *sizes], -1)

    @torch.no_grad()
    def forward(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """k, v [B,T,H,D] -> scores [B,T,H] in float32."""
        x = self.features(k, v)
        return torch.einsum("bthf,hf->bth", x, self.weight.to(x.dtype))
