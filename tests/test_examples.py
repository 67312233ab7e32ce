"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

from liger_layers import RECURRENCES
from tests.models.tiny import tiny, tiny_tokenizer

FOLDER = Path(__file__).parent.parent / "examples"
TESTED = {"hybrid", "register_gate", "linearize_folder", "mixture_of_memories"}


@pytest.fixture
def example():
    before, state = dict(RECURRENCES), torch.get_rng_state()
    yield lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))["main"]
    torch.set_rng_state(state)
    for name in set(RECURRENCES) - set(before):
        del RECURRENCES[name]


def test_no_example_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.py")} == TESTED


def test_a_hybrid_learns(example, capsys):
    # Half of what bytes at random would cost, after a few seconds.
    assert example("hybrid")(["--steps", "40"]) < 2.8
    assert "The statement " in capsys.readouterr().out


def test_a_gate_is_registered(example, capsys):
    example("register_gate")()
    assert "['liger:leaky', 'full', 'liger:leaky', 'full'] reloaded" in capsys.readouterr().out


def test_a_folder_is_linearized(example, capsys, tmp_path):
    tiny(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    example("linearize_folder")([str(tmp_path / "model"), str(tmp_path / "out")])
    assert "['liger', 'liger', 'liger', 'full']" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()


def test_memories_learn(example, capsys):
    first, last = example("mixture_of_memories")(["--steps", "30"])
    assert last < first
    assert "share of tokens per memory" in capsys.readouterr().out
