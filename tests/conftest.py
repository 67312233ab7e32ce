"""Deterministic tests: one seed each, hypothesis without deadline or database; Triton interpreted, without a GPU."""

import os

import pytest
import torch
from hypothesis import settings

# Read when a kernel is defined, so before any of them is imported.
os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile("liger", deadline=None, database=None, derandomize=True, print_blob=True)
settings.load_profile("liger")
# A core each where tests run in several processes.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
