"""Deterministic tests: one seed each, hypothesis without deadline or database; Triton interpreted, without a GPU.

LIGER_TEST_DEVICE=cuda pytest tests/kernels/test_ops.py ... puts every tensor on a GPU instead, where kernels compile.
"""

import os

import pytest
import torch
from hypothesis import settings

DEVICE = os.environ.get("LIGER_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # Read when a kernel is defined, so before any of them is imported.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    torch.set_default_device(DEVICE)
settings.register_profile("liger", deadline=None, database=None, derandomize=True, print_blob=True)
settings.load_profile("liger")
# A core each where tests run in several processes.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    # The longest file of all: begun last, it would leave the other processes nothing to do.
    items.sort(key=lambda item: item.path.name != "test_real_model.py")
