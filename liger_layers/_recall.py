"""Which tokens a layer is to keep exact beyond its window: a score that each has from itself.

Shapes: B batch, T time, H key/value heads, D head width, F features.
"""

import torch
import torch.nn.functional as F
from torch import nn


class RecallScore(nn.Module):
    """A score per token and key/value head, linear in the layer's unrotated keys and values, of all heads.

    Until fitted all are zero, and the latest tokens stay. The choice among scores takes no gradient, so nothing here
    learns by descent: `calibrate` sets weight [H,F] and bias [H] from moments. Scores are whole thousandths, so that
    equal tokens, as a first layer sees them, are equal whatever a product rounds, and the later one stays.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_kv_heads, 2 * num_kv_heads * head_dim))
        self.register_buffer("bias", torch.zeros(num_kv_heads))

    def features(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """k, v [B,T,H,D] -> [B,T,F] in float32."""
        return torch.cat([k, v], 2).flatten(2).to(torch.promote_types(k.dtype, torch.float32))

    @torch.no_grad()
    def forward(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """k, v [B,T,H,D] -> scores [B,T,H] in float32."""
        # Halves would tell few tokens apart.
        with torch.autocast(k.device.type, enabled=False):
            x = self.features(k, v)
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).round_(decimals=3)

    @torch.no_grad()
    def calibrate(
        self, mean: torch.Tensor, covariance: torch.Tensor, cross: torch.Tensor, penalty: float = 0.05
    ) -> None:
        """The ridge regression of a need on the features, in units of its own deviation.

        mean [F] and covariance [F,F] of the features, cross [F,H] their covariance with the need of each head; penalty
        in units of a feature's variance. A head of which nothing was asked, as on text that ends within the window,
        stays as it is.
        """
        size = covariance.diagonal().clamp(min=0).sqrt() + 1e-6
        gram = covariance / (size[:, None] * size) + penalty * torch.eye(len(size), dtype=size.dtype)
        weight = torch.linalg.solve(gram, cross / size[:, None]) / size[:, None]
        weight = weight / (weight * (covariance @ weight)).sum(0).clamp(min=1e-12).sqrt()
        asked = (cross != 0).any(0).to(self.weight.device)
        self.weight[asked] = weight.T.to(self.weight)[asked]
        self.bias[asked] = (-mean @ weight).to(self.bias)[asked]
