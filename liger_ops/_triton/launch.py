"""Where chunks lie, which configuration runs, and the only autotuner.

Shapes: N sequences of S tokens in all, C rows of a chunk.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from liger_ops.limits import WIDEST_KEY

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Config(NamedTuple):
    """Blocks of the key and value width, and how Triton compiles."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int


# The first of each is the choice where nothing can be timed: it spills no register at K = V = 128.
CONFIGS: dict[str, list[Config]] = {
    "decays_kernel": [Config(16, 16, 4, 1)],
    "states_kernel": [Config(32, 64, 4, 1), Config(32, 128, 4, 3), Config(64, 64, 4, 3)],
    "joins_kernel": [Config(32, 64, 4, 1), Config(16, 32, 2, 1)],
    "outputs_kernel": [Config(32, 64, 4, 2), Config(64, 128, 4, 2), Config(32, 128, 4, 2)],
    "values_gradient_kernel": [Config(32, 32, 8, 1), Config(64, 128, 4, 2), Config(64, 64, 4, 2)],
    "scores_kernel": [Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(32, 16, 4, 1)],
    "own_scores_kernel": [Config(16, 16, 4, 1)],
    "products_kernel": [Config(16, 32, 4, 2), Config(16, 64, 4, 3)],
    # With four warps Triton 3.6 gets this one or `gradients_kernel` wrong on Hopper, differently from run to run.
    "pairs_gradient_kernel": [Config(16, 16, 8, 1), Config(64, 16, 8, 1)],
    # It adds to what is there: nothing to try twice.
    "own_gradients_kernel": [Config(64, 16, 4, 1)],
    "gradients_kernel": [Config(16, 16, 8, 2), Config(64, 128, 8, 1)],
    "inverse_kernel": [Config(32, 16, 4, 2), Config(32, 16, 2, 1)],
    "mixed_kernel": [Config(32, 32, 4, 1), Config(64, 64, 4, 2)],
    # It holds all channels of the key as well, in blocks.
    "corrected_states_kernel": [Config(16, 32, 4, 1), Config(64, 32, 4, 1), Config(128, 64, 8, 1)],
    # Those of the joint softmax hold all channels of the value. Nothing is tried here: with
    # other warps and stages Triton 3.6 lets matrix units of Hopper read beyond shared memory, which ends the process.
    "far_states_kernel": [Config(128, 128, 8, 3)],
    "joint_kernel": [Config(32, 128, 8, 3)],
    "queries_kernel": [Config(32, 128, 4, 2)],
    "near_kernel": [Config(32, 128, 4, 2)],
    "far_keys_kernel": [Config(64, 128, 4, 1)],
    "far_values_kernel": [Config(64, 128, 8, 3)],
    "sinks_kernel": [Config(16, 128, 8, 2)],
    # It holds all channels of the key, and may write over what it read: nothing to try twice.
    "recurrent_kernel": [Config(WIDEST_KEY, 16, 8, 1)],
}
# Where products as fine as float32 want others.
_FINE: dict[tuple[str, str], list[Config]] = {
    ("corrected_states_kernel", "ieee"): [Config(16, 32, 8, 1), Config(16, 32, 4, 1)],
    ("far_keys_kernel", "ieee"): [Config(64, 128, 8, 2)],
    ("far_states_kernel", "ieee"): [Config(32, 64, 4, 1)],
    ("far_values_kernel", "ieee"): [Config(32, 128, 8, 1)],
    ("gradients_kernel", "ieee"): [Config(16, 16, 8, 1), Config(32, 32, 8, 1)],
    ("gradients_kernel", "tf32x3"): [Config(16, 16, 4, 1), Config(128, 64, 8, 1)],
    ("joint_kernel", "ieee"): [Config(32, 128, 8, 2)],
    ("near_kernel", "ieee"): [Config(32, 128, 8, 2)],
    ("pairs_gradient_kernel", "ieee"): [Config(16, 16, 4, 1), Config(64, 16, 8, 1)],
    ("queries_kernel", "ieee"): [Config(32, 128, 8, 2)],
    ("sinks_kernel", "ieee"): [Config(16, 128, 4, 2)],
    ("values_gradient_kernel", "ieee"): [Config(32, 64, 8, 1), Config(32, 32, 8, 1)],
    ("states_kernel", "tf32x3"): [Config(16, 64, 4, 1), Config(32, 32, 8, 1)],
}
_chosen: dict[tuple, Config] = {}
_constants: dict[str, list[str]] = {}
_lock = threading.Lock()


@functools.cache
def block(width: int, most: int) -> int:
    """The block for a width: a power of two, at least 16 for the matrix units."""
    return min(max(triton.next_power_of_2(width), 16), most)


@functools.cache
def options(name: str, K: int, V: int, precision: str) -> list[Config]:
    """The configurations of a kernel at these widths and for this precision of products, without repetition."""
    known = _FINE.get((name, precision), CONFIGS[name])
    fitted = (c._replace(BK=block(K, c.BK), BV=block(V, c.BV)) for c in known)
    return list(dict.fromkeys(fitted))


def _milliseconds(run: Callable[[], Any], tensors: Sequence[torch.Tensor]) -> float:
    """Median of five runs; infinite where the device has too little shared memory, or runs leave different bits.

    Some versions of Triton compile some configurations into a race.
    """
    try:
        run()
    except OutOfResources:
        return float("inf")
    times, bits = [], _bits(tensors)
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2] if _bits(tensors) == bits else float("inf")


def _bits(tensors: Sequence[torch.Tensor]) -> list[int]:
    """A sum of each tensor's bits, whichever numbers they are."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [x.view(kinds[x.element_size()]).sum().item() for x in tensors]


def fill(kernel: Any, config: Config, named: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the named arguments that a kernel has, and its blocks: BG is that of a gate, as wide as a key's or 1."""
    blocks = {"BK": config.BK, "BV": config.BV, "BG": config.BK if named.get("PER_CHANNEL") else 1}
    return {n: blocks[n] if n in blocks else named[n] for n in kernel.arg_names if n in blocks or n in named}


def constant_names(kernel: Any) -> list[str]:
    """The arguments that Triton compiles for each of their values, blocks aside."""
    # By name: to hash a kernel is to hash its source and what it calls.
    name = kernel.fn.__name__
    if name not in _constants:
        _constants[name] = [p.name for p in kernel.params if p.is_constexpr and p.name not in ("BK", "BV", "BG")]
    return _constants[name]


def launch(kernel: Any, grid: Callable[[Config], tuple[int, ...]], named: Mapping[str, Any]) -> Config:
    """Run kernel on grid(config), its blocks and warps chosen once per device, widths, dtype and constants.

    named may hold more than the kernel has: what neighbours share is handed to all of them. K and V, the widths that
    blocks cover, are always there, and a kernel's first argument is a tensor.

    Nothing is timed under the interpreter or while a graph is captured: the first configuration runs, unless another
    was chosen before. Kernels with a choice read none of their outputs, so that timing may repeat them.

    Returns:
        The configuration that ran last, whose outputs stand.
    """
    name, K, V = kernel.fn.__name__, named["K"], named["V"]

    def run(config: Config) -> Config:
        filled = fill(kernel, config, named)
        kernel[grid(config)](**filled, num_warps=config.num_warps, num_stages=config.num_stages)
        return config

    choices = options(name, K, V, named.get("PRECISION", ""))
    if isinstance(kernel, InterpretedFunction):
        return run(choices[0])
    first = named[kernel.arg_names[0]]
    key = name, first.device, first.dtype, K, V, *[named.get(n) for n in constant_names(kernel)]
    with torch.cuda.device(first.device):
        if len(choices) == 1 or torch.cuda.is_current_stream_capturing():
            return run(_chosen.get(key, choices[0]))
        with _lock:
            if key not in _chosen:
                tensors = [x for x in fill(kernel, choices[0], named).values() if isinstance(x, torch.Tensor)]
                _chosen[key] = min(choices, key=lambda config: _milliseconds(lambda: run(config), tensors))
        return run(_chosen[key])


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as PyTorch is told to, and decayed copies of halves as finely as halves.

    tf32 has the mantissa of float16, so that its rounding would show there; bfloat16 is coarser.
    """
    if torch.version.hip:
        return "tf32" if dtype == torch.bfloat16 and is_cdna3() else "ieee"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32x3" if dtype == torch.float16 else "tf32"


@functools.cache
def is_cdna3() -> bool:
    return torch.cuda.get_device_properties(0).gcnArchName.startswith("gfx94")


class Launcher(NamedTuple):
    """What launches kernels, how finely they multiply, and how long a sequence is before it is cut.

    Chains of states that fill no GPU are cut into pieces of `piece` tokens, which run side by side.
    """

    launch: Callable[..., Config] = launch
    precision: Callable[[torch.dtype], str] = precision
    piece: int = 1024


LAUNCHER = Launcher()
# Chains of states that leave a GPU empty.
CHAINS = 32


class Chunks(NamedTuple):
    """chunks [count,2]: first token and tokens, 0 past the last; sequences [N,3]: bounds and first chunk. int64."""

    chunks: torch.Tensor
    sequences: torch.Tensor


class Pieces(NamedTuple):
    """bounds [M,3]: as sequences have them, empty past the last; owned [N,2]: a sequence's first piece and how many."""

    bounds: torch.Tensor
    owned: torch.Tensor


class _Parts(NamedTuple):
    """Of a part its sequence, first token and number of tokens; of a sequence its first part and how many."""

    owner: torch.Tensor
    start: torch.Tensor
    size: torch.Tensor
    first: torch.Tensor
    each: torch.Tensor


def _parts(begin: torch.Tensor, end: torch.Tensor, tokens: int, most: int) -> _Parts:
    """Sequences [N] in parts of `most` tokens, found on their device; as many as `tokens` tokens could need."""
    N, each = len(begin), (end - begin + most - 1) // most
    after = each.cumsum(0)
    i = torch.arange(tokens // most + min(N, tokens), device=begin.device)
    n = torch.searchsorted(after, i, right=True)
    owner = n.clamp(max=N - 1)
    start = begin[owner] + (i - (after - each)[owner]) * most
    size = torch.where(n < N, (end[owner] - start).clamp(max=most), 0)
    return _Parts(owner, start, size, after - each, each)


def make_chunks(cu_seqlens: torch.Tensor, tokens: int, C: int) -> Chunks:
    """The chunks of sequences bounded by cu_seqlens [N+1], whose values nothing here reads on the host."""
    begin, end = cu_seqlens.long()[:-1], cu_seqlens.long()[1:]
    parts = _parts(begin, end, tokens, C)
    return Chunks(torch.stack([parts.start, parts.size], 1), torch.stack([begin, end, parts.first], 1))


def make_pieces(sequences: torch.Tensor, tokens: int, most: int, C: int) -> Pieces:
    """Pieces of `most` tokens, a multiple of C, of sequences [N,3] as `Chunks` has them."""
    begin, end, first = sequences.unbind(1)
    parts = _parts(begin, end, tokens, most)
    start, owner = parts.start, parts.owner
    chunk = first[owner] + (start - begin[owner]) // C
    return Pieces(torch.stack([start, start + parts.size, chunk], 1), torch.stack([parts.first, parts.each], 1))


def _kept(make: Callable[_P, _R]) -> Callable[_P, _R]:
    """make(..., device), whose tables are kept for the next call: nobody writes to them."""
    kept = functools.lru_cache(64)(make)

    @functools.wraps(make)
    def found(*args: _P.args, **options: _P.kwargs) -> _R:
        # What is allocated while a graph is captured holds nothing before its replay.
        capturing = args[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()
        return (make if capturing else kept)(*args, **options)

    return found


@_kept
def equal_chunks(batch: int, length: int, C: int, device: torch.device) -> Chunks:
    """The chunks of `batch` sequences of one length."""
    each = -(-length // C)
    i, n = torch.arange(batch * each, device=device), torch.arange(batch, device=device)
    within = i % each * C
    chunks = torch.stack([i // each * length + within, (length - within).clamp(max=C)], 1)
    return Chunks(chunks, torch.stack([n * length, (n + 1) * length, n * each], 1))


@_kept
def equal_pieces(batch: int, length: int, most: int, C: int, device: torch.device) -> Pieces:
    """The pieces of `batch` sequences of one length."""
    return make_pieces(equal_chunks(batch, length, C, device).sequences, batch * length, most, C)
