"""Modules that compose gated recurrences and windowed attention; plain PyTorch on liger_ops."""

from liger_layers._alone import FullAttention, GatedRecurrence, SlidingWindowAttention
from liger_layers._attention import LigerAttention
from liger_layers._recall import RecallScore
from liger_layers._routing import load_balancing_loss, router_parameters, routing_modules
from liger_layers._state import LigerState, MemoryState
from liger_layers.choices import register_gate
from liger_layers.feature_maps import FEATURE_MAPS, Softmax, SoftmaxKernel
from liger_layers.gates import POOLINGS, Gate, Mix
from liger_layers.interleaved import InterleavedStack
from liger_layers.mixture_of_memories import LinearMixer, MixtureOfMemories
from liger_layers.recurrences import RECURRENCES, Recurrence, RuleGate, UpdateRule
from liger_linear import __version__ as __version__

__all__ = [
    "FEATURE_MAPS",
    "POOLINGS",
    "RECURRENCES",
    "FullAttention",
    "Gate",
    "GatedRecurrence",
    "InterleavedStack",
    "LigerAttention",
    "LigerState",
    "LinearMixer",
    "MemoryState",
    "Mix",
    "MixtureOfMemories",
    "RecallScore",
    "Recurrence",
    "RuleGate",
    "SlidingWindowAttention",
    "Softmax",
    "SoftmaxKernel",
    "UpdateRule",
    "load_balancing_loss",
    "register_gate",
    "router_parameters",
    "routing_modules",
]
