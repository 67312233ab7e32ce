"""Forward and backward of the kernels beside the naive recurrence in float64.

Shapes: B batch, T time, H key/value heads, HQ = G * H query heads, K key width, V value width, N sequences.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from liger_ops import naive_recurrence
from liger_ops._inputs import RecurrenceInputs
from liger_ops._triton.launch import LAUNCHER, Config, fill, options


class Case(NamedTuple):
    """One draw: sizes, gate, its size per step, chunk, dtype, lengths of packed sequences if any, tokens of a piece."""

    B: int = 1
    T: int = 40
    H: int = 1
    G: int = 1
    K: int = 20
    V: int = 24
    gate: str = "none"
    size: float = 1.0
    chunk: int | None = 32
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    piece: int = LAUNCHER.piece

    def tensors(self) -> dict[str, torch.Tensor | None]:
        B, T = (self.B, self.T) if self.lengths is None else (1, sum(self.lengths))
        N, HQ = B if self.lengths is None else len(self.lengths), self.H * self.G
        g = {"none": None, "head": torch.rand(B, T, self.H), "channel": torch.rand(B, T, self.H, self.K)}[self.gate]
        q, k, v, do = (
            torch.randn(B, T, *tail).to(self.dtype)
            for tail in ((HQ, self.K), (self.H, self.K), (self.H, self.V), (HQ, self.V))
        )
        state, dstate = torch.randn(2, N, self.H, self.K, self.V)
        return dict(q=q, k=k, v=v, g=None if g is None else -self.size * g, state=state, do=do, dstate=dstate)

    def cu_seqlens(self) -> torch.Tensor | None:
        return None if self.lengths is None else torch.tensor([0, *self.lengths]).cumsum(0)


def inputs(case: Any, x: dict[str, torch.Tensor | None]) -> RecurrenceInputs:
    """What kernels take of the tensors of a case."""
    given = {n: y for n, y in x.items() if n not in ("do", "dstate")}
    return RecurrenceInputs(**given, cu_seqlens=case.cu_seqlens(), scale=case.K**-0.5, chunk=case.chunk)


def run(op: Any, case: Any, x: dict[str, torch.Tensor | None], **launcher: Any) -> dict[str, torch.Tensor]:
    """What the module `op` (forward, backward) makes of it: o, the last state, and gradients by name."""
    by, given = LAUNCHER._replace(**(dict(piece=case.piece) | launcher)), inputs(case, x)
    o, last = op.forward(given, launcher=by)
    found = op.backward(given, x["do"], x["dstate"], x["g"] is not None, launcher=by)._asdict()
    return dict(o=o, last=last) | {n: found[n] for n in x if n in found and found[n] is not None}


def cut(module: Any, piece: int) -> None:
    """Long sequences in pieces of so many tokens, wherever the module `prepare`s them from here on."""
    module.prepare = partial(module.prepare, launcher=LAUNCHER._replace(piece=piece))


def tuned(kernel: Any, grid: Callable, named: dict[str, Any]) -> Config:
    """Launches every configuration, as tuning does: what an earlier one wrote must not show."""
    choices = options(kernel.fn.__name__, named["K"], named["V"], named.get("PRECISION", ""))
    for config in choices:
        kernel[grid(config)](**fill(kernel, config, named))
    return choices[-1]


def exact(case: Case, x: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The same in float64, token by token, every sequence by itself."""
    leaves = {n: None if x[n] is None else x[n].double().requires_grad_() for n in ("q", "k", "v", "g", "state")}
    lengths, scale, outputs, states = case.lengths, case.K**-0.5, [], []
    if lengths is None:
        parts = [({n: y for n, y in leaves.items()}, leaves["state"])]
    else:
        split = {n: None if y is None else y.split(lengths, 1) for n, y in leaves.items() if n != "state"}
        parts = [
            ({m: None if y is None else y[n] for m, y in split.items()}, leaves["state"][n : n + 1])
            for n in range(len(lengths))
        ]
    for part, state in parts:
        o, last = naive_recurrence(part["q"], part["k"], part["v"], part["g"], scale, state)
        outputs.append(o)
        states.append(last)
    o, last = torch.cat(outputs, 1), torch.cat(states)
    wanted = [y for y in leaves.values() if y is not None]
    grads = torch.autograd.grad((o, last), wanted, (x["do"].double(), x["dstate"].double()))
    found = dict(zip([n for n, y in leaves.items() if y is not None], grads, strict=True))
    return dict(o=o.detach(), last=last.detach(), **found)


def distances(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative to the norm of what is true; NaN is infinitely far."""
    far = {n: ((found[n].double() - y).norm() / y.norm().clamp(min=1e-30)).item() for n, y in true.items()}
    return {n: float("inf") if d != d else d for n, d in far.items()}
