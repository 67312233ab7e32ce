"""Argument checks at the public door; nothing behind it checks again.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences.
"""

import itertools

import torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(name: str, expected: str, given: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {given}")


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, same_length: bool = True) -> None:
    """q [B,T,HQ,K], k [B,S,H,K], v [B,S,H,V] of one dtype and device, with HQ a multiple of H."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(name, "[batch, time, heads, width]", f"shape {tuple(x.shape)}")
        if x.dtype not in _FLOATS or x.dtype != q.dtype:
            fail(name, f"a floating dtype equal to that of q ({q.dtype})", x.dtype)
        if x.device != q.device:
            fail(name, f"device {q.device} as q", x.device)
    B, T, HQ, K = q.shape
    S, H = k.shape[1:3]
    if k.shape != (B, T if same_length else S, H, K):
        fail("k", f"[{B}, {T if same_length else 'S'}, H, {K}] to match q {tuple(q.shape)}", tuple(k.shape))
    if v.shape[:3] != k.shape[:3]:
        fail("v", f"[{B}, {S}, {H}, V] to match k", tuple(v.shape))
    if H == 0 or HQ % H:
        hint = f"; {T} heads at length {HQ} look head-first, expected [batch, time, heads, width]" if HQ > T else ""
        fail("q", f"a number of heads divisible by the {H} key/value heads", f"{HQ} heads{hint}")
    if S < T:
        fail("k", f"at least as many tokens as q ({T})", S)


def check_decay(g: torch.Tensor | None, k: torch.Tensor, ranks: tuple[int, ...]) -> None:
    """g is a log decay <= 0 of one of the given ranks: 1 [H], 3 [B,T,H], 4 [B,T,H,K]."""
    if g is None:
        return
    shapes = {1: (k.shape[2],), 3: tuple(k.shape[:3]), 4: tuple(k.shape)}
    wanted = " or ".join(str(list(shapes[rank])) for rank in ranks)
    if g.ndim not in ranks or tuple(g.shape) != shapes[g.ndim]:
        fail("g", f"shape {wanted}", tuple(g.shape))
    if g.device != k.device or not g.is_floating_point():
        fail("g", f"a floating tensor on {k.device}", f"{g.dtype} on {g.device}")
    if g.device.type == "cpu" and g.numel() and not g.detach().amax() <= 0:
        fail("g", "log decays <= 0", f"a maximum of {g.detach().amax().item():.4g}")


def check_state(state: torch.Tensor | None, sequences: int, k: torch.Tensor, width: int) -> None:
    """initial_state is [N,H,K,V] on the device of k."""
    if state is None:
        return
    shape = (sequences, k.shape[2], k.shape[3], width)
    if tuple(state.shape) != shape:
        fail("initial_state", f"shape {list(shape)}", tuple(state.shape))
    if state.device != k.device:
        fail("initial_state", f"device {k.device}", state.device)


def check_cu_seqlens(cu_seqlens: torch.Tensor | None, batch: int, length: int) -> list[int]:
    """Sequence bounds as a Python list; [0, length] when cu_seqlens is None."""
    if cu_seqlens is None:
        return [0, length]
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        fail("cu_seqlens", "a 1-d integer tensor of sequence bounds", f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if batch != 1:
        fail("cu_seqlens", "batch 1 (sequences packed along time)", f"batch {batch}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        fail("cu_seqlens", f"bounds that rise from 0 to {length}", bounds)
    return bounds


def check_positive(name: str, value: int, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        fail(name, f"an integer >= {minimum}", value)
