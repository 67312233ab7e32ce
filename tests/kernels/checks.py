"""What every kernel must do, in small: checks that pass, or raise whatever is wrong.

A check runs the kernels that liger_ops imports at that moment, between guards; `test_mutants` gives it faulty ones.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import triton
import triton.language as tl

import liger_ops
from liger_ops import _devices, naive_delta_rule, naive_recurrence, naive_rwkv6
from tests.kernels import cases, test_additive, test_delta, test_joint
from tests.kernels.cases import Case, distances
from tests.kernels.interpreter import sanitized

KERNELS = liger_ops.__name__ + "._triton."


def _module(name: str):
    return importlib.import_module(KERNELS + name)


@contextmanager
def _on_kernels() -> Iterator[None]:
    """Public ops on kernels but for float64."""
    usual, _devices.on_triton = _devices.on_triton, lambda q: q.dtype != torch.float64
    try:
        with sanitized():
            yield
    finally:
        _devices.on_triton = usual


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    usual, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = usual


def _within(far: dict[str, float], bars: dict[str, float]) -> None:
    assert all(d <= bars[n] for n, d in far.items()), far


@functools.cache
def _drawn(case: Case | test_delta.Case, least: float = 0.0):
    torch.manual_seed(0)
    x = case.tensors()
    if least:
        x["g"] -= least
    return x, (test_delta if isinstance(case, test_delta.Case) else cases).exact(case, x)


@triton.jit
def product_kernel(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    o_a = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    # Looked up in each run: it is not always the same module.
    tl.store(c + o_a, tiles.dot(tl.load(a + o_a), tl.load(b + o_a), PRECISION))


def check_dot(a: torch.dtype, b: torch.dtype, precision: str, bar: float) -> None:
    """A product of two dtypes keeps the digits that its precision promises."""
    global tiles
    tiles, N = _module("tiles"), 32
    torch.manual_seed(0)
    x, y = torch.randn(N, N).to(a), torch.randn(N, N).to(b)
    true = x.double() @ y.double()
    c = torch.empty(N, N, dtype=torch.float64)
    with sanitized():
        product_kernel[(1,)](x, y, c, N, precision)
    _within(distances(dict(c=c), dict(c=true)), dict(c=bar))


def check_additive(case: Case, bars=test_additive.BARS, least: float = 0.0) -> None:
    """Every gate as strong as `least` at least."""
    x, true = _drawn(case, least)
    with sanitized():
        found = cases.run(_module("additive"), case, x)
    _within(distances(found, true), bars)


def check_delta(case: test_delta.Case, bars=test_delta.BARS) -> None:
    x, true = _drawn(case)
    with sanitized():
        found = cases.run(_module("delta"), case, x)
    _within(distances(found, true), bars)


def check_tf32(case: Case) -> None:
    with _tf32():
        check_additive(case, dict.fromkeys(test_additive.BARS, 5e-4) | dict(g=2e-3))


@functools.cache
def _joint(alone: bool, sizes: tuple):
    torch.manual_seed(0)
    x = test_joint.make(**dict(sizes))
    # What is far must not fade before it is read.
    x["g"] = None if x["g"] is None else 0.1 * x["g"]
    if x["visible"] is not None:
        x["do"] *= _asked(x)
    return x, _run_joint(alone, x, torch.float64)


def _asked(x) -> torch.Tensor:
    """The queries that are not hidden: what others get means nothing."""
    return x["visible"][:, -x["q"].shape[1] :, None, None]


def _run_joint(alone: bool, x, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    found = (test_joint.run_window if alone else test_joint.run)(x, dtype)
    return found if x["visible"] is None else found | dict(o=found["o"] * _asked(x))


def check_joint(alone: bool, piece: int = 1024, **sizes) -> None:
    """The window alone, or the joint softmax."""
    x, true = _joint(alone, tuple(sizes.items()))
    cases.cut(_module("joint"), piece)
    with _on_kernels():
        found = _run_joint(alone, x)
    if "dtype" not in sizes:
        return test_joint.check(found, true, 2e-6)
    floor = distances({n: y.to(sizes["dtype"]) for n, y in true.items()}, true)
    _within(distances(found, true), {n: 3 * y for n, y in floor.items()})


def check_tokens(gate: str, values: bool, beta: bool) -> None:
    """A few tokens at once: decays of keys, of values, writes that erase."""
    torch.manual_seed(0)
    B, T, H, HQ, K, V = 2, 3, 2, 4, 20, 24
    q, k, v = torch.randn(B, T, HQ, K), 0.3 * torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    g = {"none": None, "head": -torch.rand(B, T, H), "channel": -torch.rand(B, T, H, K)}[gate]
    gv, state = -torch.rand(B, T, H, V) if values else None, torch.randn(B, H, K, V)
    exactly = [None if x is None else x.double() for x in (q, k, v, g, gv)]
    if beta:
        written = torch.rand(B, T, H)
        true = naive_delta_rule(*exactly[:3], written.double(), exactly[3], 0.3, state.double())
        op = dict(none="chunk_delta_rule", head="chunk_gated_delta_rule", channel="chunk_kda")[gate]
        args = q, k, v, *(() if g is None else (g,)), written
    else:
        true = naive_recurrence(*exactly[:4], 0.3, state.double(), gv=exactly[4])
        op, args = "chunk_simple_gla" if gate == "head" else "fused_recurrent_gla", (q, k, v, g)
    more = dict(gv=gv) if values else {}
    with torch.no_grad(), _on_kernels():
        found = getattr(liger_ops, op)(*args, scale=0.3, initial_state=state, output_final_state=True, **more)
    _within(distances(dict(zip("oh", found, strict=True)), dict(zip("oh", true, strict=True))), dict(o=1e-6, h=1e-6))


def check_pool(kind: str) -> None:
    """A token for each request of a pool, one of which has no state: the others' are left alone."""
    torch.manual_seed(0)
    B, H, HQ, K, V = 3, 2, 4, 20, 24
    q, k, v = torch.randn(B, HQ, K), 0.3 * torch.randn(B, H, K), torch.randn(B, H, V)
    g, slots, start = -torch.rand(B, H, K), torch.tensor([4, -1, 0]), torch.randn(6, H, K, V)
    more = dict(gv=-torch.rand(B, H, V), u=torch.randn(HQ, K), beta=torch.rand(B, H))
    more = {n: x for n, x in more.items() if n == kind}
    pool, live = start.clone(), slots >= 0
    with _on_kernels():
        o = liger_ops.gated_step(q, k, v, g, pool, slots, 0.3, **more)
    x = [y[live].unsqueeze(1).double() for y in (q, k, v, g)]
    extra = {n: y.double() if n == "u" else y[live].unsqueeze(1).double() for n, y in more.items()}
    first = start[slots[live]].double()
    if kind == "beta":
        wanted, last = naive_delta_rule(*x[:3], extra["beta"], x[3], 0.3, first)
    elif kind == "u":
        wanted, last = naive_rwkv6(*x, extra["u"], 0.3, first)
    else:
        wanted, last = naive_recurrence(*x, 0.3, first, **extra)
    twin = start.double()
    twin[slots[live]] = last
    assert not o[~live].any()
    _within(distances(dict(o=o[live], pool=pool), dict(o=wanted[:, 0], pool=twin)), dict(o=1e-6, pool=1e-6))


_ADDITIVE = [
    Case(gate="none", T=17, chunk=16, H=2),
    Case(gate="head", T=19, chunk=16, H=2, G=2),
    Case(gate="channel", T=17, chunk=16, size=0.1, G=2),
    Case(gate="channel", T=32, chunk=16, K=72, V=16, size=30.0),
    Case(gate="channel", T=36, chunk=32, size=1.0, H=2),
    Case(gate="channel", T=40, chunk=32, size=8.4, H=2),
    *test_additive.CLEAN,
]
_DELTA = [
    test_delta.Case(gate="none", T=17, chunk=16),
    test_delta.Case(gate="head", T=19, chunk=16, G=2),
    test_delta.Case(gate="channel", T=19, chunk=16, H=2),
    test_delta.Case(gate="head", T=35, chunk=32),
    *test_delta.CLEAN,
]
_JOINT = [
    dict(T=19, W=5, H=2, G=1, sinks=0, V=16, D=16, M=16),
    dict(T=20, W=5, G=1, sinks=2, hidden=7, B=2, M=72),
    dict(T=35, W=40, G=1, sinks=1, ahead=2, gate=False),
    dict(T=33, W=70, G=1, V=72, D=16, M=16),
    dict(T=35, W=9, H=2, G=2, M=40, hidden=3, D=12, V=18),
    dict(T=66, W=35, G=1, sinks=3, ahead=1),
    *test_joint.CLEAN[::2],
]
_HALF = dict(T=70, W=20, G=2, D=16, V=16, M=18, dtype=torch.bfloat16)
_DOT = [
    (torch.float32, torch.float32, "ieee", 2e-7),
    (torch.float32, torch.float32, "tf32", 3.5e-4),
    (torch.float32, torch.float16, "tf32", 3.5e-4),
    (torch.float32, torch.float16, "ieee", 3e-7),
    (torch.float32, torch.bfloat16, "tf32", 1e-5),
    (torch.bfloat16, torch.float32, "tf32", 1e-5),
    (torch.float32, torch.bfloat16, "tf32x3", 3e-7),
    (torch.bfloat16, torch.float32, "tf32x3", 3e-7),
    (torch.bfloat16, torch.bfloat16, "tf32", 2e-7),
    (torch.float64, torch.float32, "ieee", 1e-15),
    (torch.float32, torch.float64, "ieee", 1e-15),
]
CHECKS: list[Callable[[], None]] = [
    *(partial(check_dot, *case) for case in _DOT),
    *(partial(check_tokens, gate, False, beta) for gate in ("none", "head", "channel") for beta in (False, True)),
    partial(check_tokens, "channel", True, False),
    *(partial(check_pool, kind) for kind in ("", "gv", "u", "beta")),
    *(partial(check_additive, case) for case in _ADDITIVE),
    *(partial(check_delta, case) for case in _DELTA),
    partial(check_additive, Case(gate="head", T=19, chunk=16, size=15.0), least=15.0),
    partial(check_tf32, Case(gate="head", T=36, chunk=32, G=2)),
    *(partial(check_joint, alone, **sizes) for sizes in _JOINT for alone in (True, False)),
    partial(check_joint, False, 64, T=130, W=5, G=1, D=16, V=16, M=16, sinks=0),
    # Fewer keys than a window reaches back to.
    partial(check_joint, True, T=40, W=20, G=1, ahead=-20, B=2, sinks=1),
    *(partial(check_joint, alone, **_HALF) for alone in (True, False)),
]
