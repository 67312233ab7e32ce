"""Compile every kernel and configuration for GPUs that are not there, and read what they would use; writes JSON.

python -m benchmarks.compile_table --out benchmarks/results/compile-table.json
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from liger_ops._inputs import KernelAttentionInputs, RecurrenceInputs
from liger_ops._triton import additive, delta, joint, recurrent
from liger_ops._triton import launch as launching

# Shared memory that one program may have, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
CASES = [(gate, dtype) for gate in ("channel", "head", "none") for dtype in ("bfloat16", "float32")]
CASES += [("channel", "float16")]
_MATRIX = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_smfmac"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}


class Job(NamedTuple):
    """One compilation: the kernel's place among those that a case launches, its configuration and target."""

    gate: str
    dtype: str
    place: int
    option: int
    target: str


def launches(gate: str, dtype: str, K: int = 128, V: int = 128) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, named arguments) of everything that forward and backward launch, which then runs nothing."""
    B, T, H, G = 1, 256, 2, 2
    kind, calls = getattr(torch, dtype), []
    q, k = torch.empty(B, T, H * G, K, dtype=kind), torch.empty(B, T, H, K, dtype=kind)
    v, state = torch.empty(B, T, H, V, dtype=kind), torch.empty(B, H, K, V)
    g = {"channel": torch.empty(B, T, H, K), "head": torch.empty(B, T, H), "none": None}[gate]

    def record(kernel, grid, named):
        calls.append((kernel, named))
        return _options(kernel, named)[0]

    # Short enough for a sequence to have several pieces.
    by = launching.LAUNCHER._replace(launch=record, piece=64)
    x, do = RecurrenceInputs(q, k, v, g, state=state, scale=0.1), torch.empty(*q.shape[:3], V, dtype=kind)
    erasing = x._replace(beta=torch.empty(B, T, H))
    for module, given in ((additive, x), (delta, erasing)):
        module.forward(given, by)
        module.backward(given, do, state, g is not None, launcher=by)
    slots = torch.empty(B, dtype=torch.int64)
    recurrent.forward(x, state, slots, launcher=by)
    recurrent.forward(x._replace(gv=torch.empty(B, T, H, V)), state, slots, before=True, launcher=by)
    recurrent.forward(erasing, state, slots, launcher=by)
    if gate != "channel":
        _joint(x, by)
    # Forward and backward share some.
    return list({_variant(kernel, named): (kernel, named) for kernel, named in calls}.values())


def _joint(x: RecurrenceInputs, by: launching.Launcher) -> None:
    """Everything that the joint softmax launches, with and without what left the window."""
    (B, T, HQ, K), H, V = x.q.shape, x.k.shape[2], x.v.shape[3]
    column, rest = torch.zeros(B, 4, dtype=torch.int64), torch.empty(B, T, dtype=torch.bool)
    window = KernelAttentionInputs(x.q[:, 64:], x.k, x.v, column, rest, 64, 0.1)
    far = dict(q_log=torch.empty(B, T - 64, HQ, K), k_log=torch.empty(B, T - 64, H, K), mix=torch.empty(HQ))
    far |= dict(g=None if x.g is None else x.g[:, 64:], state=torch.empty(B, H, K, V + 1))
    for given in (window._replace(**far), window):
        call = joint.prepare(given, by)
        found = joint.forward(call, given.state)
        joint.backward(call, found.o, found.last, found)


def _options(kernel: Any, named: dict[str, Any]) -> list[launching.Config]:
    return launching.options(kernel.fn.__name__, named["K"], named["V"], named.get("PRECISION", ""))


def _variant(kernel: Any, named: dict[str, Any]) -> tuple:
    """What the compiler makes a difference of."""
    constants = launching.constant_names(kernel)
    given = {n: named[n] for n in kernel.arg_names if n in named}
    kinds = [x.dtype for x in given.values() if isinstance(x, torch.Tensor)]
    return kernel.fn.__name__, *kinds, *(given.get(n) for n in constants)


def jobs(every_option: bool = True) -> Iterator[Job]:
    for gate, dtype in CASES:
        for place, (kernel, named) in enumerate(launches(gate, dtype)):
            options = _options(kernel, named)
            for option in range(len(options) if every_option else 1):
                # Nothing else runs the joint softmax on kernels.
                for target in ["sm_90"] if "joint" in kernel.fn.__module__ else TARGETS:
                    yield Job(gate, dtype, place, option, target)


def _spills(asm: dict[str, Any], target: GPUTarget) -> tuple[int, int]:
    """Registers of a thread, and what it spills to memory: bytes of its stack, or registers on HIP."""
    if target.backend == "hip":
        counts = {n: int(x) for n, x in re.findall(r"\.(\w+_count):\s+(\d+)", asm["amdgcn"])}
        # Scalar registers spill into vector registers, not into memory.
        return counts["vgpr_count"], counts["vgpr_spill_count"]
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as binary:
        binary.write(asm["cubin"])
        binary.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", said).groups())


def compile_one(job: Job) -> dict[str, Any]:
    """What the compiler says of one kernel, configuration and target."""
    kernel, named = launches(job.gate, job.dtype)[job.place]
    config = _options(kernel, named)[job.option]
    target, room = TARGETS[job.target]
    given = launching.fill(kernel, config, named)
    blocks = ("BK", "BV", "BG")
    constants = {n: given[n] for n in (*launching.constant_names(kernel), *blocks) if n in given}
    if target.backend == "hip" and constants.get("PRECISION") == "tf32x3":
        # What `launch.precision` says there.
        constants["PRECISION"] = "ieee"
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        x = given[name]
        signature[name] = (
            _POINTERS[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
        )
        if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): x for n, x in constants.items()}, attributes)
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    compiled = triton.compile(source, target=target, options=options)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, spilled = _spills(compiled.asm, target)
    atomics = re.findall(r"(?:atom|red)\.[\w.]*f(?:16|32|64)|(?:global|flat|buffer)_atomic_\w*f(?:16|32|64)", text)
    row = dict(kernel=kernel.fn.__name__, gate=job.gate, dtype=job.dtype, target=job.target, **config._asdict())
    row |= dict(registers=registers, spilled=spilled, shared=compiled.metadata.shared, room=room)
    return row | dict(matrix_instructions=len(re.findall(_MATRIX, text)), float_atomics=len(atomics))


def table(every_option: bool = True, workers: int = 2) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, jobs(every_option), chunksize=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--defaults", action="store_true", help="only the first configuration of each kernel")
    args = parser.parse_args()
    rows = table(not args.defaults)
    head = list(rows[0])
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(row[n]) for n in head) + " |")
    if args.out:
        found = dict(triton=triton.__version__, torch=torch.__version__, rows=rows)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
