"""A small decoder with routed memories from random weights: train it, and see which memories its tokens use.

python examples/mixture_of_memories.py [--steps 60]
"""

import argparse
from typing import Any, cast

import torch

from liger_layers import MixtureOfMemories
from liger_models import LigerForCausalLM, LigerModelConfig


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LigerForCausalLM(
        LigerModelConfig(**sizes, intermediate_size=128, mixers=["mom", "window"], memories=4, memories_per_token=2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        # The second half of a row repeats the first.
        half = torch.randint(64, (8, 32))
        ids = torch.cat([half, half], 1)
        out = model(ids, labels=ids, output_router_logits=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {losses[-1]:.3f}, of which the routers' balance {out.aux_loss.item():.3f}")
    load = cast(MixtureOfMemories, model.model.layers[0].mixer).load(out.router_logits[0])
    print("share of tokens per memory:", [round(x, 2) for x in load.tolist()])
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
