"""Feature maps of the recurrent branch, positive ones given as logarithms so that a joint softmax can weigh them.

`log` says whether a map is positive and gives logarithms, `paired` whether its queries mean nothing without its keys.

Shapes: B batch, T time, HQ query heads, H key/value heads (HQ = G * H), K key width, M features, R kernel rank.
"""

import math
from typing import Literal

import torch
from torch import nn

from liger_ops.errors import check_known

Side = Literal["query", "key"]
SIDES = ("query", "key")


class FeatureMap(nn.Module):
    """forward(x, side) of queries [B,T,HQ,K] or keys [B,T,H,K] gives their features, [B,T,HQ,M] or [B,T,H,M]."""

    log: bool
    paired: bool

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()

    def forward(self, x: torch.Tensor, side: Side) -> torch.Tensor:
        raise NotImplementedError


class Softmax(FeatureMap):
    """exp(log_softmax(x)): the published map (arXiv 2503.01496, sec. 3.1). M = K."""

    log, paired = True, False

    def forward(self, x: torch.Tensor, side: Side) -> torch.Tensor:
        if side not in SIDES:
            check_known("side", side, SIDES)
        return x.log_softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))


class UnitLength(FeatureMap):
    """x as it is: the delta rule gives it length 1, and signed features have no logarithm. M = K."""

    log, paired = False, False

    def forward(self, x: torch.Tensor, side: Side) -> torch.Tensor:
        if side not in SIDES:
            check_known("side", side, SIDES)
        return x.to(torch.promote_types(x.dtype, torch.float32))


class SoftmaxKernel(FeatureMap):
    """Positive features whose inner product estimates exp(q k / sqrt(K)) for unrotated q and k. M = K.

    With d = k - mean(k), the score splits into q mean(k), a factor of the query alone, mean(q) d, a factor of the
    key alone, and the remainder (q - mean(q)) d, small enough for positive random features exp(w x - |x|^2 / 2)
    (Performer, arXiv 2009.14794, lemma 1) over its R strongest directions. `calibrate` sets means and directions
    from second moments; before it, the map starts from the first R channels of zero-mean keys.
    """

    log, paired = True, True

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, rank: int = 16):
        super().__init__(num_heads, num_kv_heads, head_dim)
        # The largest power of two within rank and width: a Hadamard basis must exist.
        H, K, R = num_kv_heads, head_dim, 1 << (min(rank, head_dim).bit_length() - 1)
        self.rank = R
        start = torch.eye(K, R).expand(H, K, R) * K**-0.25
        self.query_directions = nn.Parameter(start.clone())
        self.key_directions = nn.Parameter(start.clone())
        self.query_mean = nn.Parameter(torch.zeros(H, K))
        self.key_mean = nn.Parameter(torch.zeros(H, K))
        self.query_weight = nn.Parameter(torch.zeros(H, K))
        self.key_weight = nn.Parameter(torch.zeros(H, K))
        self.frequencies = nn.Parameter(self._frequencies(R, K))

    @staticmethod
    def _frequencies(rank: int, features: int) -> torch.Tensor:
        """Orthogonal directions of length sqrt(R), each with its opposite, [R,M]: Hadamard bases under fixed signs."""
        base = torch.ones(1, 1, device="cpu")
        while len(base) < rank:
            base = torch.cat([torch.cat([base, base], 1), torch.cat([base, -base], 1)])
        half = (features + 1) // 2
        generator = torch.Generator(device="cpu").manual_seed(0)
        signs = torch.randint(2, (-(-half // rank), rank), generator=generator, device="cpu") * 2.0 - 1.0
        w = (base * signs.unsqueeze(1)).flatten(0, 1)[:half]
        return torch.cat([w, -w])[:features].T.contiguous().to(torch.get_default_dtype())

    def forward(self, x: torch.Tensor, side: Side) -> torch.Tensor:
        if side not in SIDES:
            check_known("side", side, SIDES)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if side == "key":
                return self._log(x, self.key_mean, self.key_directions, self.key_weight, 0.0)
            x = x.unflatten(2, (self.query_mean.shape[0], -1))
            # The M features average, hence -log M; the means' own product is taken out once.
            common = (self.query_mean * self.query_weight).sum(-1)[:, None, None] - math.log(self.frequencies.shape[1])
            return self._log(x, self.query_mean, self.query_directions, self.query_weight, common).flatten(2, 3)

    def _log(self, x, mean, directions, weight, offset):
        """x [B,T,H,...,K] -> log features [B,T,H,...,M]: y F - |y|^2 / 2 + weight d + offset, y = d W, d = x - mean."""
        (H, K), R = mean.shape, self.rank
        # One product for y and for weight d, with the mean taken out after it, when there is less to subtract.
        columns = torch.cat([directions, weight.unsqueeze(-1)], -1).to(x.dtype)
        flat = x.movedim(2, 0).reshape(H, -1, K)
        y = torch.baddbmm(-mean.to(x.dtype).unsqueeze(1) @ columns, flat, columns)
        own = y[..., R:] - y[..., :R].square().sum(-1, keepdim=True) / 2 + offset
        y = torch.cat([y[..., :R], own], -1).view(H, *x.shape[:2], *x.shape[3:-1], R + 1).movedim(0, 2)
        frequencies = self.frequencies.to(x.dtype)
        return y @ torch.cat([frequencies, torch.ones_like(frequencies[:1])])

    @torch.no_grad()
    def calibrate(
        self,
        query_mean: torch.Tensor,
        key_mean: torch.Tensor,
        query_covariance: torch.Tensor,
        key_covariance: torch.Tensor,
        channels: torch.Tensor,
        scale: float | None = None,
    ) -> None:
        """Fit to means [H,K] and covariances [H,K,K] of unrotated queries (pooled over each group) and keys.

        channels [K] bool are those whose rotary angle stays small over the far context; the others average out.
        scale is that of the scores, K ** -0.5 unless given.
        """
        (H, K), kept = key_mean.shape, channels.nonzero().squeeze(-1).cpu()
        factor: float = K**-0.5 if scale is None else scale
        means = [torch.zeros(H, K, dtype=torch.float64), torch.zeros(H, K, dtype=torch.float64)]
        for mean, given in zip(means, (query_mean, key_mean), strict=True):
            mean[:, kept] = given.double().cpu()[:, kept]
        cq, ck = (c.double().cpu()[:, kept][:, :, kept] for c in (query_covariance, key_covariance))
        root, inverse = _power(ck, 0.5), _power(ck, -0.5)
        strength, basis = torch.linalg.eigh(root @ cq @ root)
        R = min(self.rank, len(kept))
        strength, basis = strength.flip(-1)[:, :R].clamp(min=1e-12), basis.flip(-1)[:, :, :R]
        directions = [torch.zeros(H, K, self.rank, dtype=torch.float64) for _ in range(2)]
        # Queries and keys get equal variance along each direction, which minimises the features' variance.
        directions[0][:, kept, :R] = root @ basis * strength.unsqueeze(1) ** -0.25 * factor**0.5
        directions[1][:, kept, :R] = inverse @ basis * strength.unsqueeze(1) ** 0.25 * factor**0.5
        for parameter, value in (
            (self.query_mean, means[0]),
            (self.key_mean, means[1]),
            (self.query_directions, directions[0]),
            (self.key_directions, directions[1]),
            (self.query_weight, means[1] * factor),
            (self.key_weight, means[0] * factor),
        ):
            parameter.copy_(value)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Power of symmetric positive matrices, directions of vanishing variance floored."""
    values, vectors = torch.linalg.eigh(matrix)
    values = torch.maximum(values, 1e-5 * values.amax(-1, keepdim=True)).clamp(min=1e-12)
    return vectors @ torch.diag_embed(values**exponent) @ vectors.transpose(-1, -2)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {"softmax": Softmax, "kernel": SoftmaxKernel, "unit": UnitLength}
