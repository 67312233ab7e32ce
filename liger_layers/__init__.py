"""Modules that compose gated recurrences and windowed attention; plain PyTorch on liger_ops."""

from liger_layers._attention import GatedRecurrence, LigerAttention, SlidingWindowAttention
from liger_layers._routing import load_balancing_loss
from liger_layers._state import LigerState, MemoryState
from liger_layers.feature_maps import FEATURE_MAPS, Softmax, SoftmaxKernel
from liger_layers.gates import GATES, POOLINGS, Gate, register_gate
from liger_layers.interleaved import FullAttention, InterleavedStack
from liger_layers.mixture_of_memories import LinearMixer, MixtureOfMemories
from liger_layers.rules import UPDATE_RULES
from liger_linear import __version__ as __version__

__all__ = [
    "FEATURE_MAPS",
    "GATES",
    "POOLINGS",
    "UPDATE_RULES",
    "FullAttention",
    "Gate",
    "GatedRecurrence",
    "InterleavedStack",
    "LigerAttention",
    "LigerState",
    "LinearMixer",
    "MemoryState",
    "MixtureOfMemories",
    "SlidingWindowAttention",
    "Softmax",
    "SoftmaxKernel",
    "load_balancing_loss",
    "register_gate",
]
