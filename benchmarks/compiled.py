"""Triton as a compiler alone: kernels are compiled, for every configuration that a tuner would try, and none runs."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def launch_nothing(threads: int | None = None) -> None:
    """From here on, in this process. What ops return is then whatever the memory held."""
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    run, pool = JITFunction.run, ThreadPoolExecutor(threads or os.cpu_count())

    def compile_only(self: Any, *args: Any, **given: Any) -> Any:
        return run(self, *args, **(given | dict(warmup=True)))

    def compile_all(self: Any, *args: Any, **given: Any) -> None:
        given.pop("warmup", None)
        # A configuration that does not fit is the tuner's to find out.
        with AsyncCompileMode(pool, ignore_errors=True):
            self.warmup(*args, **given)

    JITFunction.run, Autotuner.run = compile_only, compile_all


def tune_quickly() -> None:
    """Other libraries' tuners take their milliseconds for every configuration; a few say as much."""
    import triton.testing

    bench = triton.testing.do_bench

    def quick(call: Any, **given: Any) -> Any:
        return bench(call, **(given | dict(warmup=5, rep=20)))

    triton.testing.do_bench = quick
