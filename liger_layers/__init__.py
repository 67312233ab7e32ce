"""Modules that compose gated recurrences and windowed attention; plain PyTorch on liger_ops."""

from liger_layers._attention import GatedRecurrence, LigerAttention, SlidingWindowAttention
from liger_layers._state import LigerState
from liger_layers.feature_maps import FEATURE_MAPS, Softmax, SoftmaxKernel
from liger_layers.gates import GATES, Gate, register_gate

__all__ = [
    "FEATURE_MAPS",
    "GATES",
    "Gate",
    "GatedRecurrence",
    "LigerAttention",
    "LigerState",
    "SlidingWindowAttention",
    "Softmax",
    "SoftmaxKernel",
    "register_gate",
]
