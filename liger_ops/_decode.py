"""One decoded token per request, its state updated in place in a pool that all requests share: what a server needs.

Shapes: B requests, S rows of a pool, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width,
M slots of gated slot attention.
"""

import torch

from liger_ops import _checks
from liger_ops._mlstm import SMALLEST
from liger_ops._packed import WIDEST, on_triton, pooled_step
from liger_ops._torch.additive import step


def gated_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    pool: torch.Tensor,
    slots: torch.Tensor,
    scale: float | None = None,
    *,
    gv: torch.Tensor | None = None,
    u: torch.Tensor | None = None,
    normalize: bool = False,
) -> torch.Tensor:
    """A token of `fused_recurrent_gla` and its relatives, or with u of `fused_recurrent_rwkv6`.

    Args:
        q: [B,HQ,K] queries. k, v: [B,H,K] and [B,H,V].
        g: [B,H,K] or [B,H] log decay <= 0, or None. gv: [B,H,V] log decay of value channels, or None.
        pool: [S,H,K,V] states in float32 (V + 1 with normalize); changed in place, so it takes no gradient.
        slots: [B] integers, the row of the pool that belongs to each request; no row twice. Negative: a request
            without a state (padding of the batch), which yields zeros and changes nothing.
        u: [HQ,K] bonus: the token reads the state before it, and itself through u.
        scale, normalize: as in `chunk_gla`.

    Returns:
        o [B,HQ,V] in the dtype of q.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    _check(q, k, v)
    if g is not None and g.ndim not in (2, 3):
        _checks.fail("g", "[batch, heads] or [batch, heads, width]", f"shape {tuple(g.shape)}")
    _checks.check_decay(None if g is None else g.unsqueeze(1), k.unsqueeze(1), (3, 4))
    _checks.check_decay(None if gv is None else gv.unsqueeze(1), v.unsqueeze(1), (4,), "gv")
    _checks.check_pool(pool, slots, k, v.shape[-1] + normalize)
    if u is not None and u.shape != q.shape[1:]:
        _checks.fail("u", f"shape {list(q.shape[1:])}", tuple(u.shape))
    if normalize and not (u is None and gv is None):
        _checks.fail("normalize", "False with gv or u", True)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    live, dtype = slots >= 0, q.dtype
    if normalize:
        # In float32, so that nothing is rounded before the division.
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1).float()
    with torch.no_grad():
        if on_triton(q) and pool.is_contiguous() and k.shape[-1] <= WIDEST:
            o = pooled_step(q, k, v, g, gv, pool, slots, scale, u is not None)
        else:
            rows = slots.long().clamp(min=0)
            one = (x if x is None else x.float() for x in (q * scale, k, v, g, gv))
            o, state = step(*one, pool[rows], u is not None)
            pool[rows[live]] = state[live]
        if u is not None:
            own = ((q * u).float().unflatten(1, (k.shape[1], -1)) * k.float().unsqueeze(2)).sum(-1, keepdim=True)
            o = o.float() + scale * (own * v.float().unsqueeze(2)).flatten(1, 2)
        if normalize:
            o = o[..., :-1] / o[..., -1:]
        return o.masked_fill(~live.view(-1, 1, 1), 0.0).to(dtype)


def gsa_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    g: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """A token of `fused_recurrent_gsa`: s and g [B,H,M], pool hk [S,H,K,M] and hv [S,H,M,V].

    Everything else, errors included, as in `gated_step`.
    """
    keys, values = pool
    _check(q, k, v)
    _checks.check_pool(values, slots, s, v.shape[-1])
    read = gated_step(q.float(), k.float(), s.float(), None, keys, slots, scale, gv=g)
    return gated_step(read.softmax(-1), s.float(), v.float(), g, values, slots, 1.0).to(q.dtype)


def mlstm_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """A token of `mlstm`: i and f [B,H], pool C [S,H,K,V], n [S,H,K] and m [S,H], all zero at the start of a text.

    Everything else, errors included, as in `gated_step`.
    """
    C, n, m = pool
    _check(q, k, v)
    _checks.check_decay(f.unsqueeze(1), k.unsqueeze(1), (3,), "f")
    if i.shape != k.shape[:2] or not i.is_floating_point():
        _checks.fail("i", f"a floating tensor {list(k.shape[:2])}", f"{i.dtype} {tuple(i.shape)}")
    _checks.check_pool(C, slots, k, v.shape[-1])
    for name, x in (("n", n), ("m", m)):
        if x.shape != C.shape[: x.ndim] or x.ndim != (3 if name == "n" else 2) or x.dtype != torch.float32:
            _checks.fail(f"pool, {name}", "float32 [S,H,K] for n and [S,H] for m", f"{x.dtype} {tuple(x.shape)}")
    with torch.no_grad():
        rows, live = slots.long().clamp(min=0), (slots >= 0).unsqueeze(-1)
        before = m[rows]
        top = torch.maximum(before + f.float(), i.float()).clamp(min=SMALLEST)
        # By addition, because rows without a request all stand for row 0; and read back as what it rounds to.
        grown = torch.where(live, top - before, 0.0)
        m.index_add_(0, rows, grown)
        after = before + grown
        k = k.float() * (i.float() - after).exp().unsqueeze(-1)
        kept = (f.float() + (before - after)).clamp(max=0.0)
        shared = dict(slots=slots, scale=scale)
        o = gated_step(q.float(), k, v.float(), kept, C, **shared)
        total = gated_step(q.float(), k, torch.ones_like(k[..., :1]), kept, n.unsqueeze(-1), **shared)
        floor = (-after).exp().repeat_interleave(q.shape[1] // k.shape[1], 1).unsqueeze(-1)
        return (o / torch.maximum(total.abs(), floor)).to(q.dtype)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            _checks.fail(name, "[batch, heads, width]", f"shape {tuple(x.shape)}")
    _checks.check_qkv(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
