"""The chunked listing computes what the loop over tokens does, whatever the chunk and however strong the gates."""

import pytest
import torch

from liger_ops import naive_recurrence
from liger_ops.chunked import chunked_recurrence


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
@pytest.mark.parametrize("strength", [0.1, 30.0, float("inf")])
def test_it_is_the_recurrence(chunk, strength):
    torch.manual_seed(0)
    B, T, H, G, K, V = 2, 37, 2, 3, 5, 4
    q, k, v = (torch.randn(B, T, n, w, dtype=torch.float64) for n, w in ((H * G, K), (H, K), (H, V)))
    g, state = -torch.rand(B, T, H, K, dtype=torch.float64), torch.randn(B, H, K, V, dtype=torch.float64)
    g = g.masked_fill(torch.rand_like(g) < 0.2, -torch.inf) if strength == float("inf") else strength * g
    found = chunked_recurrence(q, k, v, g, 0.3, state, chunk)
    for x, wanted in zip(found, naive_recurrence(q, k, v, g, 0.3, state), strict=True):
        assert x.shape == wanted.shape and (x - wanted).abs().max() <= 1e-12 * wanted.abs().max()
