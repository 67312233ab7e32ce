"""Which tensors kernels serve."""

import importlib.util

import torch

# Looked up here: torch.compile cannot trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def on_triton(q: torch.Tensor) -> bool:
    """Whether kernels serve these tensors: on a GPU, float64 aside."""
    return q.is_cuda and q.dtype != torch.float64 and _HAS_TRITON
