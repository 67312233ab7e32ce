"""Fine-tuning on two processes: the model of one process whose batches are twice as large.

python -m torch.distributed.run --nproc_per_node 2 -m tests.models.test_distributed FOLDER
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from liger_models import finetune
from tests.models.tiny import TEXT, linearize_tiny, tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
# Rows count alike in this objective, so that the mean over processes is that over rows.
RECIPE = dict(steps=3, length=128, objective="kl", window_dropout=0.5, recall_dropout=0.5, retrieval=0.5, warmup=0)


def tuned(batch: int) -> dict[str, torch.Tensor]:
    model = linearize_tiny(tiny(num_hidden_layers=2), window=8, recall=5)
    model = finetune(model, tiny_tokenizer(), TEXT, batch=batch, **RECIPE)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_two_processes_learn_what_one_does(tmp_path):
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 -m tests.models.test_distributed"
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    given = [sys.executable, *command.split(), str(tmp_path)]
    done = subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    both, one = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)], tuned(4)
    before = dict(linearize_tiny(tiny(num_hidden_layers=2), window=8, recall=5).named_parameters())
    assert all(torch.equal(both[0][name], both[1][name]) for name in one)
    assert max((both[0][name] - one[name]).abs().max() for name in one) <= 1e-5
    # More than a hundred times as far from where they began.
    assert max((one[name] - before[name]).abs().max() for name in one) >= 1e-3


if __name__ == "__main__":
    torch.save(tuned(2), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
