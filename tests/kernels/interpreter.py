"""Triton's interpreter with the arithmetic of the hardware, and with eyes on every address.

As it comes, the interpreter multiplies and negates the bits of bfloat16 as integers, truncates float32 to bfloat16 and
knows no tf32; it reads and writes outside of tensors silently, and runs programs one by one, which hides their races.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

_GUARD = 1 << 14
# Modules in whose functions the language is that of the interpreter.
_patched: set[str] = set()


def _widen(handle: TensorHandle) -> np.ndarray:
    """The numbers of a handle; those of bfloat16 as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (np.ascontiguousarray(handle.data).astype(np.uint32) << 16).view(np.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounded to nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy().reshape(x.shape)


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 with ten bits of mantissa, the others cut off."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _cast(original):
    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return original(self, src, dst_type)
        if target == tl.bfloat16:
            return TensorHandle(_narrow(src.data), target)
        return TensorHandle(_widen(src).astype(triton_interpreter._get_np_dtype(target)), target)

    return cast


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    x, y = _widen(a), _widen(b)
    if str(input_precision).upper().endswith("TF32") and tl.float32 in (a.dtype.scalar, b.dtype.scalar):
        x, y = _tf32(x), _tf32(y)
    # Matrix units do not warn, and some of what they multiply nobody reads.
    with np.errstate(over="ignore", invalid="ignore"):
        return TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _binary(original):
    def binary(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            return original(self, lhs, rhs, op)
        found = op(_widen(lhs), _widen(rhs))
        return TensorHandle(_narrow(found) if found.dtype == np.float32 else found, lhs.dtype.scalar)

    return binary


def _unary(original):
    def unary(self, arg, op):
        if arg.dtype.scalar != tl.bfloat16:
            return original(self, arg, op)
        return TensorHandle(_narrow(op(_widen(arg))), arg.dtype.scalar)

    return unary


def _call(self, *args, **kwargs):
    """One function of a kernel by another. As it comes, each patches the whole language again: half of all time."""
    if self.fn.__module__ not in _patched:
        triton_interpreter._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def mend_rounding() -> None:
    """Once per process: bfloat16 and tf32 as the hardware rounds them, and no language patched in every call."""
    B = InterpreterBuilder
    if getattr(B, "mended", False):
        return
    B.mended = True
    B.cast_impl, B.create_dot = _cast(B.cast_impl), _dot
    B.binary_op, B.unary_op = _binary(B.binary_op), _unary(B.unary_op)
    B.create_fp_to_fp = lambda self, src, dst_type, rounding_mode: self.cast_impl(src, dst_type)
    InterpretedFunction.__call__ = _call


class KernelFault(AssertionError):
    """A program touched what is not its own."""


class _Memory:
    """The bytes of one storage between guards, and the program that last wrote or read each (-1 none, -2 many)."""

    def __init__(self, storage: torch.UntypedStorage):
        self.storage, size = storage, storage.nbytes()
        self.buffer = torch.full((size + 2 * _GUARD,), 255, dtype=torch.uint8)
        self.inner = self.buffer[_GUARD : _GUARD + size]
        self.inner.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        self.low, self.high = self.inner.data_ptr(), self.inner.data_ptr() + size
        self.writer, self.reader = np.full(size, -1), np.full(size, -1)

    def view(self, x: torch.Tensor) -> torch.Tensor:
        start = x.storage_offset() + _GUARD // x.element_size()
        return torch.empty(0, dtype=x.dtype).set_(self.buffer.untyped_storage(), start, x.shape, x.stride())

    def give_back(self) -> None:
        torch.empty(0, dtype=torch.uint8).set_(self.storage).copy_(self.inner)


class Sanitizer:
    """Watches one launch: bounds, double writes, and what one program does to another's elements."""

    def __init__(self):
        self.memories: dict[int, _Memory] = {}

    def move(self, x):
        if not isinstance(x, torch.Tensor) or not x.numel():
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.memories:
            self.memories[storage.data_ptr()] = _Memory(storage)
        return self.memories[storage.data_ptr()].view(x)

    def check(self, program: int, pointers: TensorHandle, mask: TensorHandle, store: bool) -> None:
        kind = "store" if store else "load"
        where = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64).ravel()
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        missing = np.ones(where.shape, bool)
        for memory in self.memories.values():
            inside = (where >= memory.low) & (where + width <= memory.high)
            missing &= ~inside
            i = where[inside] - memory.low
            written, read = memory.writer[i], memory.reader[i]
            if ((written != -1) & (written != program)).any():
                raise KernelFault(f"{kind} of an element that another program wrote")
            if not store:
                memory.reader[i] = np.where((read == -1) | (read == program), program, -2)
                continue
            if len(np.unique(i)) < len(i):
                raise KernelFault("one store writes an element twice")
            if ((read != -1) & (read != program)).any():
                raise KernelFault("store to an element that another program read")
            memory.writer[i] = program
        if missing.any():
            raise KernelFault(f"{kind} out of bounds: {missing.sum()} of {len(missing)} lanes")


@contextlib.contextmanager
def sanitized() -> Iterator[None]:
    """Every launch inside runs between guards of NaN; what torch.empty returns and masked loads leave open is NaN.

    Nothing watches a GPU.
    """
    if torch.get_default_device().type != "cpu":
        yield
        return
    B, G, watch = InterpreterBuilder, GridExecutor, []
    load, store, call = B.create_masked_load, B.create_masked_store, G.__call__

    def program(builder) -> int:
        x, y, z = builder.grid_idx
        return (x << 40) + (y << 20) + z

    def watched_load(self, pointers, mask, other, *rest):
        watch[-1].check(program(self), pointers, mask, False)
        if other is None:
            kind = triton_interpreter._get_np_dtype(pointers.get_element_ty())
            filler = np.full((*pointers.data.shape, kind.itemsize), 255, np.uint8).view(kind)[..., 0]
            other = TensorHandle(filler, pointers.get_element_ty())
        return load(self, pointers, mask, other, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watch[-1].check(program(self), pointers, mask, True)
        return store(self, pointers, value, mask, *rest)

    def watched_call(self, *args, **kwargs):
        watch.append(Sanitizer())
        try:
            call(self, *map(watch[-1].move, args), **{n: watch[-1].move(x) for n, x in kwargs.items()})
            for memory in watch[-1].memories.values():
                memory.give_back()
        finally:
            watch.pop()

    filled = torch.utils.deterministic.fill_uninitialized_memory
    B.create_masked_load, B.create_masked_store, G.__call__ = watched_load, watched_store, watched_call
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        B.create_masked_load, B.create_masked_store, G.__call__ = load, store, call
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
