"""Argument checks at the public door; nothing behind it checks again, forward-mode tangents aside.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from liger_ops.errors import check_positive, check_tensor, check_window, fail, shown

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse_tangents(name: str, tensors: Iterable[Any]) -> None:
    """RuntimeError for forward-mode differentiation, which ops of torch.library would answer with nothing."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors if isinstance(x, torch.Tensor)):
        raise RuntimeError(f"liger_ops::{name}: expected reverse-mode differentiation, got forward-mode tangents")


def as_softcap(softcap: float | None) -> float:
    """The bound of the scores, 0 for none."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf:
        fail("softcap", "a number > 0, or None", shown(softcap))
    return float(softcap)


def as_scale(scale: float | None, width: int) -> float:
    """The factor on the queries, width ** -0.5 unless given: a number, which takes no gradient."""
    if scale is None:
        return width**-0.5
    if isinstance(scale, torch.Tensor) and scale.ndim == 0 and not scale.requires_grad:
        scale = scale.item()
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        given = f"a tensor {tuple(scale.shape)}" if isinstance(scale, torch.Tensor) else type(scale).__name__
        fail("scale", "a number (multiply q by anything that learns)", given)
    if not -math.inf < scale < math.inf or (isinstance(scale, int) and scale.bit_length() > 63):
        fail("scale", "a finite number", scale)
    return scale


def check_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    same_length: bool = True,
    query: str = "q",
    key: str = "k",
    more_values: bool = False,
) -> None:
    """q [B,T,HQ,K], k [B,S,H,K], v [B,S,H,V] of one dtype and device, with HQ a multiple of H.

    more_values: v may have a multiple HV of the heads of k, and then HQ is a multiple of HV, or HV one of HQ.
    """
    for name, x in ((query, q), (key, k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            check_tensor(name, x)
        if x.ndim != 4:
            fail(name, "[batch, time, heads, width]", f"shape {tuple(x.shape)}")
        if q.dtype not in _FLOATS:
            fail(query, "float16, bfloat16, float32 or float64", q.dtype)
        if x.dtype != q.dtype:
            fail(name, f"{q.dtype} as {query}", x.dtype)
        if x.device != q.device:
            fail(name, f"device {q.device} as {query}", x.device)
        if x.layout != torch.strided:
            fail(name, "a dense tensor", x.layout)
    B, T, HQ, K = q.shape
    S, H = k.shape[1:3]
    if k.shape != (B, T if same_length else S, H, K):
        fail(key, f"[{B}, {T if same_length else 'S'}, H, {K}] to match {query} {tuple(q.shape)}", tuple(k.shape))
    if more_values and H and v.shape[2] and v.shape[:2] == k.shape[:2] and v.shape[2] % H == 0:
        # Heads of the state; queries of fewer heads are shared among them.
        H = v.shape[2] if not HQ or v.shape[2] % HQ else HQ
    elif v.shape[:3] != k.shape[:3]:
        heads = f"a multiple of {H}" if more_values else H
        fail("v", f"[{B}, {S}, {heads}, V] to match {key}", tuple(v.shape))
    if HQ == 0 or H == 0 or HQ % H:
        hint = f"; {T} heads at length {HQ} look head-first, expected [batch, time, heads, width]" if HQ > T else ""
        fail(query, f"a positive multiple of the {H} key/value heads", f"{HQ} heads{hint}")
    if K == 0 or v.shape[-1] == 0:
        fail("v" if K else query, "a width of at least 1", f"shape {tuple(v.shape if K else q.shape)}")
    if S < T:
        fail(key, f"at least as many tokens as {query} ({T})", S)


def check_windowed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    sinks: int,
    scale: float | None,
    softcap: float | None,
    visible: torch.Tensor | None,
) -> tuple[float, float]:
    """What windowed attention is given; the scale and the bound of the scores, 0 for none, as numbers."""
    check_qkv(q, k, v, same_length=False)
    # What is plainly right costs no call, which a decoded token notices.
    if not (type(window) is int and 0 < window < 1 << 62 and type(sinks) is int and 0 <= sinks < 1 << 62):
        check_window(window, sinks)
    if visible is not None:
        if not isinstance(visible, torch.Tensor):
            check_tensor("visible", visible)
        if visible.shape != k.shape[:2] or visible.dtype != torch.bool or visible.device != k.device:
            given = f"{visible.dtype} {tuple(visible.shape)} on {visible.device}"
            fail("visible", f"a bool mask {list(k.shape[:2])} on {k.device}", given)
    return as_scale(scale, q.shape[-1]), 0.0 if softcap is None else as_softcap(softcap)


def check_like(name: str, x: torch.Tensor, k: torch.Tensor, tail: str) -> None:
    """x shares batch, time, heads, dtype and device with k; its width is its own."""
    check_tensor(name, x)
    if x.ndim == 4 and x.shape[-1] == 0:
        fail(name, "a width of at least 1", f"shape {tuple(x.shape)}")
    if x.ndim != 4 or x.shape[:3] != k.shape[:3]:
        fail(name, f"[{k.shape[0]}, {k.shape[1]}, {tail}] to match k", tuple(x.shape))
    if x.dtype != k.dtype or x.device != k.device:
        fail(name, f"{k.dtype} on {k.device} as k", f"{x.dtype} on {x.device}")


def check_decay(
    g: torch.Tensor | None, k: torch.Tensor, ranks: tuple[int, ...], name: str = "g", raw: bool = False
) -> None:
    """g is a log decay <= 0, or raw any number, of one of the given ranks: 1 [H], 3 [B,T,H], 4 [B,T,H,K]."""
    if g is None:
        return
    if not isinstance(g, torch.Tensor):
        check_tensor(name, g)
    shapes = {1: (k.shape[2],), 3: tuple(k.shape[:3]), 4: tuple(k.shape)}
    # The text only where it is needed: a compiler that does not know the sizes cannot write them.
    if g.ndim not in ranks or tuple(g.shape) != shapes[g.ndim]:
        wanted = " or ".join(str(list(shapes[rank])) for rank in ranks) or "None"
        fail(name, f"shape {wanted}", tuple(g.shape))
    if g.device != k.device or not g.is_floating_point() or g.layout != torch.strided:
        fail(name, f"a dense floating tensor on {k.device}", f"{g.layout} {g.dtype} on {g.device}")
    if raw or g.device.type != "cpu" or torch.compiler.is_compiling() or not g.numel():
        return
    if not g.detach().amax() <= 0:
        fail(name, "log decays <= 0", f"a maximum of {g.detach().amax().item():.4g}")


def check_logs(name: str, x: torch.Tensor) -> None:
    """Logarithms of weights, whose largest is below infinity; values are read on a CPU only."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() and not x.detach().amax() < math.inf:
        fail(name, "logarithms below infinity", f"a maximum of {x.detach().amax().item():.4g}")


def check_strength(beta: torch.Tensor, v: torch.Tensor, live: torch.Tensor | None = None) -> None:
    """beta [B,T,H] from 0 to 2, beyond which a step would make what it erases larger; of live rows [B] if given."""
    check_tensor("beta", beta)
    if beta.shape != v.shape[:3] or beta.device != v.device or not beta.is_floating_point():
        given = f"{beta.dtype} {tuple(beta.shape)} on {beta.device}"
        fail("beta", f"a floating tensor {list(v.shape[:3])} on {v.device}", given)
    beta = beta if live is None or beta.device.type != "cpu" else beta[live]
    if beta.device.type == "cpu" and not torch.compiler.is_compiling() and beta.numel():
        low, high = (x.item() for x in beta.detach().aminmax())
        if not (low >= 0 and high <= 2):
            fail("beta", "write strengths from 0 to 2", f"{low:.4g} to {high:.4g}")


def keys_first(state: torch.Tensor | None, values_first: bool) -> torch.Tensor | None:
    """initial_state as [N,H,K,V], which came as [N,H,V,K] if values_first."""
    if state is None or not values_first:
        return state
    check_tensor("initial_state", state)
    if state.ndim != 4:
        fail("initial_state", "[N, H, V, K]", f"shape {tuple(state.shape)}")
    return state.transpose(-1, -2)


def check_state(
    state: torch.Tensor | None, sequences: int, k: torch.Tensor, width: int, name: str = "initial_state"
) -> None:
    """initial_state is [N,H,K,V] on the device of k."""
    if state is None:
        return
    if not isinstance(state, torch.Tensor):
        check_tensor(name, state)
    shape = (sequences, k.shape[2], k.shape[3], width)
    if tuple(state.shape) != shape:
        fail(name, f"shape {list(shape)}", tuple(state.shape))
    if state.device != k.device or not state.is_floating_point():
        fail(name, f"a floating tensor on {k.device}", f"{state.dtype} on {state.device}")


def check_parts(state: object, shapes: dict[str, tuple[int, ...]], k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """initial_state is a tuple or list of floating tensors of these names and shapes, on the device of k."""
    if not isinstance(state, (tuple, list)):
        fail("initial_state", f"({', '.join(shapes)})", type(state).__name__)
    if len(state) != len(shapes):
        fail("initial_state", f"({', '.join(shapes)})", f"{type(state).__name__} of {len(state)}")
    for (name, shape), x in zip(shapes.items(), state, strict=True):
        check_tensor(f"initial_state, {name}", x)
        if tuple(x.shape) != shape or x.device != k.device or not x.is_floating_point():
            given = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            fail(f"initial_state, {name}", f"floating {list(shape)} on {k.device}", given)
    return tuple(state)


def check_bonus(u: torch.Tensor, q: torch.Tensor) -> None:
    """u [HQ,K] for q [B,T,HQ,K]."""
    check_tensor("u", u)
    if u.shape != q.shape[2:] or u.device != q.device or not u.is_floating_point():
        fail("u", f"floating {list(q.shape[2:])} on {q.device}", f"{u.dtype} {tuple(u.shape)} on {u.device}")


def check_input_gate(i: torch.Tensor, k: torch.Tensor) -> None:
    """i [B,T,H], any real numbers."""
    check_tensor("i", i)
    if i.shape != k.shape[:3] or i.device != k.device or not i.is_floating_point():
        fail("i", f"a floating tensor {list(k.shape[:3])} on {k.device}", f"{i.dtype} {tuple(i.shape)} on {i.device}")


def check_slots(slots: torch.Tensor, k: torch.Tensor) -> None:
    """slots [B], integers on the device of k."""
    check_tensor("slots", slots)
    if slots.shape != k.shape[:1] or slots.is_floating_point() or slots.dtype == torch.bool:
        fail("slots", f"integers [{len(k)}]", f"{slots.dtype} {tuple(slots.shape)}")
    if slots.device != k.device:
        fail("slots", f"device {k.device}", slots.device)


def check_pool(pool: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, width: int, name: str = "pool") -> None:
    """pool [S,H,K,V] in float32, slots [B] distinct integers below S; negative ones are nobody's."""
    check_tensor(name, pool)
    shape = (*k.shape[1:], width)
    if pool.ndim != 4 or tuple(pool.shape[1:]) != shape or pool.dtype != torch.float32:
        fail(name, f"float32 [S, {', '.join(map(str, shape))}]", f"{pool.dtype} {tuple(pool.shape)}")
    if pool.device != k.device:
        fail(name, f"device {k.device}", pool.device)
    if slots.device.type == "cpu" and not torch.compiler.is_compiling():
        live = slots[slots >= 0]
        if len(live) and live.max() >= len(pool):
            fail("slots", f"numbers below the {len(pool)} rows of the pool", int(live.max()))
        if len(live.unique()) < len(live):
            fail("slots", "no row twice", slots.tolist())


def either(name: str, x: torch.Tensor | None, other: str, y: torch.Tensor | None) -> torch.Tensor | None:
    """Whichever of two names for one argument was given."""
    if x is not None and y is not None:
        check_tensor(other, y)
        fail(other, f"None when {name} is given", tuple(y.shape))
    return y if x is None else x


def check_chunk_size(size: int | None) -> None:
    """None leaves the choice to the backend."""
    if size is not None:
        check_positive("chunk_size", size)
