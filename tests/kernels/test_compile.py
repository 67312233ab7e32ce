"""What the compiler makes of every kernel on GPUs that are not there. Its own process: here kernels are interpreted."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.json"
    command = [sys.executable, "-m", "benchmarks.compile_table", "--defaults", "--out", str(path)]
    settings = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=settings, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())["rows"]


def test_every_kernel_compiles_for_every_target(table):
    kernels = {row["kernel"] for row in table}
    assert len(kernels) == 15
    assert {row["target"] for row in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert {row["kernel"] for row in table if row["target"] == target} == kernels


def test_nothing_spills_and_shared_memory_suffices(table):
    assert [row for row in table if row["spilled"] or row["shared"] > row["room"]] == []


def test_no_float_atomics(table):
    assert [row for row in table if row["float_atomics"]] == []


def test_products_run_on_matrix_units(table):
    """Exact float32 has none on NVIDIA's; a single token is no matrix, nor are sums, nor a state as a whole."""
    without = "recurrent_kernel", "joins_kernel", "decays_kernel", "own_scores_kernel", "own_gradients_kernel"
    wanted = [row for row in table if row["dtype"] == "bfloat16" and row["kernel"] not in without]
    assert [row for row in wanted if not row["matrix_instructions"]] == []
