"""The joint softmax and the window alone on kernels: two opaque ops, and which calls they serve.

Shapes: B batch, T queries, S keys, HQ query heads, H key/value heads, D width, M features, V value width, P sinks.
"""

import functools
import math

import torch

from liger_ops import _checks, _packed
from liger_ops._torch.window import find_sinks

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


def on_kernels(sinks: int, softcap: float, q: torch.Tensor, v: torch.Tensor, *features: torch.Tensor) -> bool:
    """Whether kernels serve attention to these: on a Hopper GPU, unless narrow, wide, float64 or of bounded scores."""
    widths = q.shape[-1], v.shape[-1]
    fits = max(widths) <= _WIDEST and sinks <= _MOST_SINKS and not softcap and q.numel() > 0
    coarse = all(x.dtype != torch.float64 for x in features)
    narrowest = min(*widths, *(x.shape[-1] for x in features))
    return _packed.on_triton(q) and fits and coarse and _is_seen(q.device, narrowest)


def find_keys(k: torch.Tensor, sinks: int, visible: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`find_sinks`; kept for the next call where all keys are visible, nobody writes to it."""
    B, S = k.shape[:2]
    # Neither what is traced or captured, whose tensors hold nothing yet.
    plain = visible is None and type(k) is torch.Tensor and not torch.compiler.is_compiling()
    if not plain or (k.is_cuda and torch.cuda.is_current_stream_capturing()):
        return find_sinks(k, sinks, visible)
    return _plain_keys(B, S, sinks, k.device, torch.is_inference_mode_enabled())


@functools.lru_cache(64)
def _plain_keys(B: int, S: int, sinks: int, device: torch.device, _: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # What is made in inference mode may not be saved outside of it.
    return find_sinks(torch.empty(B, S, 0, device=device), sinks, None)


@torch.library.custom_op("liger_ops::joint_kernels", mutates_args=())
def _joint(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    mix: torch.Tensor,
    state: torch.Tensor,
    column: torch.Tensor,
    rest: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, the last state, of every row the largest score nearby and the log of all weights, to base 2, and h and z."""
    from liger_ops._triton import joint

    return joint.forward(joint.prepare(q, k, v, (q_log, k_log, g, mix), column, rest, window, scale), state)


@_joint.register_fake
def _(q, k, v, q_log, k_log, g, mix, state, column, rest, window, scale):
    row = q.new_empty(q.shape[:3], dtype=torch.float32)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    halves = q.dtype == torch.bfloat16
    shape = q.shape[0] * -(-q.shape[1] // (64 if halves else 32)), *state.shape[1:3]
    h, z = state.new_empty(*shape, v.shape[-1], dtype=q.dtype if halves else torch.float32), state.new_empty(shape)
    return q.new_empty(*q.shape[:3], v.shape[-1]), last, row, torch.empty_like(row), h, z


@torch.library.custom_op("liger_ops::joint_kernels_backward", mutates_args=())
def _joint_backward(
    do: torch.Tensor,
    dstate: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    mix: torch.Tensor,
    column: torch.Tensor,
    rest: torch.Tensor,
    o: torch.Tensor,
    top: torch.Tensor,
    lse: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    window: int,
    scale: float,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, q_log, k_log, mix, state, and of g if there is one."""
    from liger_ops._triton import joint

    call = joint.prepare(q, k, v, (q_log, k_log, g, mix), column, rest, window, scale)
    *found, dg, dmix, dfirst = joint.backward(call, h, z, do, dstate, o, top, lse)
    return [*found, dmix, dfirst] + ([] if g is None else [dg.to(g.dtype)])


@_joint_backward.register_fake
def _(do, dstate, q, k, v, q_log, k_log, g, mix, column, rest, o, top, lse, h, z, window, scale):
    given = q, k, v, q_log, k_log, mix, dstate, *(() if g is None else (g,))
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _refuse_twice(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"liger_ops::{name}_backward: expected one differentiation, got create_graph=True")


def _setup(ctx, inputs, output):
    *tensors, state, column, rest, ctx.window, ctx.scale = inputs
    o, _, *kept = output
    ctx.save_for_backward(*tensors, column, rest, o, *kept)
    ctx.shape = state.shape
    # Zeros for what nobody differentiates are as many as the states.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dstate, *_):
    _refuse_twice("joint_kernels")
    o, mix = ctx.saved_tensors[9], ctx.saved_tensors[6]
    do = torch.zeros_like(o) if do is None else do
    dstate = mix.new_zeros(ctx.shape) if dstate is None else dstate
    grads = _joint_backward(do, dstate, *ctx.saved_tensors, ctx.window, ctx.scale)
    *found, dmix, dfirst = grads[:7]
    return *found, grads[7] if len(grads) > 7 else None, dmix, dfirst, None, None, None, None


_joint.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("liger_ops::window_kernels", mutates_args=())
def _window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    column: torch.Tensor,
    rest: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o, and of every row the log of all weights, to base 2."""
    from liger_ops._triton import joint

    o, _, _, lse, *_ = joint.forward(joint.prepare(q, k, v, None, column, rest, window, scale), None)
    return o, lse


@_window.register_fake
def _(q, k, v, column, rest, window, scale):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("liger_ops::window_kernels_backward", mutates_args=())
def _window_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    column: torch.Tensor,
    rest: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
) -> list[torch.Tensor]:
    """Gradients of q, k and v."""
    from liger_ops._triton import joint

    return joint.backward(joint.prepare(q, k, v, None, column, rest, window, scale), q, q, do, None, o, lse, lse)


@_window_backward.register_fake
def _(do, q, k, v, column, rest, o, lse, window, scale):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]


def _setup_window(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate_window(ctx, do, _):
    _refuse_twice("window_kernels")
    return *_window_backward(do, *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None, None


_window.register_autograd(_differentiate_window, setup_context=_setup_window)


def joint(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_log: torch.Tensor,
    k_log: torch.Tensor,
    g: torch.Tensor | None,
    mix: torch.Tensor,
    state: torch.Tensor,
    column: torch.Tensor,
    rest: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `liger_attention` takes them, g [B,T,H] or None: o [B,T,HQ,V] and the state after the T tokens [B,H,M,V+1].

    column [B,P] of the sinks, S where a row has fewer; rest [B,S] marks the other visible keys.
    """
    T, S = q.shape[1], k.shape[1]
    if g is not None:
        g = g.masked_fill(~rest[:, S - T - window : S - window, None], 0.0)
    _checks.refuse_tangents("joint_kernels", (q, k, v, q_log, k_log, g, mix, state))
    return _joint(q, k, v, q_log, k_log, g, mix, state, column, rest, window, scale)[:2]


def window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    column: torch.Tensor,
    rest: torch.Tensor,
    reach: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `reach` keys and the sinks: o [B,T,HQ,V] and, without a gradient, lse [B,T,HQ]."""
    _checks.refuse_tangents("window_kernels", (q, k, v))
    o, lse = _window(q, k, v, column, rest, torch.sym_min(reach, k.shape[1]), scale)
    return o, lse * math.log(2)
