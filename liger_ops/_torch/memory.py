"""How the allocator of the C library treats what the chunked algorithms free."""

import os

import torch

# The environment variable that, set to 1, lets it keep freed memory.
SWITCH = "LIGER_KEEP_MEMORY"


def keep_freed_memory() -> None:
    """With LIGER_KEEP_MEMORY=1, lets glibc keep freed blocks up to 31 MiB, for the whole process.

    Freed once, a block of nearly that size makes glibc keep what is freed later, as in any process that has loaded a
    model. Until then it hands temporaries back to the system, and time goes to page faults: `liger_attention` of 2,048
    tokens with nine heads took 45 to 49 ms forward on one thread, and 42 to 45 with it. But a host that frees blocks
    below that size may not get them back, so it is for who runs the process to say.
    """
    if os.environ.get(SWITCH) == "1":
        torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
