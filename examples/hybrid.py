"""A hybrid of your own from plain layers: a byte-level language model, trained for a minute on the CPU.

python examples/hybrid.py [--steps 300]
"""

import argparse
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import nn

from liger_layers import InterleavedStack


class ByteModel(nn.Module):
    """Seven layers of which one is full attention, one a window, one erases, and the others are Liger Attention."""

    def __init__(self, width: int = 128):
        super().__init__()
        near = dict(window=16, sinks=1)
        self.embed = nn.Embedding(256, width)
        options = {"liger": near, "window": near, "liger:gated_deltanet": {**near, "tau": 16.0}}
        self.stack = InterleavedStack(width, 7, 4, "LLWELLF", options=options)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, ids: torch.Tensor, states=None):
        """ids [B,T] -> logits [B,T,256] and the states to continue from."""
        y, states = self.stack(self.embed(ids), states=states)
        return self.head(y), states


@torch.no_grad()
def write(model: ByteModel, prompt: str, length: int) -> str:
    """The likeliest continuation, one byte at a time from the states."""
    ids = torch.tensor([list(prompt.encode())])
    logits, states = model(ids)
    out = []
    for _ in range(length):
        out.append(logits[:, -1].argmax(-1, keepdim=True))
        logits, states = model(out[-1], states)
    return prompt + bytes(torch.cat(out, 1)[0].tolist()).decode(errors="replace")


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()))
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - 129, (8,))
        rows = torch.stack([text[s : s + 129] for s in starts])
        loss = F.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item() / 0.6931:.2f} bits per byte", flush=True)
    print(write(model, "The statement ", 60))
    return sum(losses[-5:]) / len(losses[-5:])


if __name__ == "__main__":
    main()
