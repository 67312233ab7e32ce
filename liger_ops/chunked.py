"""The chunked algorithm of gated recurrences as papers print it (GLA, arXiv 2312.06635, sec. 4; Mamba-2, 2405.21060).

To be read beside `naive` and tested against it; the ops do the same faster.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, C chunk; i, j tokens of a chunk.
"""

import torch


def chunked_recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    chunk: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = diag(exp(g_t)) h_{t-1} + k_t v_t^T, o_t = scale q_t h_t, a chunk at a time.

    q [B,T,HQ,K], k and g [B,T,H,K], v [B,T,H,V] -> o [B,T,HQ,V] and the last state [B,H,K,V].
    """
    (B, T, H, K), G = k.shape, q.shape[2] // k.shape[2]
    state = k.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for start in range(0, T, chunk):
        kc, vc, gc = (x[:, start : start + chunk].transpose(1, 2) for x in (k, v, g))
        qc = q[:, start : start + chunk].unflatten(2, (H, G)).movedim(1, 3)
        C = kc.shape[2]
        later = torch.ones(C, C, dtype=torch.bool).tril(-1)
        # Decay from j to i, the gates of j + 1 to i added up, never subtracted: -inf forgets, and nothing overflows.
        between = gc.unsqueeze(3).expand(-1, -1, -1, C, -1).masked_fill(~later[:, :, None], 0.0).cumsum(2)
        causal = between.exp() * torch.ones(C, C).tril()[:, :, None].to(k)
        scores = torch.einsum("bhgik,bhijk,bhjk->bhgij", qc, causal, kc)
        before = gc.cumsum(2)
        outputs.append((qc * before.exp().unsqueeze(2)) @ state.unsqueeze(2) + scores @ vc.unsqueeze(2))
        behind = between[:, :, -1]
        state = before[:, :, -1].exp().unsqueeze(-1) * state + (kc * behind.exp()).transpose(-1, -2) @ vc
    return scale * torch.cat(outputs, 3).movedim(3, 1).flatten(2, 3), state
