"""Which backend runs a recurrence or windowed attention: kernels on a GPU where they serve, PyTorch elsewhere.

Shapes: B batch, T time, HQ query heads, H key/value heads, K key width, V value width, N sequences, M features.
"""

import torch

from liger_ops import _checks, _devices, _joint
from liger_ops._inputs import AttentionInputs, Recalled, RecurrenceInputs, work_dtype
from liger_ops._kernels import recurrence_kernels
from liger_ops._norms import length
from liger_ops._torch.attention import joint as joint_in_pytorch
from liger_ops._torch.attention.window import window_attention
from liger_ops._torch.layout import full_precision
from liger_ops._torch.recurrence import recurrence as in_pytorch
from liger_ops.limits import WIDEST_KEY


@full_precision
def recurrence(x: RecurrenceInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B,T,HQ,V] in the dtype of v, and the last state [N,H,K,V]."""
    (B, T, H, K), V = x.k.shape, x.v.shape[-1]
    if _devices.on_triton(x.q) and T and B and _is_served(x):
        state = x.q.new_zeros(x.sequences, H, K, V, dtype=torch.float32) if x.state is None else x.state.float()
        _checks.refuse_tangents("recurrence_kernels", x)
        return recurrence_kernels(*x._replace(state=state))
    if x.unit:
        x = x._replace(q=x.q / length(x.q), k=x.k / length(x.k))
    return in_pytorch(x)


def _is_served(x: RecurrenceInputs) -> bool:
    """Decays of keys and values at once have no chunked form there: token by token, or in PyTorch."""
    narrow = x.k.shape[-1] <= WIDEST_KEY
    by_token = x.cu_seqlens is None and narrow and not torch.is_grad_enabled()
    return (x.g is None or x.gv is None or by_token) and (x.beta is None or narrow)


def window(x: AttentionInputs, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """o [B,T,HQ,V] in the dtype of q, and lse [B,T,HQ] in float32 or float64, or None."""
    if _devices.on_triton(x.q) and _joint.serves(x) and not (with_lse and torch.is_grad_enabled()):
        return _joint.window(x, *_joint.find_keys(x))
    return window_attention(x, with_lse)


def joint(x: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, Recalled | None]:
    """o [B,T,HQ,V] in the dtype of q; after the T tokens the state [B,H,M,V+1], and what is recalled, if anything."""
    (B, T, HQ, _), V = x.q.shape, x.v.shape[-1]
    if T == 0 or B == 0:
        assert x.state is not None
        return x.v.new_zeros(B, T, HQ, V), x.state.to(work_dtype(x.q), copy=True), x.recalled
    if T == 1 and not torch.is_grad_enabled():
        return joint_in_pytorch.joint_step(x)
    if _devices.on_triton(x.q) and _joint.serves(x) and not (x.g is not None and x.g.ndim == 4):
        return _joint.joint(x, *_joint.find_keys(x))
    return joint_in_pytorch.joint(x)
