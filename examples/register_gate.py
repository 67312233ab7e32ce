"""A gate of your own: in a layer, in a linearized model, and in a folder that reloads.

python examples/register_gate.py
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from liger_layers import Gate, LigerAttention, register_gate
from liger_models import linearize

# Per channel, and half forgotten after 8 * tau tokens at the latest. Who loads such a model registers it too.
register_gate("leaky", Gate(True, lambda pooled, tau: -(0.0866 + F.softplus(pooled)) / tau))


def main() -> None:
    torch.manual_seed(0)
    layer = LigerAttention(64, 4, gate="leaky", tau=16.0, window=8)
    y, state = layer(torch.randn(1, 100, 64))
    print("a layer:", tuple(y.shape), "state of", state.nbytes(), "bytes")

    sizes: dict[str, Any] = dict(vocab_size=200, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128)).eval()
    model = linearize(model, pattern=["liger:leaky", "full"], tau=16.0, window=8, recall=0)
    ids = torch.randint(200, (1, 50))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
    print("a model:", model.config.liger["pattern"], "reloaded to the same logits")


if __name__ == "__main__":
    main()
