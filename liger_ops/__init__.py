"""Kernels for gated linear recurrences and windowed attention; tensors are [batch, time, heads, width]."""

from liger_linear import __version__ as __version__
from liger_ops._decode import gated_step, gsa_step, mlstm_step
from liger_ops._delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from liger_ops._fixed_decay import (
    chunk_lightning_attn,
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_lightning_attn,
    fused_recurrent_retention,
    parallel_retention,
)
from liger_ops._gated_linear_attention import (
    chunk_gla,
    chunk_simple_gla,
    fused_chunk_gla,
    fused_recurrent_gla,
    fused_recurrent_simple_gla,
)
from liger_ops._gated_slot_attention import chunk_gsa, chunk_lightnet, fused_recurrent_gsa, fused_recurrent_lightnet
from liger_ops._kda import chunk_kda, fused_recurrent_kda
from liger_ops._liger_attention import liger_attention
from liger_ops._linear_attention import (
    chunk_hgrn2,
    chunk_linear_attn,
    fused_chunk_linear_attn,
    fused_recurrent_hgrn2,
    fused_recurrent_linear_attn,
)
from liger_ops._mlstm import mlstm
from liger_ops._rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
from liger_ops._sliding_window_attention import sliding_window_attention
from liger_ops.naive import (
    naive_delta_rule,
    naive_gsa,
    naive_liger_attention,
    naive_lightnet,
    naive_mlstm,
    naive_recall,
    naive_recurrence,
    naive_rwkv6,
    naive_sliding_window_attention,
)

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_gsa",
    "chunk_hgrn2",
    "chunk_kda",
    "chunk_lightnet",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_rwkv6",
    "chunk_simple_gla",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn2",
    "fused_recurrent_kda",
    "fused_recurrent_lightnet",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv6",
    "fused_recurrent_simple_gla",
    "gated_step",
    "gsa_step",
    "liger_attention",
    "mlstm",
    "mlstm_step",
    "naive_delta_rule",
    "naive_gsa",
    "naive_liger_attention",
    "naive_lightnet",
    "naive_mlstm",
    "naive_recall",
    "naive_recurrence",
    "naive_rwkv6",
    "naive_sliding_window_attention",
    "parallel_retention",
    "sliding_window_attention",
]
