"""One decoded token per request, its state updated in place in a pool that all requests share: what a server needs.

Shapes: B requests, S rows of a pool, HQ query heads, H key/value heads (HQ = G * H), K key width, V value width,
M slots of gated slot attention.
"""

import torch

from liger_ops import _checks, errors
from liger_ops._inputs import RecurrenceInputs
from liger_ops._kernels import pooled_step
from liger_ops._mlstm import stable_denominator
from liger_ops._norms import normalized
from liger_ops.limits import SMALLEST_UNIT


@errors.lists_keywords
@torch.no_grad()
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
    beta: torch.Tensor | None = None,
    normalize: bool = False,
) -> torch.Tensor:
    """A token of `fused_recurrent_gla` and its relatives, with u of RWKV-6, with beta of the delta rule.

    Args:
        q: [B,HQ,K] queries. k, v: [B,H,K] and [B,H,V].
        g: [B,H,K] or [B,H] log decay <= 0, or None. gv: [B,H,V] log decay of value channels, or None.
        pool: [S,H,K,V] states in float32 (V + 1 with normalize); changed in place, so it takes no gradient.
        slots: [B] integers, the row of the pool that belongs to each request; no row twice. Negative: a request
            without a state (padding of the batch), which yields zeros and changes nothing.
        u: [HQ,K] bonus: the token reads the state before it, and itself through u.
        beta: [B,H] write strength from 0 to 2; alone of gv, u and normalize.
        scale, normalize: as in `chunk_gla`.

    Returns:
        o [B,HQ,V] in the dtype of q.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    live = _check(q, k, v, slots)
    if g is not None:
        errors.check_tensor("g", g)
    if g is not None and g.ndim not in (2, 3):
        errors.fail("g", "[batch, heads] or [batch, heads, width]", f"shape {tuple(g.shape)}")
    _check_decay("g", g, k, live, (3, 4))
    _check_decay("gv", gv, v, live, (4,))
    _checks.check_pool(pool, slots, k, v.shape[-1] + normalize)
    if u is not None:
        _checks.check_bonus(u, q.unsqueeze(1))
    if normalize and not (u is None and gv is None):
        errors.fail("normalize", "False with gv or u", True)
    if beta is not None:
        errors.check_tensor("beta", beta)
        if beta.ndim != 2:
            errors.fail("beta", f"shape {list(v.shape[:2])}", tuple(beta.shape))
        if normalize or u is not None or gv is not None:
            errors.fail("beta", "None with gv, u or normalize", tuple(beta.shape))
        _checks.check_strength(beta.unsqueeze(1), v.unsqueeze(1), live)
    scale = _checks.as_scale(scale, q.shape[-1])
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    x = RecurrenceInputs(q, k, v.float(), g, gv, beta, pool, scale=scale)
    o = pooled_step(x, slots, before=u is not None)
    if u is not None:
        own = ((q.float() * u.float()).unflatten(1, (k.shape[1], -1)) * k.float().unsqueeze(2)).sum(-1, keepdim=True)
        o = o + scale * (own * v.float().unsqueeze(2)).flatten(1, 2)
    o = normalized(o) if normalize else o
    return o.masked_fill(~live.view(-1, 1, 1), 0.0).to(q.dtype)


@errors.lists_keywords
@torch.no_grad()
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
    keys, values = _parts(pool, "hk", "hv")
    live = _check(q, k, v, slots)
    errors.check_tensor("s", s)
    _checks.check_like("s", s.unsqueeze(1), k.unsqueeze(1), "H, M")
    if g is None:
        errors.fail("g", f"shape {list(s.shape)}", None)
    _check_decay("g", g, s, live, (4,))
    _checks.check_pool(keys, slots, k, s.shape[-1], "pool[0]")
    _checks.check_pool(values, slots, s, v.shape[-1], "pool[1]")
    scale, dtype = _checks.as_scale(scale, q.shape[-1]), q.dtype
    q, k, v, s, g = (x.float() for x in (q, k, v, s, g))
    read = pooled_step(RecurrenceInputs(q, k, s, gv=g, state=keys, scale=scale), slots)
    o = pooled_step(RecurrenceInputs(read.softmax(-1), s, v, g, state=values), slots)
    return o.masked_fill(~live.view(-1, 1, 1), 0.0).to(dtype)


@errors.lists_keywords
@torch.no_grad()
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
    C, n, m = _parts(pool, "C", "n", "m")
    live = _check(q, k, v, slots)
    for name, x in (("i", i), ("f", f)):
        errors.check_tensor(name, x)
    _check_decay("f", f, k, live, (3,))
    _checks.check_input_gate(i.unsqueeze(1), k.unsqueeze(1))
    _checks.check_pool(C, slots, k, v.shape[-1], "pool, C")
    for name, x, rank in (("n", n, 3), ("m", m, 2)):
        if x.shape != C.shape[:rank] or x.dtype != torch.float32 or x.device != C.device:
            expected = f"float32 {list(C.shape[:rank])} on {C.device}"
            errors.fail(f"pool, {name}", expected, f"{x.dtype} {tuple(x.shape)} on {x.device}")
    scale = _checks.as_scale(scale, q.shape[-1])
    rows, dtype = slots.long().clamp(min=0), q.dtype
    q, k, v, i, f = (x.float() for x in (q, k, v, i, f))
    before = m[rows].masked_fill(~live.unsqueeze(-1), 0.0)
    top = torch.maximum(before + f, i).clamp(min=SMALLEST_UNIT)
    # By addition, because rows without a request all stand for row 0; and read back as what it rounds to.
    grown = (top - before).masked_fill(~live.unsqueeze(-1), 0.0)
    m.index_add_(0, rows, grown)
    after = before + grown
    k = k * (i - after).exp().unsqueeze(-1)
    # A rounding above 0 now and then, which undoes those below.
    kept = f + (before - after)
    x = RecurrenceInputs(q, k, v, kept, state=C, scale=scale)
    o = pooled_step(x, slots)
    total = pooled_step(x._replace(v=torch.ones_like(k[..., :1]), state=n.unsqueeze(-1)), slots)
    o = o / stable_denominator(total, after, q.shape[1])
    return o.masked_fill(~live.view(-1, 1, 1), 0.0).to(dtype)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Which requests have a state."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        errors.check_tensor(name, x)
        if x.ndim != 3:
            errors.fail(name, "[batch, heads, width]", f"shape {tuple(x.shape)}")
    _checks.check_qkv(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
    _checks.check_slots(slots, k)
    return slots >= 0


def _parts(pool: object, *names: str) -> tuple[torch.Tensor, ...]:
    """The tensors of a pool."""
    if not isinstance(pool, tuple | list) or len(pool) != len(names):
        given = f"{type(pool).__name__} of {len(pool)}" if isinstance(pool, tuple | list) else type(pool).__name__
        errors.fail("pool", f"({', '.join(names)})", given)
    for name, x in zip(names, pool, strict=True):
        errors.check_tensor(f"pool, {name}", x)
    return tuple(pool)


def _check_decay(
    name: str, g: torch.Tensor | None, k: torch.Tensor, live: torch.Tensor, ranks: tuple[int, ...]
) -> None:
    """Of requests without a state only the shape."""
    if g is not None:
        errors.check_tensor(name, g)
    if g is not None and len(g) == len(live) and g.is_floating_point() and g.device == live.device:
        g = g.masked_fill(~live.view(-1, *[1] * (g.ndim - 1)), 0.0)
    _checks.check_decay(g if g is None else g.unsqueeze(1), k.unsqueeze(1), ranks, name)
