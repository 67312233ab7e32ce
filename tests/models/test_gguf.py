"""GGUF files: their layers are counted before anything is done for as many as they claim."""

import pytest

from liger_models import checkpoint, generate
from liger_models._gguf import blocks
from liger_models.cli import main
from tests.models.ggufs import write_gguf


@pytest.fixture
def path(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_layers_are_counted(path):
    assert blocks(path) == 3
    assert generate(*checkpoint.load(path), "the quick", max_new_tokens=2)
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"GGML" + whole[4:], whole[:500], whole[:16] + b"\xff" * 8 + whole[24:]):
        path.write_bytes(content)
        assert blocks(path) is None


def test_more_layers_than_there_are(path, capsys):
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_cound"))
    assert main(["generate", str(path), "the"]) == 2
    assert "num_hidden_layers: expected at most the 3 that the file holds, got 32" in capsys.readouterr().err
