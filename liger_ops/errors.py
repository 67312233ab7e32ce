"""What every door of the three packages checks and says: the argument, what was expected, what was given."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

# Of which products are numbers yet, in float32.
_HEAVIEST = 1e9
_P = ParamSpec("_P")
_R = TypeVar("_R")


def fail(name: str, expected: str, given: object) -> NoReturn:
    """ValueError in the one form that all have."""
    raise ValueError(f"{name}: expected {expected}, got {given}")


def shown(value: object) -> str:
    """What was given, in one line."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else " ".join(repr(value).split())


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        fail(name, "a tensor", type(x).__name__)


def check_known(name: str, value: object, choices: Iterable[str]) -> None:
    """A name that is among the choices, which the refusal lists."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        fail(name, f"one of {', '.join(choices)}", shown(value))


def check_keywords(caller: str, given: Iterable[str], choices: Collection[str]) -> None:
    """TypeError for a keyword that the public function `caller` does not have, with a list of those it has."""
    for name in given:
        if name not in choices:
            raise TypeError(f"{caller}: unexpected argument {name!r}; expected one of {', '.join(choices)}")


def flags_of(call: Callable[..., Any]) -> tuple[tuple[int, str], ...]:
    """Place and name of each parameter that is True or False."""
    parameters = inspect.signature(call).parameters.values()
    kinds = bool, bool | None
    return tuple((i, x.name) for i, x in enumerate(parameters) if isinstance(x.default, bool) or x.annotation in kinds)


def lists_keywords(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """For a public function or constructor: an unknown keyword is answered with its name and the choices.

    A flag is True or False.
    """
    flags = flags_of(call)
    known = dict.fromkeys(name for name in inspect.signature(call).parameters if name != "self")
    title = call.__qualname__.removesuffix(".__init__")

    @functools.wraps(call)
    def door(*args: _P.args, **options: _P.kwargs) -> _R:
        if not options.keys() <= known.keys():
            check_keywords(title, options, known)
        for place, name in flags:
            value = args[place] if place < len(args) else options.get(name)
            # None passes for False, as flash-linear-attention's layers hand it on; what is right costs no call.
            if value is not None and value is not True and value is not False:
                check_flag(name, value)
        return call(*args, **options)

    return door


def check_positive(name: str, value: Any, minimum: int = 1) -> None:
    """An integer from the minimum on, that fits 64 bits."""
    # torch.export writes lengths as SymInt.
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < minimum:
        fail(name, f"an integer >= {minimum}", shown(value))
    # In a trace it would hold the value for its only one.
    if not torch.compiler.is_compiling() and isinstance(value, int) and value.bit_length() > 63:
        fail(name, "an integer below 2^63", value)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(name, "True or False", shown(value))


def check_weight(name: str, value: Any) -> None:
    """A share of a sum, or of a loss."""
    if not _is_number(value) or not 0 <= value <= _HEAVIEST:
        fail(name, f"a weight >= 0 of at most {_HEAVIEST:g}", shown(value))


def check_factor(name: str, value: Any, optional: bool = False) -> None:
    """A temperature, scale, bound or base; None too if optional."""
    if not (optional and value is None) and (not _is_number(value) or not 0 < value < math.inf):
        fail(name, "a number > 0, or None" if optional else "a number > 0", shown(value))


def check_window(window: Any, sinks: Any) -> None:
    """How many tokens stay exact: the last ones and the first ones."""
    check_positive("window", window)
    check_positive("sinks", sinks, 0)


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
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens if on_host is None else on_host)):
        check_tensor(name, x)
        if x.ndim != 1 or x.numel() < 1 or x.dtype not in (torch.int32, torch.int64):
            fail(name, "a 1-d int32 or int64 tensor of sequence bounds", f"{x.dtype} {tuple(x.shape)}")
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
    if on_host is not None and not cu_seqlens.is_cuda and cu_seqlens.tolist() != bounds:
        fail("cu_seqlens_cpu", f"the bounds of cu_seqlens ({cu_seqlens.tolist()})", bounds)
    if longest is not None and any(b - a > longest for a, b in itertools.pairwise(bounds)):
        fail("max_seqlen", "no less than the longest sequence of cu_seqlens", longest)


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
