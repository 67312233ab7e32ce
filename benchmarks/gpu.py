"""The kernels on a GPU: right against float64, then timed beside flash-linear-attention, SDPA and a copy; writes JSON.

python -m benchmarks.gpu --out benchmarks/results/ops-gpu.json

Shapes: B batch, T time, HQ query heads, H key/value heads, D width. Where fla is installed, it gets its heads repeated.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import liger_ops

HQ, H, D, SLOTS = 32, 8, 128, 64


class Op(NamedTuple):
    """What an op takes besides q, k and v (B, T, heads, tensor options -> arguments), and where fla keeps its own."""

    more: Callable[..., dict]
    fla: str | None
    first: str = "qkv"


def decay(*shape: int, **options: Any) -> torch.Tensor:
    return -torch.rand(*shape, **options) / 16


def erasing(*shape: int, **options: Any) -> dict[str, Any]:
    return dict(beta=torch.rand(*shape, **options), use_qk_l2norm_in_kernel=True)


OPS = {
    "chunk_gla": Op(lambda B, T, n, **x: dict(g=decay(B, T, n, D, **x)), "fla.ops.gla"),
    "fused_recurrent_gla": Op(lambda B, T, n, **x: dict(gk=decay(B, T, n, D, **x)), "fla.ops.gla"),
    "chunk_simple_gla": Op(lambda B, T, n, **x: dict(g=decay(B, T, n, **x)), "fla.ops.simple_gla"),
    "fused_recurrent_simple_gla": Op(lambda B, T, n, **x: dict(g=decay(B, T, n, **x)), "fla.ops.simple_gla"),
    "chunk_retention": Op(lambda *_, **x: {}, "fla.ops.retention"),
    "chunk_lightning_attn": Op(lambda *_, **x: dict(layer_idx=1, num_layers=4), "fla.ops.lightning_attn"),
    "chunk_linear_attn": Op(lambda *_, **x: dict(normalize=False), "fla.ops.linear_attn"),
    "chunk_hgrn2": Op(lambda B, T, n, **x: dict(g=decay(B, T, n, D, **x)), None, "qv"),
    "chunk_rwkv6": Op(lambda B, T, n, **x: dict(w=decay(B, T, n, D, **x), u=torch.ones(HQ, D, **x)), "fla.ops.rwkv6"),
    "chunk_gsa": Op(
        lambda B, T, n, **x: dict(s=torch.randn(B, T, n, SLOTS, **x), g=decay(B, T, n, SLOTS, **x)), "fla.ops.gsa"
    ),
    "chunk_delta_rule": Op(lambda B, T, n, **x: erasing(B, T, n, **x), "fla.ops.delta_rule"),
    "chunk_gated_delta_rule": Op(
        lambda B, T, n, **x: dict(g=decay(B, T, n, **x)) | erasing(B, T, n, **x), "fla.ops.gated_delta_rule"
    ),
    "chunk_kda": Op(lambda B, T, n, **x: dict(g=decay(B, T, n, D, **x)) | erasing(B, T, n, **x), "fla.ops.kda"),
    "mlstm": Op(lambda B, T, n, **x: dict(i=torch.randn(B, T, n, **x), f=decay(B, T, n, **x)), None),
}


def inputs(B: int, T: int, name: str, repeated: bool, **options: Any) -> tuple[list, dict]:
    """q, k, v (or q, v) and the op's own arguments; repeated as an op without grouped heads wants them."""
    torch.manual_seed(0)
    tensors = {x: torch.randn(B, T, n, D, **options) for x, n in (("q", HQ), ("k", H), ("v", H))}
    more = OPS[name].more(B, T, H, **options)

    def repeat(n: str, x: Any) -> Any:
        return x if n in "qu" or not isinstance(x, torch.Tensor) else x.repeat_interleave(HQ // H, 2)

    if repeated:
        tensors, more = ({n: repeat(n, x) for n, x in given.items()} for given in (tensors, more))
    return [tensors[x] for x in OPS[name].first], more


def milliseconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median of single runs, by events where there are any."""
    run()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def _tensors(named: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: x for n, x in named.items() if isinstance(x, torch.Tensor)}


def _leaves(named: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    return named | {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in _tensors(named).items()}


def timed(op: Callable, args: list, more: dict, device: torch.device, rounds: int) -> dict[str, float]:
    """Forward, and forward with backward of every argument."""
    with torch.no_grad():
        forward = milliseconds(lambda: op(*args, **more), device, rounds)
    leaves, named = [x.detach().requires_grad_() for x in args], _leaves(more)
    weight = torch.randn_like(op(*leaves, **named)[0])

    def both() -> None:
        torch.autograd.grad(op(*leaves, **named)[0], [*leaves, *_tensors(named).values()], weight)

    return dict(forward_ms=forward, both_ms=milliseconds(both, device, rounds))


def errors(name: str, T: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative distance of output and gradients from the same op in float64, which PyTorch runs."""
    args, more = inputs(1, T, name, False, device=device, dtype=torch.float32)
    found, op = {}, getattr(liger_ops, name)
    for kind in (dtype, torch.float64):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in args]
        # Gates stay as fine as they are given, what the state is made of does not.
        named = more | {n: x.to(dtype) for n, x in more.items() if n == "s"}
        named = _leaves(named, torch.float64) if kind == torch.float64 else _leaves(named)
        o, last = op(*leaves, **named, output_final_state=True)
        last = last[0] if isinstance(last, tuple) else last
        weights = torch.linspace(-1, 1, o.numel(), device=device).view(o.shape).to(o.dtype)
        tensors = _tensors(named)
        grads = torch.autograd.grad((o, last), [*leaves, *tensors.values()], (weights, torch.ones_like(last)))
        found[kind] = dict(zip(["o", "last", *OPS[name].first, *tensors], [o, last, *grads], strict=True))
    far = {n: (x.double() - found[torch.float64][n]).norm() for n, x in found[dtype].items()}
    return {n: (x / found[torch.float64][n].norm()).item() for n, x in far.items()}


def theirs(name: str) -> Callable | None:
    """fla's op of the same name, if it is installed."""
    try:
        return OPS[name].fla and getattr(importlib.import_module(OPS[name].fla), name)
    except ImportError:
        return None


def copy_floor(args: list, device: torch.device, rounds: int) -> float:
    """Milliseconds to read q, k and v and to write an output of the size of q, by copies."""
    pairs = [(x, torch.empty_like(x)) for x in args]
    return milliseconds(lambda: [y.copy_(x) for x, y in pairs], device, rounds)


def measure(T: int, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Every op at one length, the batch such that there are `tokens` in all."""
    B, row = max(tokens // T, 1), {}
    options = dict(device=device, dtype=dtype)
    for name in OPS:
        args, more = inputs(B, T, name, False, **options)
        row[name] = timed(getattr(liger_ops, name), args, more, device, rounds)
        if other := theirs(name):
            args, more = inputs(B, T, name, True, **options)
            try:
                row[f"fla {name}"] = timed(other, args, more, device, rounds)
            except RuntimeError as refused:
                # It knows versions of Triton that get a backward wrong.
                print(f"fla {name}: {refused}")
    q, k, v = (x.transpose(1, 2) for x in inputs(B, T, "chunk_gla", False, **options)[0])

    def sdpa(q, k, v):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)

    row["sdpa"] = timed(sdpa, [q, k, v], {}, device, rounds)
    row["copy"] = dict(forward_ms=copy_floor([q, k, v], device, rounds))
    return row


def describe(device: torch.device) -> dict[str, Any]:
    """A result without numbers yet."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    return dict(device=name, torch=torch.__version__, triton=triton, shape=dict(HQ=HQ, H=H, D=D), errors={}, ms={})


def print_table(result: dict[str, Any]) -> None:
    """Milliseconds of forward / forward with backward, a row an op, a column a length."""
    lengths = list(result["ms"])
    print("| op | " + " | ".join(lengths) + " |\n" + "|---" * (1 + len(lengths)) + "|")
    for name in result["ms"][lengths[0]]:
        cells = [" / ".join(f"{x:.3f}" for x in result["ms"][T][name].values()) for T in lengths]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lengths = list(result["ms"])
    for axis, kind in zip(axes, ("forward_ms", "both_ms"), strict=True):
        for name in result["ms"][lengths[0]]:
            if kind in result["ms"][lengths[0]][name]:
                axis.loglog([int(T) for T in lengths], [result["ms"][T][name][kind] for T in lengths], "o-", label=name)
        axis.set(xlabel="tokens", ylabel="ms", title="forward" if kind == "forward_ms" else "forward and backward")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--tokens", type=int, default=32768, help="batch times length")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    device = torch.device(args.device)
    result = describe(device)
    for dtype in (torch.float32, torch.bfloat16):
        for op in OPS:
            key = f"{op} {dtype}".replace("torch.", "")
            result["errors"][key] = errors(op, min(args.lengths), dtype, device)
            print(key, {n: f"{x:.1e}" for n, x in result["errors"][key].items()}, flush=True)
    for T in args.lengths:
        result["ms"][str(T)] = measure(T, args.tokens, torch.bfloat16, device, args.rounds)
    print_table(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        plot(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
