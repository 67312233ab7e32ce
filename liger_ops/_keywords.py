"""Keywords at the public door of a recurrence: an unknown one is answered with the choices, hints change no number.

What flash-linear-attention's ops take besides: disable_recompute and chunk_indices speed its kernels up and have no
effect here, where backward passes always recompute and chunks follow from cu_seqlens; transpose_state_layout is its
former name for state_v_first; the others only ask for what is not here.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from liger_ops import errors

_P = ParamSpec("_P")
_R = TypeVar("_R")
_HINTS = ("chunk_indices", "cp_context", "disable_recompute")
# What each may be, and why nothing else.
_ABSENT = {
    "cp_context": (None, "one device holds a sequence"),
    "return_intermediate_states": (False, "states between chunks are not kept"),
    "use_graph": (False, "graphs are captured as they are"),
    "max_num_seqs": (None, "cu_seqlens has no padding"),
}


def keywords(absent: str = "") -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """For an op: an unknown keyword is answered with the choices, to which hints and the names in `absent` belong."""

    def decorate(op: Callable[_P, _R]) -> Callable[_P, _R]:
        own = list(inspect.signature(op).parameters)
        either_layout = "state_v_first" in own
        hints = (*absent.split(), *_HINTS)
        choices = (*own, *(["transpose_state_layout"] if either_layout else []), *hints)
        title, flags = op.__name__, errors.flags_of(op)

        @functools.wraps(op)
        def door(*args: _P.args, **options: _P.kwargs) -> _R:
            errors.check_keywords(title, options, choices)
            if either_layout and "transpose_state_layout" in options:
                _rename_layout(options)
            for name in hints:
                if name in options:
                    _check_hint(name, options.pop(name))
            for place, name in flags:
                value = args[place] if place < len(args) else options.get(name)
                if value is not None and value is not True and value is not False:
                    errors.check_flag(name, value)
            return op(*args, **options)

        return door

    return decorate


def another_name(op: Callable[_P, _R], name: str) -> Callable[_P, _R]:
    """An op under a second name, which its errors say."""

    @functools.wraps(inspect.unwrap(op))
    def same(*args: _P.args, **options: _P.kwargs) -> _R:
        return op(*args, **options)

    same.__name__ = same.__qualname__ = name
    same.__doc__ = f"`{op.__name__}` by another name."
    return keywords()(same)


def _rename_layout(options: dict[str, Any]) -> None:
    transposed = options.pop("transpose_state_layout")
    errors.check_flag("transpose_state_layout", transposed)
    if options.get("state_v_first"):
        errors.fail("transpose_state_layout", "nothing beside state_v_first, another name for it", transposed)
    options["state_v_first"] = transposed


def _check_hint(name: str, given: Any) -> None:
    if name in _ABSENT:
        wanted, why = _ABSENT[name]
        if given is not wanted:
            errors.fail(name, f"{wanted} ({why})", type(given).__name__ if wanted is None else errors.shown(given))
    elif name == "disable_recompute":
        errors.check_flag(name, given)
    elif name == "chunk_indices" and given is not None:
        errors.check_tensor(name, given)
        if given.ndim != 2 or given.shape[-1] != 2 or given.dtype not in (torch.int32, torch.int64):
            errors.fail(name, "int32 or int64 [chunks, 2]", f"{given.dtype} {tuple(given.shape)}")
