"""Milliseconds of a call: single, several in a row, or replayed as a graph; and what the machine itself can do."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import leaves_of, tensors_of

# Calls between two events, so that the GPU waits for no launch.
ROW = 5


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


def calls(op: Callable, args: list, more: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """One forward, and one forward with the gradient of every argument."""
    leaves, named = [x.detach().requires_grad_() for x in args], leaves_of(more)
    wanted = [*leaves, *tensors_of(named).values()]
    weight = torch.randn_like(op(*leaves, **named)[0])

    def forward() -> None:
        with torch.no_grad():
            op(*args, **more)

    def both() -> None:
        torch.autograd.grad(op(*leaves, **named)[0], wanted, weight)

    return dict(forward_ms=forward, both_ms=both)


def in_a_row(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The mean of some calls in a row, of which the median counts."""
    return milliseconds(lambda: [call() for _ in range(ROW)] and None, device, rounds) / ROW


def timed(op: Callable, args: list, more: dict[str, Any], device: torch.device, rounds: int) -> dict[str, float]:
    """Of forward, and of forward with backward."""
    return {n: in_a_row(call, device, rounds) for n, call in calls(op, args, more).items()}


def replayed(op: Callable, args: list, more: dict[str, Any], device: torch.device, rounds: int) -> dict[str, float]:
    """The same without the host: captured once, replayed some times in a row."""
    found = {}
    for name, call in calls(op, args, more).items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(ROW):
                call()
        found[name] = milliseconds(graph.replay, device, rounds) / ROW
    return found


def floors(device: torch.device, rounds: int, small: bool) -> dict[str, dict[str, float]]:
    """Bytes read and written a second by a long copy, and the rate of a bfloat16 product of random matrices."""
    n, N = (1 << 20, 256) if small else (1 << 31, 8192)
    x = torch.randn(n // 2, device=device).to(torch.bfloat16)
    y = torch.empty_like(x)
    copy = milliseconds(lambda: y.copy_(x), device, rounds)
    a, b = (torch.randn(N, N, device=device).to(torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b, device, rounds)
    rates = {"terabytes a second": 2 * x.nbytes / copy / 1e9}, {"teraflops": 2 * N**3 / product / 1e9}
    return {"copy": dict(forward_ms=copy) | rates[0], "bfloat16 product": dict(forward_ms=product) | rates[1]}
