"""The weight of each head's recurrence at which its output is nearest to what the pretrained attention puts out.

Shapes: T tokens of a row, HQ query heads, D head width, N weights that are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from liger_layers import LigerAttention
from liger_layers.calls import with_mix, with_window
from liger_models._calibration import look_into

# The weights tried, 1/16 to 4. None of them is 0, from which features would learn nothing.
WEIGHTS = 2.0 ** torch.linspace(-4, 2, 25, dtype=torch.float64)
# Beside 0 and 1, the weight at which a layer is run.
PROBE = 4.0


def distances(
    none: torch.Tensor, one: torch.Tensor, probe: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Squared distances to `wanted` [T,HQ,D] at any weights [N], from what a joint softmax gives at 0, 1 and PROBE.

    Where a share r of the softmax is the recurrence's at weight 1, the output at weight w is that at 0 and
    c = w / (1 - r + w r) of the way from it to that at 1 and beyond. The output at PROBE tells r. -> [HQ,N], float64.
    """
    none, one, probe, wanted = (x.double() for x in (none, one, probe, wanted))
    way, gap = one - none, none - wanted
    length = way.square().sum(-1)
    # At PROBE it is c times as far, and at no weight beyond what the recurrence alone would give.
    times = ((probe - none) * way).sum(-1) / length
    times = torch.where(length > 0, times, PROBE)
    r = ((PROBE / times.clamp(1.0, PROBE) - 1) / (PROBE - 1))[..., None]
    c = weights / (1 - r + weights * r)
    across = (gap * way).sum(-1, keepdim=True)
    return (gap.square().sum(-1, keepdim=True) + 2 * c * across + c.square() * length[..., None]).sum(0)


def outputs(
    layer: LigerAttention, weights: Sequence[float], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Any
) -> list[torch.Tensor]:
    """What window and recurrence of a layer put out at each weight, [T,HQ,D]; its own weights stay as they are."""
    found, state = [], layer.initial_state(1, q.device, k.dtype)
    for weight in weights:
        with with_mix([layer.mix], weight):
            found.append(layer.mixer(q, k, v, None, state, tables)[0][0])
    return found


@torch.no_grad()
def fit_mixes(
    model: PreTrainedModel, rows: Sequence[torch.Tensor], layers: Mapping[int, LigerAttention]
) -> dict[int, torch.Tensor]:
    """For layers by index, whose features and scores are fitted: the weights [HQ] nearest to the model's attention.

    rows are token ids, [1,T] each. A head keeps its own where none reaches beyond what is exact. The model's own
    attention, not these layers, hands each its input.
    """
    sums = {index: torch.zeros(layer.num_heads, len(WEIGHTS)).double() for index, layer in layers.items()}

    def look(index, q, k, v, tables):
        layer, device = layers[index], layers[index].mix.weight.device
        q, k, v = (x.to(device, torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        tables = None if tables is None else tuple(x.to(q) for x in tables)
        # Under a window over the whole row it is the pretrained attention.
        with with_window([layer], max(layer.window.size, q.shape[1])):
            (wanted,) = outputs(layer, (0.0,), q, k, v, tables)
        none, one, probe = outputs(layer, (0.0, 1.0, PROBE), q, k, v, tables)
        sums[index] += distances(none, one, probe, wanted, WEIGHTS.to(device)).cpu()

    look_into(model, rows, list(layers), look, "Weighing recurrences")
    nearest = {index: WEIGHTS[found.argmin(1)].float() for index, found in sums.items()}
    # Where no row reaches beyond what is exact, nothing tells weights apart.
    return {
        i: torch.where(sums[i].amax(1) > sums[i].amin(1), w, layers[i].mix.weight.cpu()) for i, w in nearest.items()
    }
