"""On a GPU, `pytest benchmarks --benchmark-only` also times every op by events, and leaves JSON, a table and a plot."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import describe, measure, plot, print_table

LENGTHS, TOKENS = (1024, 4096, 16384, 32768), 32768
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def result():
    found = describe(DEVICE)
    yield found
    path = Path(__file__).parent / "results" / "ops-gpu-pytest.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    plot(found, path.with_suffix(".png"))
    print_table(found)


@pytest.mark.parametrize("T", LENGTHS)
def test_every_op(benchmark, result, T):
    """The whole table takes one round; its own times, medians of thirty, are in the JSON."""
    row = benchmark.pedantic(measure, args=(T, TOKENS, torch.bfloat16, DEVICE, 30), rounds=1)
    benchmark.extra_info.update(row)
    result["ms"][str(T)] = row
