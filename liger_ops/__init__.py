"""Kernels for gated linear recurrences and windowed attention; tensors are [batch, time, heads, width]."""

from liger_ops._gated_linear_attention import chunk_gla, chunk_linear_attn, chunk_simple_gla
from liger_ops._liger_attention import liger_attention
from liger_ops._sliding_window_attention import sliding_window_attention
from liger_ops.naive import naive_liger_attention, naive_recurrence, naive_sliding_window_attention

__all__ = [
    "chunk_gla",
    "chunk_linear_attn",
    "chunk_simple_gla",
    "liger_attention",
    "naive_liger_attention",
    "naive_recurrence",
    "naive_sliding_window_attention",
    "sliding_window_attention",
]
