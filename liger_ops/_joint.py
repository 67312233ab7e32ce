"""The joint softmax and the window alone on kernels: two opaque ops, and which calls they serve.

Shapes: B batch, T queries, S keys, HQ query heads, H key/value heads, D width, M features, V value width, P sinks.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from liger_ops import _checks
from liger_ops._inputs import AttentionInputs, KernelAttentionInputs, Recalled
from liger_ops._torch.attention.recall import recalling
from liger_ops._torch.attention.window import find_sinks
from liger_ops.limits import BLOCK

# What one program holds of a query and a value, and of sinks beside the window.
_WIDEST, _MOST_SINKS = 128, 16
# Where they were seen to be right on a card: compute capability, and no width below.
_SEEN, _NARROWEST = (9, 0), 64


def _is_seen(device: torch.device, width: int) -> bool:
    """Compilers get other cards and widths wrong in other ways; the interpreter none."""
    if device.type != "cuda":
        return True
    # The one of its kind that torch.compile sees through.
    card = torch.cuda.get_device_properties(device)
    return not torch.version.hip and (card.major, card.minor) == _SEEN and width >= _NARROWEST


def serves(x: AttentionInputs) -> bool:
    """Whether kernels do, where they serve anything: on Hopper, but float64, softcap and odd widths."""
    widths = x.q.shape[-1], x.v.shape[-1]
    fits = max(widths) <= _WIDEST and x.sinks <= _MOST_SINKS and not x.softcap and x.q.numel() > 0
    coarse = x.q_log is None or x.q_log.dtype != torch.float64
    narrowest = min(*widths, *(() if x.q_log is None else x.q_log.shape[-1:]))
    return fits and coarse and _is_seen(x.q.device, narrowest)


def find_keys(x: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`find_sinks`; kept for the next call where all keys are visible, nobody writes to it."""
    # Neither what is traced or captured, whose tensors hold nothing yet.
    plain = x.visible is None and type(x.k) is torch.Tensor and not torch.compiler.is_compiling()
    if not plain or (x.k.is_cuda and torch.cuda.is_current_stream_capturing()):
        return find_sinks(x.k, x.sinks, x.visible)
    B, S = x.k.shape[:2]
    return _plain_keys(B, S, x.sinks, x.k.device, torch.is_inference_mode_enabled())


@functools.lru_cache(64)
def _plain_keys(B: int, S: int, sinks: int, device: torch.device, _: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # What is made in inference mode may not be saved outside of it.
    return find_sinks(torch.empty(B, S, 0, device=device), sinks, None)


# `KernelAttentionInputs` as ops of torch.library take them: of the window alone, and with what left it.
_WINDOW = "Tensor q, Tensor k, Tensor v, Tensor column, Tensor rest, int window, float scale"
_JOINT = _WINDOW + ", Tensor q_log, Tensor k_log, Tensor? g, Tensor mix, Tensor state"
_RECALL = _JOINT + ", Tensor left_v, Tensor left_lost, Tensor held_k, Tensor held_v, Tensor held_lost"
# Of the record's fields, those without recall.
_ARGUMENTS = KernelAttentionInputs._fields.index("left_v")
_DIFFERENTIABLE = ("q", "k", "v", "q_log", "k_log", "g", "mix", "state", "left_v", "held_k", "held_v")


def _wanted(x: KernelAttentionInputs) -> list[str]:
    return [n for n in _DIFFERENTIABLE if getattr(x, n) is not None]


def _like(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    x: KernelAttentionInputs, do: torch.Tensor, dstate: torch.Tensor | None, **found: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients that are `_wanted`; found are o, top, lse, h and z."""
    from liger_ops._triton import joint

    return _in_dtypes(x, joint.backward(joint.prepare(x), do, dstate, joint.Outputs(last=None, **found)))


def _in_dtypes(x: KernelAttentionInputs, grads: NamedTuple) -> list[torch.Tensor]:
    return [getattr(grads, n).to(getattr(x, n).dtype) for n in _wanted(x)]


@torch.library.custom_op(
    "liger_ops::joint_kernels",
    mutates_args=(),
    schema=f"({_JOINT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _joint(*inputs):
    """o, the last state, of every row the largest score nearby and the log of all weights, to base 2, and h and z."""
    from liger_ops._triton import joint

    x = KernelAttentionInputs(*inputs)
    return tuple(joint.forward(joint.prepare(x), x.state))


@_joint.register_fake
def _joint_fake(*inputs):
    x = KernelAttentionInputs(*inputs)
    row = x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
    last, halves = _like(x.state), x.q.dtype == torch.bfloat16
    shape = x.q.shape[0] * -(-x.q.shape[1] // (64 if halves else 32)), *last.shape[1:3]
    h = last.new_empty(*shape, x.v.shape[-1], dtype=x.q.dtype if halves else torch.float32)
    return x.q.new_empty(*x.q.shape[:3], x.v.shape[-1]), last, row, torch.empty_like(row), h, last.new_empty(shape)


@torch.library.custom_op(
    "liger_ops::joint_kernels_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor dstate, Tensor o, Tensor top, Tensor lse, Tensor h, Tensor z, {_JOINT}) -> Tensor[]",
)
def _joint_backward(do, dstate, o, top, lse, h, z, *inputs):
    return _backward(KernelAttentionInputs(*inputs), do, dstate, o=o, top=top, lse=lse, h=h, z=z)


@_joint_backward.register_fake
def _joint_backward_fake(do, dstate, o, top, lse, h, z, *inputs):
    x = KernelAttentionInputs(*inputs)
    return [_like(getattr(x, n)) for n in _wanted(x)]


@torch.library.custom_op(
    "liger_ops::recall_kernels",
    mutates_args=(),
    schema=f"({_RECALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _recall(*inputs):
    """As `_joint`; between a row's largest score and the log of all weights, which is in units of it, that of what is
    exact."""
    from liger_ops._triton import joint_recall

    return tuple(joint_recall.forward(KernelAttentionInputs(*inputs)))


@_recall.register_fake
def _(*inputs):
    o, last, row, *rest = _joint_fake(*inputs)
    return o, last, row, torch.empty_like(row), *rest


@torch.library.custom_op(
    "liger_ops::recall_kernels_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor dstate, Tensor o, Tensor top, Tensor exact, Tensor lse, Tensor h, Tensor z, {_RECALL}) "
    "-> Tensor[]",
)
def _recall_backward(do, dstate, o, top, exact, lse, h, z, *inputs):
    from liger_ops._triton import joint_recall

    x = KernelAttentionInputs(*inputs)
    found = joint_recall.Outputs(o, None, top, exact, lse, h, z)
    return _in_dtypes(x, joint_recall.backward(x, do, dstate, found))


@_recall_backward.register_fake
def _(do, dstate, o, top, exact, lse, h, z, *inputs):
    return _joint_backward_fake(do, dstate, o, top, lse, h, z, *inputs)


@torch.library.custom_op("liger_ops::window_kernels", mutates_args=(), schema=f"({_WINDOW}) -> (Tensor, Tensor)")
def _window(*inputs):
    """o, and of every row the log of all weights, to base 2."""
    from liger_ops._triton import joint

    found = joint.forward(joint.prepare(KernelAttentionInputs(*inputs)), None)
    return found.o, found.lse


@_window.register_fake
def _(*inputs):
    x = KernelAttentionInputs(*inputs)
    return x.q.new_empty(*x.q.shape[:3], x.v.shape[-1]), x.q.new_empty(x.q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "liger_ops::window_kernels_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor o, Tensor lse, {_WINDOW}) -> Tensor[]",
)
def _window_backward(do, o, lse, *inputs):
    x = KernelAttentionInputs(*inputs)
    return _backward(x, do, None, o=o, top=lse, lse=lse, h=x.q, z=x.q)


@_window_backward.register_fake
def _(do, o, lse, *inputs):
    x = KernelAttentionInputs(*inputs)
    return [_like(getattr(x, n)) for n in _wanted(x)]


def _save(ctx, inputs, output):
    """The record of an op's arguments, and what of its results its backward takes."""
    x = KernelAttentionInputs(*inputs)
    ctx.numbers = dict(window=x.window, scale=x.scale)
    tensors = {n: y for n, y in x._asdict().items() if n not in ctx.numbers}
    ctx.names, ctx.arguments = list(tensors), len(inputs)
    ctx.save_for_backward(*tensors.values(), *output)


def _differentiate(name, ctx, run):
    """run(found, arguments): the op's gradients, of its arguments in their order."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"liger_ops::{name}_backward: expected one differentiation, got create_graph=True")
    held = ctx.saved_tensors
    count = len(ctx.names)
    x = KernelAttentionInputs(**dict(zip(ctx.names, held[:count], strict=True)), **ctx.numbers)
    grads = dict(zip(_wanted(x), run(held[count:], x[: ctx.arguments]), strict=True))
    return tuple(grads.get(n) for n in x._fields[: ctx.arguments])


def _setup_joint(ctx, inputs, output):
    o, _, *kept = output
    _save(ctx, inputs, (o, *kept))
    # Zeros for what nobody differentiates are as many as the states.
    ctx.set_materialize_grads(False)


def _differentiate_joint(name, op, ctx, do, dstate, *_):
    held = ctx.saved_tensors
    do = torch.zeros_like(held[len(ctx.names)]) if do is None else do
    dstate = torch.zeros_like(held[ctx.names.index("state")]) if dstate is None else dstate
    return _differentiate(name, ctx, lambda found, x: op(do, dstate, *found, *x))


def _differentiate_window(ctx, do, _):
    return _differentiate("window_kernels", ctx, lambda found, x: _window_backward(do, *found, *x))


for _name, _op, _back in (("joint_kernels", _joint, _joint_backward), ("recall_kernels", _recall, _recall_backward)):
    _op.register_autograd(functools.partial(_differentiate_joint, _name, _back), setup_context=_setup_joint)
_window.register_autograd(_differentiate_window, setup_context=_save)


def joint(
    x: AttentionInputs, column: torch.Tensor, rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Recalled | None]:
    """o [B,T,HQ,V], the state after the T tokens [B,H,M,V+1], and what is recalled, for g [B,T,H] or None.

    column [B,P] of the sinks, S where a row has fewer; rest [B,S] marks the other visible keys.
    """
    T, S = x.q.shape[1], x.k.shape[1]
    assert x.mix is not None and x.state is not None
    far: dict[str, Any] = dict(q_log=x.q_log, k_log=x.k_log, g=x.g, mix=x.mix.float(), state=x.state.float())
    there, recalled = rest[:, S - T - x.window : S - x.window], None
    enters = there.unsqueeze(-1)
    if x.recalled is not None:
        leaving, recalled = recalling(x, there, BLOCK)
        far |= leaving
        enters = far.pop("enters")
        far["k_log"] = far["k_log"].masked_fill(~enters.unsqueeze(-1), -torch.inf)
    if x.g is not None:
        far["g"] = far["g"].masked_fill(~enters, 0.0)
    record = KernelAttentionInputs(x.q, x.k, x.v, column, rest, x.window, x.scale, **far)
    _checks.refuse_tangents("joint_kernels" if recalled is None else "recall_kernels", record)
    o, last, *_ = _joint(*record[:_ARGUMENTS]) if recalled is None else _recall(*record)
    return o, last, recalled


def window(x: AttentionInputs, column: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The window's keys and the sinks: o [B,T,HQ,V] and, without a gradient, lse [B,T,HQ]."""
    given = x.q, x.k, x.v, column, rest, torch.sym_min(x.window, x.k.shape[1]), x.scale
    _checks.refuse_tangents("window_kernels", given)
    o, lse = _window(*given)
    return o, lse * math.log(2)
