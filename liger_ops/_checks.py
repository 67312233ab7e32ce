"""Argument checks at the public door; nothing behind it checks again.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

import itertools

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(name: str, expected: str, given: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {given}")


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, same_length: bool = True, query: str = "q") -> None:
    """q [B,T,HQ,K], k [B,S,H,K], v [B,S,H,V] of one dtype and device, with HQ a multiple of H."""
    for name, x in ((query, q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(name, "[batch, time, heads, width]", f"shape {tuple(x.shape)}")
        if x.dtype not in _FLOATS or x.dtype != q.dtype:
            fail(name, f"a floating dtype equal to that of {query} ({q.dtype})", x.dtype)
        if x.device != q.device:
            fail(name, f"device {q.device} as {query}", x.device)
    B, T, HQ, K = q.shape
    S, H = k.shape[1:3]
    if k.shape != (B, T if same_length else S, H, K):
        fail("k", f"[{B}, {T if same_length else 'S'}, H, {K}] to match {query} {tuple(q.shape)}", tuple(k.shape))
    if v.shape[:3] != k.shape[:3]:
        fail("v", f"[{B}, {S}, {H}, V] to match k", tuple(v.shape))
    if H == 0 or HQ % H:
        hint = f"; {T} heads at length {HQ} look head-first, expected [batch, time, heads, width]" if HQ > T else ""
        fail(query, f"a number of heads divisible by the {H} key/value heads", f"{HQ} heads{hint}")
    if K == 0:
        fail(query, "a width of at least 1", f"shape {tuple(q.shape)}")
    if S < T:
        fail("k", f"at least as many tokens as {query} ({T})", S)


def check_like(name: str, x: torch.Tensor, k: torch.Tensor, tail: str) -> None:
    """x shares batch, time, heads, dtype and device with k; its width is its own."""
    if x.ndim != 4 or x.shape[:3] != k.shape[:3]:
        fail(name, f"[{k.shape[0]}, {k.shape[1]}, {tail}] to match k", tuple(x.shape))
    if x.dtype != k.dtype or x.device != k.device:
        fail(name, f"{k.dtype} on {k.device} as k", f"{x.dtype} on {x.device}")


def check_decay(g: torch.Tensor | None, k: torch.Tensor, ranks: tuple[int, ...], name: str = "g") -> None:
    """g is a log decay <= 0 of one of the given ranks: 1 [H], 3 [B,T,H], 4 [B,T,H,K]."""
    if g is None:
        return
    shapes = {1: (k.shape[2],), 3: tuple(k.shape[:3]), 4: tuple(k.shape)}
    wanted = " or ".join(str(list(shapes[rank])) for rank in ranks) or "None"
    if g.ndim not in ranks or tuple(g.shape) != shapes[g.ndim]:
        fail(name, f"shape {wanted}", tuple(g.shape))
    if g.device != k.device or not g.is_floating_point():
        fail(name, f"a floating tensor on {k.device}", f"{g.dtype} on {g.device}")
    if g.device.type == "cpu" and not torch.compiler.is_compiling() and g.numel() and not g.detach().amax() <= 0:
        fail(name, "log decays <= 0", f"a maximum of {g.detach().amax().item():.4g}")


def check_state(
    state: torch.Tensor | None, sequences: int, k: torch.Tensor, width: int, name: str = "initial_state"
) -> None:
    """initial_state is [N,H,K,V] on the device of k."""
    if state is None:
        return
    shape = (sequences, k.shape[2], k.shape[3], width)
    if tuple(state.shape) != shape:
        fail(name, f"shape {list(shape)}", tuple(state.shape))
    if state.device != k.device:
        fail(name, f"device {k.device}", state.device)


def check_pool(pool: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, width: int) -> None:
    """pool [S,H,K,V] in float32, slots [B] distinct integers below S; negative ones are nobody's."""
    shape = (*k.shape[1:], width)
    if pool.ndim != 4 or tuple(pool.shape[1:]) != shape or pool.dtype != torch.float32:
        fail("pool", f"float32 [S, {', '.join(map(str, shape))}]", f"{pool.dtype} {tuple(pool.shape)}")
    if slots.shape != k.shape[:1] or slots.is_floating_point() or slots.dtype == torch.bool:
        fail("slots", f"integers [{len(k)}]", f"{slots.dtype} {tuple(slots.shape)}")
    for name, x in (("pool", pool), ("slots", slots)):
        if x.device != k.device:
            fail(name, f"device {k.device}", x.device)
    if slots.device.type == "cpu":
        live = slots[slots >= 0]
        if len(live) and live.max() >= len(pool):
            fail("slots", f"numbers below the {len(pool)} rows of the pool", int(live.max()))
        if len(live.unique()) < len(live):
            fail("slots", "no row twice", slots.tolist())


def either(name: str, x: torch.Tensor | None, other: str, y: torch.Tensor | None) -> torch.Tensor | None:
    """Whichever of two names for one argument was given."""
    if x is not None and y is not None:
        fail(other, f"None when {name} is given", tuple(y.shape))
    return y if x is None else x


def check_cu_seqlens(
    cu_seqlens: torch.Tensor | None,
    batch: int,
    length: int,
    on_host: torch.Tensor | None = None,
    longest: int | None = None,
) -> None:
    """cu_seqlens [N+1] rises from 0 to the length.

    Its values are read only outside of captured and compiled graphs; on a GPU not if they are on the host too, nor if
    the caller answers for them with the length of the longest sequence.
    """
    if longest is not None:
        check_positive("max_seqlen", longest, 0)
    if cu_seqlens is None:
        if on_host is not None:
            fail("cu_seqlens", "the bounds of cu_seqlens_cpu on the device", None)
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        fail("cu_seqlens", "a 1-d integer tensor of sequence bounds", f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if batch != 1:
        fail("cu_seqlens", "batch 1 (sequences packed along time)", f"batch {batch}")
    if on_host is not None and on_host.shape != cu_seqlens.shape:
        fail("cu_seqlens_cpu", f"as many bounds as cu_seqlens ({len(cu_seqlens)})", tuple(on_host.shape))
    readable = cu_seqlens if on_host is None else on_host
    if torch.compiler.is_compiling() or _capturing(readable) or (readable.is_cuda and longest is not None):
        return
    bounds = readable.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        fail("cu_seqlens", f"bounds that rise from 0 to {length}", bounds)
    if longest is not None and any(b - a > longest for a, b in itertools.pairwise(bounds)):
        fail("max_seqlen", "no less than the longest sequence of cu_seqlens", longest)


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def check_positive(name: str, value: int, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        fail(name, f"an integer >= {minimum}", value)


def check_chunk_size(size: int | None) -> None:
    """None leaves the choice to the backend."""
    if size is not None:
        check_positive("chunk_size", size)


def check_window(window: int, sinks: int, visible: torch.Tensor | None, k: torch.Tensor) -> None:
    check_positive("window", window)
    check_positive("sinks", sinks, 0)
    if visible is not None and (visible.shape != k.shape[:2] or visible.dtype != torch.bool):
        fail("visible", f"a bool mask {list(k.shape[:2])}", f"{visible.dtype} {tuple(visible.shape)}")
