"""What a host that frees its own memory sees of the package."""

import os
import subprocess
import sys

import pytest

from liger_ops._torch.memory import SWITCH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
_HOST = """
import torch
import liger_ops._torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
blocks = [torch.ones(2**18) for _ in range(800)]
on_heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0].split("-")
held = resident()
inside = int(on_heap[0], 16) <= blocks[-1].data_ptr() < int(on_heap[1], 16)
del blocks
print(held - before, resident() - before, inside)
"""


@pytest.mark.parametrize("keeps", [False, True])
def test_what_a_host_frees_goes_back_to_the_system_unless_it_asks(keeps):
    """800 blocks of a MiB each lie on the heap, where one small block above them may hold them back, or they do not."""
    environment = {n: x for n, x in os.environ.items() if n != SWITCH} | ({SWITCH: "1"} if keeps else {})
    command = [sys.executable, "-c", _HOST]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    held, left, inside = ran.stdout.split()
    assert float(held) > 750 and inside == str(keeps)
    assert keeps or float(left) <= 50
