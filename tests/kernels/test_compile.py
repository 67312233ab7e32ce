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


# The joint softmax, on Hopper alone; what it spills costs less than what else it would take.
JOINT = "joint_kernel", "far_states_kernel", "queries_kernel", "near_kernel", "far_keys_kernel", "far_values_kernel"
JOINT += ("sinks_kernel",)


def test_every_kernel_compiles_for_every_target(table):
    kernels = {row["kernel"] for row in table}
    assert len(kernels) == 15 + len(JOINT)
    assert {row["target"] for row in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        wanted = kernels if target == "sm_90" else kernels - set(JOINT)
        assert {row["kernel"] for row in table if row["target"] == target} == wanted


def test_nothing_spills_and_shared_memory_suffices(table):
    assert [row for row in table if row["kernel"] not in JOINT and row["spilled"]] == []
    assert [row for row in table if row["shared"] > row["room"]] == []
    halves = [row for row in table if row["kernel"] in JOINT and row["dtype"] == "bfloat16"]
    assert [row for row in halves if row["spilled"] > 512] == []


def test_no_float_atomics(table):
    assert [row for row in table if row["float_atomics"]] == []


def test_products_run_on_matrix_units(table):
    """Exact float32 has none on NVIDIA's; a single token is no matrix, nor are sums, nor a state as a whole."""
    without = "recurrent_kernel", "joins_kernel", "decays_kernel", "own_scores_kernel", "own_gradients_kernel"
    wanted = [row for row in table if row["dtype"] == "bfloat16" and row["kernel"] not in without]
    assert [row for row in wanted if not row["matrix_instructions"]] == []
