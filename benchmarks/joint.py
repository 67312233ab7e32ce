"""Liger Attention and its window: distances from float64, and times beside SDPA and flex_attention.

Shapes: B batch, T time, HQ query heads, H key/value heads, D width of everything.
"""

import cProfile
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cases import Heads
from benchmarks.timing import calls, milliseconds, replayed, timed
from liger_ops import liger_attention, sliding_window_attention

WINDOW, WIDE, SINKS, RECALL = 64, 4096, 4, 128
LEAVES = ("q", "k", "v", "q_log", "k_log", "g", "mix", "initial_state")
# Heads of the query and of the key, tokens, window, sinks, gate or not, hidden tokens, tokens recalled.
CASES = {
    "layer": (8, 2, 1000, 64, 4, True, 70, 0),
    "no gate, pairs of sequences": (4, 2, 515, 64, 0, False, 0, 0),
    "one head each": (2, 2, 333, 128, 4, True, 0, 0),
    "three heads, odd window": (6, 2, 300, 100, 2, True, 5, 0),
    "long": (4, 1, 4096, 64, 4, True, 0, 0),
    "recall": (8, 2, 1000, 64, 4, True, 70, 128),
    "recall, no gate, long": (4, 2, 4096, 64, 0, False, 0, 64),
}


def inputs(
    HQ: int,
    H: int,
    T: int,
    window: int,
    sinks: int,
    gate: bool,
    hidden: int,
    recall: int,
    width: int,
    B: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of liger_attention: rotated tensors in the dtype asked for, features, gates, scores and the state,
    where nothing is recalled, in float32."""
    torch.manual_seed(0)
    S, fine = T + window, options | dict(dtype=torch.float32)
    x = dict(q=torch.randn(B, T, HQ, width, **options))
    x |= {n: torch.randn(B, S, H, width, **options) for n in ("k", "v")}
    x |= {f"{n}_log": torch.randn(B, T, m, width, **fine) for n, m in (("q", HQ), ("k", H))}
    x |= dict(g=-torch.rand(B, T, H, **fine) / 16 if gate else None, mix=torch.rand(HQ, **fine))
    x |= dict(window=window, sinks=sinks)
    if recall:
        x |= dict(recall=recall, score=torch.randn(B, T, H, **fine))
    else:
        x |= dict(initial_state=torch.rand(B, H, width, width + 1, **fine))
    visible = torch.arange(S, device=x["q"].device).expand(B, -1) >= window + hidden
    return x | (dict(visible=visible) if hidden else {})


def _weight(x: dict[str, Any], o: torch.Tensor) -> torch.Tensor:
    """The gradient of the output: what hidden queries get has no meaning."""
    weight = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype)
    return weight * x["visible"][:, -o.shape[1] :, None, None] if "visible" in x else weight


def differentiated(x: dict[str, Any], kind: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output, last state and every gradient; in float64 if told."""
    leaves = [n for n in LEAVES if x.get(n) is not None]
    named = {n: x[n].detach().to(kind or x[n].dtype).requires_grad_() for n in leaves}
    o, last = liger_attention(**(x | named), output_final_state=True)
    last = last[0] if isinstance(last, tuple) else last
    weight = _weight(x, o)
    grads = torch.autograd.grad((o, last), list(named.values()), (weight, torch.ones_like(last)))
    return dict(o=(o * (weight != 0)).detach(), last=last.detach()) | dict(zip(named, grads, strict=True))


def windowed(x: dict[str, Any], kind: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    leaves = [x[n].detach().to(kind or x[n].dtype).requires_grad_() for n in ("q", "k", "v")]
    o = sliding_window_attention(*leaves, x["window"], x["sinks"], visible=x.get("visible"))
    weight = _weight(x, o)
    found = (o * (weight != 0)).detach(), *torch.autograd.grad(o, leaves, weight)
    return dict(zip(("window o", "window q", "window k", "window v"), found, strict=True))


def errors(name: str, dtype: torch.dtype, device: torch.device, width: int) -> dict[str, Any]:
    """Relative distances from float64, and whether a second run leaves the same bits."""
    x, row = inputs(*CASES[name], width, B=2 if "pairs" in name else 1, device=device, dtype=dtype), {}
    for op in (differentiated, windowed):
        found, again, true = op(x), op(x), op(x, torch.float64)
        far = {n: (y.double() - true[n]).norm() / true[n].norm() for n, y in found.items()}
        row |= {n: y.item() for n, y in far.items()}
        row["same bits"] = row.get("same bits", True) and all(torch.equal(y, again[n]) for n, y in found.items())
    return row


def _rows(T: int, heads: Heads, device: torch.device, count: int) -> list[torch.Tensor]:
    """q [1,T,HQ,D], then k and v [1,T,H,D] as many times as asked."""
    torch.manual_seed(0)
    options = dict(device=device, dtype=torch.bfloat16)
    return [torch.randn(1, T, n, heads.D, **options) for n in (heads.HQ, *[heads.H] * (count - 1))]


def _liger(measure: Callable, recall: int, T: int, heads: Heads, device: torch.device, rounds: int) -> dict[str, float]:
    options = dict(device=device, dtype=torch.bfloat16)
    x = inputs(heads.HQ, heads.H, T, WINDOW, SINKS, True, 0, recall, heads.D, **options)
    # Which takes no gradient.
    score = {n: x.pop(n) for n in ("score",) if n in x}
    return measure(functools.partial(liger_attention, **score), [], x, device, rounds)


def _window(
    reach: int, sinks: int, measure: Callable, T: int, heads: Heads, device: torch.device, rounds: int
) -> dict[str, float]:
    args = _rows(T, heads, device, 3)
    return measure(lambda *y: (sliding_window_attention(*y, min(reach, T), sinks),), args, {}, device, rounds)


def _causal(T: int, heads: Heads, device: torch.device, rounds: int) -> dict[str, float]:
    args = [x.transpose(1, 2) for x in _rows(T, heads, device, 3)]

    def sdpa(q, k, v):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)

    return timed(sdpa, args, {}, device, rounds)


def _flexible(reach: int, T: int, heads: Heads, device: torch.device, rounds: int) -> dict[str, float]:
    """The window by flex_attention, compiled, without sinks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b, h, i, j):
        return (j <= i) & (i - j < reach)

    mask = torch.compile(create_block_mask)(near, None, None, T, T, device=device.type)
    flex, args = torch.compile(flex_attention), [x.transpose(1, 2) for x in _rows(T, heads, device, 3)]
    if device.type == "cpu":
        # It has no gradient there.
        with torch.no_grad():
            return dict(forward_ms=milliseconds(lambda: flex(*args, block_mask=mask, enable_gqa=True), device, rounds))
    return timed(lambda *y: (flex(*y, block_mask=mask, enable_gqa=True),), args, {}, device, rounds)


def _copied(T: int, heads: Heads, device: torch.device, rounds: int) -> dict[str, float]:
    """q, k and v, as many bytes as a window without sinks must move."""
    pairs = [(x, torch.empty_like(x)) for x in _rows(T, heads, device, 3)]
    return dict(forward_ms=milliseconds(lambda: [y.copy_(x) for x, y in pairs], device, rounds))


# What is timed at every length: (T, heads, device, rounds) -> milliseconds.
TIMED: dict[str, Callable[[int, Heads, torch.device, int], dict[str, float]]] = {
    "liger_attention": functools.partial(_liger, timed, 0),
    f"liger_attention, recall {RECALL}": functools.partial(_liger, timed, RECALL),
    f"window {WINDOW}": functools.partial(_window, WINDOW, SINKS, timed),
    f"window {WIDE}": functools.partial(_window, WIDE, 0, timed),
    f"flex_attention, window {WINDOW}": functools.partial(_flexible, WINDOW),
    f"flex_attention, window {WIDE}": functools.partial(_flexible, WIDE),
    "sdpa causal": _causal,
    "copy of q, k and v": _copied,
    "liger_attention, replayed": functools.partial(_liger, replayed, 0),
    f"window {WINDOW}, replayed": functools.partial(_window, WINDOW, SINKS, replayed),
}


def host(T: int, heads: Heads, device: torch.device) -> dict[str, float]:
    """Milliseconds of the host in one forward and backward, where they go, and how often."""
    x = inputs(heads.HQ, heads.H, T, WINDOW, SINKS, True, 0, 0, heads.D, device=device, dtype=torch.bfloat16)
    both, count = calls(liger_attention, [], x)["both_ms"], 10
    both()
    profile = cProfile.Profile()
    profile.runcall(lambda: [both() for _ in range(count)])
    spent = sorted(profile.getstats(), key=lambda entry: -entry.inlinetime)[:24]
    named = {(x.code if isinstance(x.code, str) else f"{x.code.co_filename[-40:]} {x.code.co_name}"): x for x in spent}
    return {f"{n} x{x.callcount / count:g}": 1e3 * x.inlinetime / count for n, x in named.items()}


def kernels(T: int, heads: Heads, device: torch.device) -> dict[str, float]:
    """Milliseconds of each kernel of one forward and backward, as the profiler has them."""
    x = inputs(heads.HQ, heads.H, T, WINDOW, SINKS, True, 0, 0, heads.D, device=device, dtype=torch.bfloat16)
    differentiated(x)
    with torch.profiler.profile() as profile:
        differentiated(x)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    return {f"{row.key[:60]} x{row.count}": row.self_device_time_total / 1e3 for row in rows[:24]}
