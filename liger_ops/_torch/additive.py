"""Chunked additive recurrence h_t = exp(g_t) h_{t-1} + k_t v_t^T, in segments with a recomputing backward.

Shapes: B batch, T time, H key/value heads, G query heads per key/value head, K key width, V value width,
N chunks of C tokens. Every exponent is a sum of log decays, never a difference of two such sums; the one
exception is a chunk whose decays sum to no less than _FACTORABLE, anchored at its own first row.
"""

import torch
import torch.nn.functional as F

_SEGMENT = 1024
_FACTORABLE = -80.0


def _split(x: torch.Tensor, chunks: int, size: int) -> torch.Tensor:
    """[B,T,H,...] -> [B,H,N,C,...], zero-padded at the end: a zero key under a zero log decay changes nothing."""
    missing = chunks * size - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
    return x.unflatten(1, (chunks, size)).movedim(3, 1)


def _suffix(g: torch.Tensor) -> torch.Tensor:
    """Exclusive sum of g over the later rows of a chunk (dim 3)."""
    total = g.flip(3).cumsum(3).flip(3)
    return torch.cat([total[:, :, :, 1:], torch.zeros_like(total[:, :, :, :1])], 3)


def _between(g: torch.Tensor) -> torch.Tensor:
    """g [B,H,N,C,...] -> running sums over rows j < l <= i, [B,H,N,C(i),C(j),...]; zero where i <= j."""
    C = g.shape[3]
    later = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    later = later.view(C, C, *[1] * (g.ndim - 4))
    return torch.where(later, g.unsqueeze(4), 0.0).cumsum(3)


def _scores(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
    """q [B,H,N,C,G,K], k [B,H,N,C,K] -> decayed causal scores [B,H,N,C*G,C]."""
    C, G = q.shape[3:5]
    rows = torch.arange(C, device=q.device)
    causal = rows[:, None] >= rows[None]
    if g is None or g.ndim == 4:
        weights = causal.to(q.dtype) if g is None else _between(g).exp() * causal
        a = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, (C, G))
        weights = weights.unsqueeze(-2)
        return (a * weights if torch.is_grad_enabled() else a.mul_(weights)).flatten(3, 4)
    if bool(g.detach().sum(3).amin() >= _FACTORABLE):
        # Row i never decays its own key, so the diagonal stays out of the factored product and its gradient.
        cum = g.cumsum(3)
        a = (q * cum.exp().unsqueeze(4)).flatten(3, 4) @ (k * (-cum).exp()).transpose(-1, -2)
        own = (q * k.unsqueeze(4)).sum(-1)
        strict = (rows[:, None] > rows[None]).repeat_interleave(G, 0)
        eye = torch.eye(C, dtype=q.dtype, device=q.device).repeat_interleave(G, 0)
        return torch.where(strict, a, own.flatten(3, 4).unsqueeze(-1) * eye)
    decayed = _between(g).exp() * k.unsqueeze(3)
    return torch.einsum("bhncgk,bhncjk->bhncgj", q, decayed).flatten(3, 4) * causal.repeat_interleave(G, 0)


def _states(added: torch.Tensor, total: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """What each chunk adds [B,H,N,K,V], its whole log decay [B,H,N,K or 1], the state before -> [B,H,N+1,K,V]."""
    N = added.shape[2]
    if total is not None and total.shape[-1] > 1:
        states = [state]
        for n in range(N):
            states.append(added[:, :, n] + total[:, :, n, :, None].exp() * states[-1])
        return torch.stack(states, 2)
    carried = torch.cat([state.unsqueeze(2), added], 2).flatten(3)
    decays = added.new_zeros(*added.shape[:2], 1) if total is None else total.squeeze(-1)
    decays = F.pad(decays.expand(-1, -1, N), (1, 0)).unsqueeze(2)
    weights = _between(decays).squeeze(2).exp().tril()
    return (weights @ carried).unflatten(3, added.shape[3:])


def _segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, state: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One segment: q [B,T,H,G,K], k [B,T,H,K], v [B,T,H,V], g per head or per channel, state [B,H,K,V]."""
    T, G = q.shape[1], q.shape[3]
    C = min(chunk, T)
    N = -(-T // C)
    q, k, v = (_split(x, N, C) for x in (q, k, v))
    q = q.flatten(3, 4).unflatten(3, (C, G))
    if g is None:
        read, write = q, k
    else:
        g = _split(g, N, C)
        wide = g if g.ndim == 5 else g.unsqueeze(-1)
        read = q * wide.cumsum(3).exp().unsqueeze(4)
        write = k * _suffix(wide).exp()
    states = _states(write.transpose(-1, -2) @ v, None if g is None else wide.sum(3), state)
    flat = (x.flatten(0, 2) for x in (_scores(q, k, g) @ v, read.flatten(3, 4), states[:, :, :N]))
    o = torch.baddbmm(*flat).view(*k.shape[:3], C * G, v.shape[-1])
    # A copy: a view would keep every chunk's state alive.
    return o.unflatten(3, (C, G)).movedim(1, 3).flatten(1, 2)[:, :T], states[:, :, N].clone()


class _ChunkedRecurrence(torch.autograd.Function):
    """Keeps only the inputs and the state at each segment's start; the backward recomputes a segment at a time."""

    @staticmethod
    def forward(ctx, q, k, v, g, state, chunk):
        T, length = q.shape[1], max(_SEGMENT // chunk, 1) * chunk
        starts, outputs = [], []
        for s in range(0, T, length):
            e = min(s + length, T)
            starts.append(state)
            o, state = _segment(q[:, s:e], k[:, s:e], v[:, s:e], None if g is None else g[:, s:e], state, chunk)
            outputs.append(o)
        ctx.chunk, ctx.length = chunk, length
        ctx.save_for_backward(q, k, v, g, *starts)
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dstate):
        q, k, v, g, *starts = ctx.saved_tensors
        grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, g)]
        for n in range(len(starts) - 1, -1, -1):
            part = slice(n * ctx.length, min((n + 1) * ctx.length, q.shape[1]))
            inputs = [None if x is None else x[:, part].detach().requires_grad_() for x in (q, k, v, g)]
            state = starts[n].detach().requires_grad_()
            with torch.enable_grad():
                outputs = _segment(*inputs, state, ctx.chunk)
            leaves = [x for x in (*inputs, state) if x is not None]
            found = list(torch.autograd.grad(outputs, leaves, (do[:, part], dstate)))
            dstate = found.pop()
            for grad in grads:
                if grad is not None:
                    grad[:, part] = found.pop(0)
        return (*grads, dstate, None)


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,T,HQ,K], k [B,T,H,K], v [B,T,H,V], g [B,T,H], [B,T,H,K] or None -> o [B,T,HQ,V], state [B,H,K,V].

    Computes in float32 (float64 for float64 inputs) and returns o in the dtype of q.
    """
    dtype, (B, T, H, K), V = q.dtype, k.shape, v.shape[-1]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (q if scale == 1.0 else q * scale).to(work).unflatten(2, (H, -1)), k.to(work), v.to(work)
    g = None if g is None else g.to(work)
    state = q.new_zeros(B, H, K, V) if state is None else state.to(work)
    if T == 0:
        return q.new_zeros(B, 0, H * q.shape[3], V).to(dtype), state
    if T == 1 and not torch.is_grad_enabled():
        state, o = _step(q[:, 0], k[:, 0], v[:, 0], None if g is None else g[:, 0], state)
    else:
        o, state = _ChunkedRecurrence.apply(q, k, v, g, state, chunk)
    return o.flatten(2, 3).to(dtype), state


def _step(q, k, v, g, state):
    """One token: q [B,H,G,K], k [B,H,K], v [B,H,V], state [B,H,K,V]."""
    if g is not None:
        state = state * (g.unsqueeze(-1) if g.ndim == 3 else g[..., None, None]).exp()
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return state, (q @ state).unsqueeze(1)
