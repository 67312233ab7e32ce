"""Arguments of layers at the public door: one ValueError for what cannot be; nothing behind it checks again.

Shapes: B batch, T time.
"""

import torch

from liger_ops.errors import check_positive, fail


def check_sizes(hidden_size: int, num_heads: int, num_kv_heads: int | None, **widths: int | None) -> None:
    """Sizes of a layer; widths are head_dim and others by name. Heads without a head_dim share out the whole width."""
    check_positive("hidden_size", hidden_size)
    check_positive("num_heads", num_heads)
    for name, size in dict(num_kv_heads=num_kv_heads, **widths).items():
        if size is not None:
            check_positive(name, size)
    if num_kv_heads is not None and num_heads % num_kv_heads:
        fail("num_heads", f"a multiple of num_kv_heads {num_kv_heads}", num_heads)
    if widths["head_dim"] is None and hidden_size % num_heads:
        fail("hidden_size", f"a multiple of num_heads {num_heads} without head_dim", hidden_size)


def check_input(x: torch.Tensor, mask: torch.Tensor | None, width: int) -> None:
    """x [B,T,width]; mask [B,T] bool, or None."""
    for name, given in (("x", x), ("mask", mask)):
        if not isinstance(given, torch.Tensor) and (name == "x" or given is not None):
            fail(name, "a tensor", type(given).__name__)
    if x.ndim != 3 or x.shape[-1] != width:
        fail("x", f"[batch, time, {width}]", tuple(x.shape))
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        fail("mask", f"bool {list(x.shape[:2])}", f"{mask.dtype} {tuple(mask.shape)}")
