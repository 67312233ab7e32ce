"""Routed memories beside a layer that already has one, on keys and values that start as the layer's own.

Shapes: B batch, T time, HQ query heads, H key/value heads, D head width, M memories, R memories per token.
"""

from collections.abc import Callable

import torch
from torch import nn

from liger_layers._routing import Routing, choose, dispatch, one_token
from liger_layers._state import Held, each
from liger_layers.gates import Mix


def _repeated(projection: nn.Linear, times: int) -> nn.Linear:
    """A projection to `times` copies of what the given one puts out, one after the other."""
    weight, bias = projection.weight, projection.bias
    sizes = projection.in_features, times * projection.out_features
    copies = nn.Linear(*sizes, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        copies.weight.copy_(weight.repeat(times, 1))
        if bias is not None:
            copies.bias.copy_(bias.repeat(times))
    return copies


class RoutedMemories(Routing):
    """M memories of which each token writes and reads R = top_k, mixed by its router (arXiv 2502.13685, eq. 6-9).

    The sum enters through `mix`, a weight per query head that starts at zero.
    """

    routers, whole = ("router",), ("router", "mix")

    def __init__(self, k_proj: nn.Linear, v_proj: nn.Linear, num_heads: int, head_dim: int, count: int, top_k: int):
        super().__init__()
        self.count, self.top_k, self.head_dim = count, top_k, head_dim
        self.k_proj, self.v_proj = _repeated(k_proj, count), _repeated(v_proj, count)
        weight = k_proj.weight
        self.router = nn.Linear(k_proj.in_features, count, bias=False, device=weight.device, dtype=weight.dtype)
        self.mix = Mix(num_heads, 0.0, True)

    def forward(
        self,
        x: torch.Tensor,
        q: torch.Tensor,
        mask: torch.Tensor | None,
        state: Held,
        finish: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        recurrence: Callable[..., tuple[torch.Tensor, Held]],
        router_logits: list[torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Held]:
        """x [B,T,hidden], q [B,T,HQ,D], mask [B,T], state [B,M,H,D,...] or a tuple -> o [B,T,HQ,D], state.

        finish(k, v) norms what was projected, recurrence(q, k, v, mask, state, cu_seqlens=, max_seqlen=) runs all
        memories at once. router_logits is a list that takes in the logits [B*T,M]. cu_seqlens [D+1] bounds documents,
        with batch 1, each of which has a state of its own.
        """
        T = x.shape[1]
        weights, chosen = choose(self.router, x, self.top_k, router_logits)
        if T == 1 and cu_seqlens is None:
            entries, packing = one_token(chosen, self.count, mask), {}
        else:
            entries = dispatch(chosen, self.count, mask, cu_seqlens)
            packing = dict(cu_seqlens=entries.cu_seqlens, max_seqlen=chosen.numel())
        k, v = (p(x).unflatten(-1, (self.count, -1, self.head_dim)) for p in (self.k_proj, self.v_proj))
        k, v = finish(entries.gather_chosen(k), entries.gather_chosen(v))
        everyone = torch.ones_like(k[..., 0, 0], dtype=torch.bool)
        o, last = recurrence(entries.gather(q), k, v, everyone, each(entries.before, state), **packing)
        o = entries.scatter(o, weights) * self.mix().to(weights.dtype).unsqueeze(-1)
        return o, each(entries.after, state, last)
