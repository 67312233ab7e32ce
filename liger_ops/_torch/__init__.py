"""The chunked algorithms in vectorised PyTorch: what runs on the CPU.

`recurrence` chooses between two wings: `in_place` where nothing records, with a backward of its own, and `traced`,
which autograd differentiates. `attention` is the window and its joint softmax with a recurrence, out of the same parts.
"""

from liger_ops._torch.memory import keep_freed_memory

keep_freed_memory()
