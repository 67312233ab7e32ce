"""Deterministic tests: one seed each, hypothesis without a deadline or a database."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("liger", deadline=None, database=None, derandomize=True, print_blob=True)
settings.load_profile("liger")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
