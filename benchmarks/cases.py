"""Every op with arguments that suit it, and its distance from float64.

Shapes: B batch, T time, HQ query heads, H key/value heads, D width, SLOTS of a slot memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import liger_ops

HQ, H, D, SLOTS = 32, 8, 128, 64


class Heads(NamedTuple):
    """HQ query heads over H key/value heads, and the width of each."""

    HQ: int = HQ
    H: int = H
    D: int = D


class Op(NamedTuple):
    """What an op takes besides q, k and v (B, T, Heads, tensor options -> arguments), and where fla keeps its own."""

    more: Callable[..., dict]
    fla: str | None
    first: str = "qkv"


def decay(*shape: int, **options: Any) -> torch.Tensor:
    return -torch.rand(*shape, **options) / 16


def erasing(*shape: int, **options: Any) -> dict[str, Any]:
    return dict(beta=torch.rand(*shape, **options), use_qk_l2norm_in_kernel=True)


OPS = {
    "chunk_gla": Op(lambda B, T, n, **x: dict(g=decay(B, T, n.H, n.D, **x)), "fla.ops.gla"),
    "fused_recurrent_gla": Op(lambda B, T, n, **x: dict(gk=decay(B, T, n.H, n.D, **x)), "fla.ops.gla"),
    "chunk_simple_gla": Op(lambda B, T, n, **x: dict(g=decay(B, T, n.H, **x)), "fla.ops.simple_gla"),
    "fused_recurrent_simple_gla": Op(lambda B, T, n, **x: dict(g=decay(B, T, n.H, **x)), "fla.ops.simple_gla"),
    "chunk_retention": Op(lambda *_, **x: {}, "fla.ops.retention"),
    "chunk_lightning_attn": Op(lambda *_, **x: dict(layer_idx=1, num_layers=4), "fla.ops.lightning_attn"),
    "chunk_linear_attn": Op(lambda *_, **x: dict(normalize=False), "fla.ops.linear_attn"),
    "chunk_hgrn2": Op(lambda B, T, n, **x: dict(g=decay(B, T, n.H, n.D, **x)), None, "qv"),
    "chunk_rwkv6": Op(
        lambda B, T, n, **x: dict(w=decay(B, T, n.H, n.D, **x), u=torch.ones(n.HQ, n.D, **x)), "fla.ops.rwkv6"
    ),
    "chunk_gsa": Op(
        lambda B, T, n, **x: dict(s=torch.randn(B, T, n.H, SLOTS, **x), g=decay(B, T, n.H, SLOTS, **x)), "fla.ops.gsa"
    ),
    "chunk_delta_rule": Op(lambda B, T, n, **x: erasing(B, T, n.H, **x), "fla.ops.delta_rule"),
    "chunk_gated_delta_rule": Op(
        lambda B, T, n, **x: dict(g=decay(B, T, n.H, **x)) | erasing(B, T, n.H, **x), "fla.ops.gated_delta_rule"
    ),
    "chunk_kda": Op(lambda B, T, n, **x: dict(g=decay(B, T, n.H, n.D, **x)) | erasing(B, T, n.H, **x), "fla.ops.kda"),
    "mlstm": Op(lambda B, T, n, **x: dict(i=torch.randn(B, T, n.H, **x), f=decay(B, T, n.H, **x)), None),
}


def inputs(B: int, T: int, name: str, repeated: bool, heads: Heads, **options: Any) -> tuple[list, dict]:
    """q, k, v (or q, v) and the op's own arguments; repeated as an op without grouped heads wants them."""
    torch.manual_seed(0)
    tensors = {
        x: torch.randn(B, T, n, heads.D, **options) for x, n in (("q", heads.HQ), ("k", heads.H), ("v", heads.H))
    }
    more = OPS[name].more(B, T, heads, **options)

    def repeat(n: str, x: Any) -> Any:
        return x if n in "qu" or not isinstance(x, torch.Tensor) else x.repeat_interleave(heads.HQ // heads.H, 2)

    if repeated:
        tensors, more = ({n: repeat(n, x) for n, x in given.items()} for given in (tensors, more))
    return [tensors[x] for x in OPS[name].first], more


def tensors_of(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: x for n, x in named.items() if isinstance(x, torch.Tensor)}


def leaves_of(named: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    return named | {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in tensors_of(named).items()}


def _differentiated(
    name: str, args: list, more: dict, dtype: torch.dtype, kind: torch.dtype
) -> dict[str, torch.Tensor]:
    """Output, last state and every gradient in `kind` of arguments rounded to `dtype`."""
    leaves = [x.to(dtype).to(kind).requires_grad_() for x in args]
    # Gates stay as fine as they are given, what the state is made of does not.
    named = more | {n: x.to(dtype) for n, x in more.items() if n == "s"}
    named = leaves_of(named, torch.float64) if kind == torch.float64 else leaves_of(named)
    o, last = getattr(liger_ops, name)(*leaves, **named, output_final_state=True)
    last = last[0] if isinstance(last, tuple) else last
    weights = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype)
    tensors = tensors_of(named)
    grads = torch.autograd.grad((o, last), [*leaves, *tensors.values()], (weights, torch.ones_like(last)))
    return dict(zip(["o", "last", *OPS[name].first, *tensors], [o, last, *grads], strict=True))


def errors(name: str, T: int, dtype: torch.dtype, device: torch.device, heads: Heads) -> dict[str, Any]:
    """Relative distances from the same op in float64, which PyTorch runs, and whether a second run has its bits."""
    args, more = inputs(1, T, name, False, heads, device=device, dtype=torch.float32)
    found, again, true = (_differentiated(name, args, more, dtype, kind) for kind in (dtype, dtype, torch.float64))
    far = {n: ((x.double() - true[n]).norm() / true[n].norm()).item() for n, x in found.items()}
    return far | {"same bits": all(torch.equal(x, again[n]) for n, x in found.items())}
