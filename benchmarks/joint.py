"""Liger Attention and its window on a GPU: right against float64 first, then timed beside SDPA; writes JSON as it goes.

python -m benchmarks.joint --out benchmarks/results/joint-gpu.json

Shapes: B batch, T time, HQ query heads, H key/value heads, D width of everything.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import gpu
from benchmarks.gpu import HQ, D, H, copy_floor, describe
from liger_ops import _packed, liger_attention, sliding_window_attention

WINDOW, SINKS, ROW = 64, 4, 5
LEAVES = ("q", "k", "v", "q_log", "k_log", "g", "mix", "initial_state")
# Heads of the query and of the key, tokens, window, sinks, gate or not, hidden tokens.
CASES = {
    "layer": (8, 2, 1000, 64, 4, True, 70),
    "no gate, pairs of sequences": (4, 2, 515, 64, 0, False, 0),
    "one head each": (2, 2, 333, 128, 4, True, 0),
    "three heads, odd window": (6, 2, 300, 100, 2, True, 5),
    "long": (4, 1, 4096, 64, 4, True, 0),
}


def inputs(
    HQ: int, H: int, T: int, window: int, sinks: int, gate: bool, hidden: int, width: int, B: int = 1, **options: Any
) -> dict[str, Any]:
    """Arguments of liger_attention: rotated tensors in the dtype asked for, features, gates and state in float32."""
    torch.manual_seed(0)
    S, fine = T + window, options | dict(dtype=torch.float32)
    x = dict(q=torch.randn(B, T, HQ, width, **options))
    x |= {n: torch.randn(B, S, H, width, **options) for n in ("k", "v")}
    x |= {f"{n}_log": torch.randn(B, T, m, width, **fine) for n, m in (("q", HQ), ("k", H))}
    x |= dict(g=-torch.rand(B, T, H, **fine) / 16 if gate else None, mix=torch.rand(HQ, **fine))
    x |= dict(initial_state=torch.rand(B, H, width, width + 1, **fine), window=window, sinks=sinks)
    visible = torch.arange(S, device=x["q"].device).expand(B, -1) >= window + hidden
    return x | (dict(visible=visible) if hidden else {})


def differentiated(x: dict[str, Any], kind: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output, last state and every gradient, from weights that leave hidden queries out; in float64 if told."""
    named = {n: None if x[n] is None else x[n].detach().to(kind or x[n].dtype).requires_grad_() for n in LEAVES}
    o, last = liger_attention(**(x | named), output_final_state=True)
    weight = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype)
    if "visible" in x:
        weight = weight * x["visible"][:, -o.shape[1] :, None, None]
    named = {n: y for n, y in named.items() if y is not None}
    grads = torch.autograd.grad((o, last), list(named.values()), (weight, torch.ones_like(last)))
    o = o * (weight != 0) if "visible" in x else o
    return dict(o=o.detach(), last=last.detach()) | dict(zip(named, grads, strict=True))


def windowed(x: dict[str, Any], kind: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    leaves = [x[n].detach().to(kind or x[n].dtype).requires_grad_() for n in ("q", "k", "v")]
    o = sliding_window_attention(*leaves, x["window"], x["sinks"], visible=x.get("visible"))
    weight = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype)
    if "visible" in x:
        weight = weight * x["visible"][:, -o.shape[1] :, None, None]
    grads = torch.autograd.grad(o, leaves, weight)
    # What hidden queries get has no meaning.
    o = o * (weight != 0) if "visible" in x else o
    return dict(zip(("window o", "window q", "window k", "window v"), (o.detach(), *grads), strict=True))


def errors(name: str, dtype: torch.dtype, device: torch.device, width: int) -> dict[str, Any]:
    """Relative distances from float64, and whether a second run leaves the same bits."""
    x, row = inputs(*CASES[name], width, B=2 if "pairs" in name else 1, device=device, dtype=dtype), {}
    for op in (differentiated, windowed):
        found, again, true = op(x), op(x), op(x, torch.float64)
        far = {n: (y.double() - true[n]).norm() / true[n].norm() for n, y in found.items()}
        row |= {n: y.item() for n, y in far.items()}
        row["same bits"] = row.get("same bits", True) and all(torch.equal(y, again[n]) for n, y in found.items())
    return row


def timed(op: Callable, args: list, more: dict[str, Any], device: torch.device, rounds: int) -> dict[str, float]:
    """Of forward, and of forward with backward of every argument: several in a row, so that no launch is waited for."""
    leaves = [x.detach().requires_grad_() for x in args]
    named = {n: x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for n, x in more.items()}
    weight = torch.randn_like(op(*leaves, **named)[0])
    wanted = [*leaves, *(x for x in named.values() if isinstance(x, torch.Tensor))]

    def forward() -> None:
        with torch.no_grad():
            for _ in range(ROW):
                op(*args, **more)

    def both() -> None:
        for _ in range(ROW):
            torch.autograd.grad(op(*leaves, **named)[0], wanted, weight)

    return {n: gpu.milliseconds(run, device, rounds) / ROW for n, run in (("forward_ms", forward), ("both_ms", both))}


def milliseconds(T: int, device: torch.device, rounds: int, width: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and measurement of everything timed at one length, the dearest to prepare last."""
    options = dict(device=device, dtype=torch.bfloat16)
    x = inputs(HQ, H, T, WINDOW, SINKS, True, 0, width, **options)
    q, k, v = [x["q"]] + [torch.randn(1, T, H, width, **options) for _ in "kv"]
    turned = [y.transpose(1, 2) for y in (q, k, v)]

    def window(reach: int, sinks: int = 0) -> dict[str, float]:
        return timed(lambda *y: (sliding_window_attention(*y, reach, sinks),), [q, k, v], {}, device, rounds)

    def sdpa(q, k, v):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)

    def in_pytorch() -> dict[str, float]:
        serves, _packed.on_triton = _packed.on_triton, lambda q: False
        try:
            return timed(liger_attention, [], x, device, 1)
        finally:
            _packed.on_triton = serves

    yield "copy of q, k, v", lambda: dict(forward_ms=copy_floor([q, k, v], device, rounds))
    yield "liger_attention", lambda: timed(liger_attention, [], x, device, rounds)
    yield "sdpa causal", lambda: timed(sdpa, turned, {}, device, rounds)
    yield f"window {WINDOW}", lambda: window(WINDOW, SINKS)
    yield f"window {min(T, 4096)}", lambda: window(min(T, 4096))
    yield "liger_attention in pytorch", in_pytorch


def flexible(T: int, reach: int, device: torch.device, rounds: int, width: int) -> dict[str, float]:
    """The window by flex_attention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b, h, i, j):
        return (j <= i) & (i - j < reach)

    mask, flex = create_block_mask(near, None, None, T, T, device=device.type), torch.compile(flex_attention)
    options = dict(device=device, dtype=torch.bfloat16)
    args = [torch.randn(1, n, T, width, **options) for n in (HQ, H, H)]
    return timed(lambda *y: (flex(*y, block_mask=mask, enable_gqa=True),), args, {}, device, rounds)


def kernels(T: int, device: torch.device, width: int) -> dict[str, float]:
    """Milliseconds of each kernel of one forward and backward, as the profiler has them."""
    x = inputs(HQ, H, T, WINDOW, SINKS, True, 0, width, device=device, dtype=torch.bfloat16)
    differentiated(x)
    with torch.profiler.profile() as profile:
        differentiated(x)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    return {f"{row.key[:60]} x{row.count}": row.self_device_time_total / 1e3 for row in rows[:24]}


def model(device: torch.device) -> dict[str, Any]:
    """A small random Llama, linearized: padded rows beside the row alone, cached beside uncached, and a generation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import liger_models

    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, vocab_size=512)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, head_dim=64)).to(device).eval()
    linear, row = liger_models.linearize(llama), {}
    ids = torch.randint(1, 512, (1, 300), device=device)
    with torch.no_grad():
        alone = linear(ids).logits
        pad, mask = torch.zeros(1, 40, dtype=ids.dtype, device=device), torch.ones_like(ids)
        for side in ("left", "right"):
            join = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
            logits = linear(join(pad, ids), attention_mask=join(torch.zeros_like(pad), mask)).logits
            logits = logits[:, 40:] if side == "left" else logits[:, :300]
            row[f"padded {side}"] = ((logits - alone).norm() / alone.norm()).item()
        first = linear(ids[:, :200], use_cache=True)
        rest = linear(ids[:, 200:], past_key_values=first.past_key_values, use_cache=True).logits
        row["cached"] = ((rest - alone[:, 200:]).norm() / alone[:, 200:].norm()).item()
        row["generated"] = linear.generate(ids[:, :100], max_new_tokens=8, do_sample=False).shape[1]
        row["bfloat16"] = ((linear.to(torch.bfloat16)(ids).logits - alone).norm() / alone.norm()).item()
    loss = linear(ids, labels=ids).loss
    loss.backward()
    row["gradients are finite"] = all(p.grad.isfinite().all().item() for p in linear.parameters() if p.grad is not None)
    return row


class Report:
    """JSON that is on disk after every measurement, none of which begins after the time is up or stops the others."""

    def __init__(self, device: torch.device, path: Path | None, seconds: float):
        self.found = describe(device) | dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), failed={})
        self.path, self.end = path, time.monotonic() + seconds

    def add(self, part: str, name: str, measure: Callable[[], Any]) -> None:
        if time.monotonic() > self.end:
            self.found["failed"][f"{part} {name}"] = "no time left"
            return
        begin = time.monotonic()
        try:
            row = self.found.setdefault(part, {})[name] = measure()
        except Exception as fault:
            row = self.found["failed"][f"{part} {name}"] = f"{type(fault).__name__}: {fault}"[:500]
        shown = {n: f"{y:.2g}" if isinstance(y, float) else y for n, y in row.items()} if isinstance(row, dict) else row
        print(f"{time.monotonic() - begin:5.1f} s {part} {name}: {shown}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def choices() -> dict[str, list]:
    from liger_ops._triton import launch

    return {" ".join(map(str, key)): list(config) for key, config in launch._chosen.items()}


def jobs(parts: list[str]) -> list[str]:
    """What a process each measures: errors of the cases, or of the other ops."""
    kinds = "bfloat16", "float32", "float16"
    found = [f"errors:{name}:{kind}" for name in CASES for kind in kinds] if "errors" in parts else []
    return found + ([f"ops:{op}" for op in gpu.OPS] if "ops" in parts else [])


def one(job: str, device: torch.device, width: int, T: int) -> dict[str, Any]:
    part, name, *kind = job.split(":")
    if part == "errors":
        return errors(name, getattr(torch, kind[0]), device, width)
    return {kind: gpu.errors(name, T, getattr(torch, kind), device) for kind in ("float32", "bfloat16")}


def apart(job: str, args: argparse.Namespace) -> subprocess.Popen:
    """Compilation takes most of it, and runs beside that of others."""
    command = [sys.executable, "-m", "benchmarks.joint", "--device", args.device, "--width", str(args.width)]
    command += ["--length", str(args.length), "--job", job]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen, seconds: float) -> dict[str, Any]:
    try:
        said, complaint = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if process.returncode:
        raise RuntimeError(complaint[-400:])
    return json.loads(said.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing after that")
    parser.add_argument("--parts", nargs="+", default=["errors", "ops", "model", "ms", "kernels", "flex"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--length", type=int, default=1024, help="of the other ops")
    parser.add_argument("--width", type=int, default=D)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--job", help="print one measurement that another process waits for")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.job:
        print(json.dumps(one(args.job, device, args.width, args.length)))
        return
    report = Report(device, args.out, args.seconds)
    running = {job: apart(job, args) for job in jobs(args.parts)}
    if "model" in args.parts:
        report.add("model", "llama", lambda: model(device))
    for job, process in running.items():
        part, name = job.split(":", 1)
        report.add(part, name, functools.partial(told, process, report.end - time.monotonic()))
    for T in args.lengths if "ms" in args.parts else ():
        for name, run in milliseconds(T, device, args.rounds, args.width):
            report.add(f"ms at {T}", name, run)
    if "kernels" in args.parts:
        report.add("ms of kernels", str(args.lengths[-1]), lambda: kernels(args.lengths[-1], device, args.width))
    for reach in (WINDOW, 4096) if "flex" in args.parts else ():
        run = functools.partial(flexible, args.lengths[-1], reach, device, args.rounds, args.width)
        report.add("flex_attention", f"window {reach} at {args.lengths[-1]}", run)
    report.add("configurations", "chosen", choices)


if __name__ == "__main__":
    main()
