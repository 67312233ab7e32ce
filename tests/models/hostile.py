"""Folders of models that mean harm, each by what is done to a good one and by what is said of it."""

import json
import os
import socket

from tests.models.mutations import nested


def change(folder, name, **settings):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def listen(path):
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.open(".", os.O_RDONLY)
        # A path of a socket is short.
        os.chdir(path.parent)
        opened.bind(path.name)
        os.fchdir(here)
        os.close(here)


def elsewhere(path):
    outside = path.parent.parent / "outside.json"
    outside.write_text("{}")
    path.symlink_to(outside)


def shards(name):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        held = {"lm_head.weight": name, "model.norm.weight": "a.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
        (folder / "sub").mkdir()
        os.mkfifo(folder / "sub" / "pipe")

    return damage


# Functions that damage a folder, and what is said of it in one line.
FILES = [
    (replaced("config.json", os.mkfifo), "config.json: expected a plain file, got a pipe"),
    (replaced("tokenizer.json", os.mkfifo), "tokenizer.json: expected a plain file, got a pipe"),
    (replaced("model.safetensors", os.mkfifo), "model.safetensors: expected a plain file, got a pipe"),
    (replaced("merges.txt", listen), "merges.txt: expected a plain file, got a socket"),
    (replaced("vocab.json", lambda path: path.symlink_to("/dev/zero")), "got a link to /dev/zero"),
    (replaced("added_tokens.json", elsewhere), r"added_tokens.json: expected a file of .*/model, got a link to"),
    (replaced("config.json", lambda path: path.symlink_to("nothing")), "expected a plain file, got a link to noth"),
    (replaced("config.json", lambda path: path.symlink_to("config.json")), "config.json: "),
    (replaced("config.json", lambda path: path.write_text(nested(20_000))), "config.json: expected JSON that is"),
    (replaced("config.json", lambda path: path.write_text(nested(40))), "config.json: expected JSON that is at mo"),
    (replaced("generation_config.json", lambda path: path.write_text(nested(99))), "generation_config.json: expec"),
    (lambda folder: os.truncate(folder / "config.json", 1 << 25), "config.json: expected at most 16,777,216 bytes"),
    (lambda folder: os.truncate(folder / "tokenizer_config.json", 1 << 40), "tokenizer_config.json: expected at"),
    (shards("/etc/passwd"), "expected names of files below its folder, got '/etc/passwd'"),
    (shards("../outside"), "expected names of files below its folder, got '../outside'"),
    (shards("sub/pipe"), "pipe: expected a plain file, got a pipe"),
    (
        lambda folder: change(folder, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"]),
        "tokenizer_config.json: expected names of files below its folder",
    ),
]
HEADERS = [nested(50_000), "[1]", "{", '{"x": {"dtype": "F32", "shape": [-1]}}', " " * 99]
SETTINGS = [
    ("config.json", dict(num_hidden_layers=10**9), "num_hidden_layers: expected an integer from 1 to 2048, got 1"),
    ("config.json", dict(pad_token_id=10**30), "Padding_idx must be within num_embeddings"),
    ("config.json", dict(use_cache="x"), "use_cache"),
    ("config.json", dict(rms_norm_eps={}), "rms_norm_eps"),
    ("generation_config.json", dict(eos_token_id=[1, "x"]), r"eos_token_id: expected token ids, got \[1, 'x'\]"),
    ("generation_config.json", dict(bos_token_id=[None]), r"bos_token_id: expected token ids, got \[None\]"),
    ("generation_config.json", dict(bos_token_id={}), "bos_token_id: expected token ids, got {}"),
    ("generation_config.json", dict(output_hidden_states=1e300), "output_hidden_states: expected true or false"),
    ("generation_config.json", dict(num_beams=1.5), "num_beams: expected an integer >= 0, got 1.5"),
    ("generation_config.json", dict(repetition_penalty="x"), "repetition_penalty"),
    ("tokenizer_config.json", dict(model_max_length=""), "model_max_length: expected a number, got ''"),
    ("tokenizer_config.json", dict(chat_template=5), "chat_template: expected a text, got int"),
    ("tokenizer.json", dict(model={"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "?"}), "UNK"),
]
CODE_NEEDED = [
    ("config.json", {"model_type": "theirs"}),
    ("tokenizer_config.json", {"tokenizer_class": "TheirTokenizer"}),
]
CODE = """
from pathlib import Path
Path({!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class TheirConfig(LlamaConfig):
    model_type = "theirs"
class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
class TheirTokenizer(PreTrainedTokenizerFast):
    pass
"""


def bring_code(folder):
    """Code of its own, for its config, model and tokenizer, that leaves a mark."""
    (folder / "theirs.py").write_text(CODE.format(str(folder / "ran")))
    auto = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    change(folder, "config.json", auto_map=auto)
    auto = {"AutoTokenizer": ["theirs.TheirTokenizer", "theirs.TheirTokenizer"]}
    change(folder, "tokenizer_config.json", auto_map=auto)
