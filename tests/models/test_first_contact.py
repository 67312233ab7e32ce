"""What a newcomer meets: folders that load anywhere, adapters without a word about targets, the command's manual."""

import json
import os
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import liger_layers
import liger_linear
import liger_models
import liger_ops
from liger_layers.patterns import LETTERS
from liger_layers.recurrences import with_gate
from liger_linear import __main__ as command
from liger_models import LigerForCausalLM, LigerModelConfig, _versions, checkpoint, linearize_on_disk
from liger_models.configuration import LAYERS
from liger_models.data import Rows
from liger_models.recipe import OBJECTIVES, RECIPES
from tests.models.test_exactness import ids
from tests.models.tiny import NAMES, linearize_tiny, tiny, tiny_tokenizer

CODE = "modeling_liger.py"


def from_scratch():
    config = LigerModelConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mixers=["mom", "window"]
    )
    return LigerForCausalLM(config)


def by_hand(folder):
    model = linearize_tiny(tiny(), window=8)
    # As models have that came with code of their own.
    model.config.auto_map = {"AutoModelForCausalLM": "their/model--modeling_theirs.TheirForCausalLM"}
    return checkpoint.save(model, tiny_tokenizer(), folder / "saved")


def on_disk(folder):
    tiny().save_pretrained(folder / "original")
    return linearize_on_disk(folder / "original", folder / "out", window=8, calibration=ids(2, 64))


def random_weights(folder):
    from_scratch().save_pretrained(folder)


def merged_adapters(folder):
    model = get_peft_model(linearize_tiny(tiny(), window=8), LoraConfig(task_type="CAUSAL_LM"))
    model.merge_and_unload().save_pretrained(folder)


def trained(folder):
    arguments = TrainingArguments(folder / "runs", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = tuple(ids(8, 16))
    Trainer(linearize_tiny(tiny(), window=8), arguments, train_dataset=Rows(rows, rows)).train()
    (folder / "runs" / "checkpoint-1").rename(folder / "last")
    return folder / "last"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("write", [by_hand, on_disk, random_weights, merged_adapters, trained])
def test_every_folder_names_its_classes(write, tmp_path, monkeypatch):
    folder = write(tmp_path) or tmp_path
    names = {auto: name.split(".") for auto, name in config_of(folder)["auto_map"].items()}
    found = {}
    exec((folder / CODE).read_text(encoding="utf-8"), found)
    # A class that is registered wins, and nobody is asked whether to trust the folder.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        again = AutoModelForCausalLM.from_pretrained(folder, **trust)
        assert type(again) is found[names["AutoModelForCausalLM"][1]]
        assert type(again.config) is found[names["AutoConfig"][1]]
        assert not again.is_remote_code() and not again.config.is_remote_code()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE).read_bytes() == (folder / CODE).read_bytes()
    assert config_of(tmp_path / "again") == config_of(folder)
    assert {module for module, _ in names.values()} == {CODE.removesuffix(".py")}
    monkeypatch.setitem(sys.modules, type(again).__module__, None)
    with pytest.raises(ImportError, match="`pip install liger-linear`, then `import liger_models`"):
        exec((folder / CODE).read_text(encoding="utf-8"), {})


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


ELSEWHERE = """
import sys
import torch
from transformers import AutoModelForCausalLM

x = torch.load("x.pt")
names = ("linearized", "scratch")
for name in names:
    try:
        AutoModelForCausalLM.from_pretrained(name)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        sys.exit("expected to be asked")
for name in names:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    torch.save(model(x, use_cache=False).logits, name + ".pt")
    model.save_pretrained(name + "-again")
"""


@torch.no_grad()
def test_a_process_that_never_imported_the_package(tmp_path):
    x = ids(2, 30)
    torch.save(x, tmp_path / "x.pt")
    models = {"linearized": linearize_tiny(tiny("qwen3"), window=8), "scratch": from_scratch().eval()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run_elsewhere(ELSEWHERE, tmp_path)
    for name, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), model(x, use_cache=False).logits)
        for file in ("config.json", CODE):
            assert (tmp_path / f"{name}-again" / file).read_bytes() == (tmp_path / name / file).read_bytes()


def run_elsewhere(code, folder):
    """Run code in another process and folder, which may import what this one may."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    known = os.environ | {"PYTHONPATH": paths, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    arguments = dict(cwd=folder, env=known, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_peft_finds_its_targets(name):
    model = linearize_tiny(tiny(name), window=8)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    table = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    wanted = set(table.get(name, ["qkv_proj"] if name == "phi3" else ["q_proj", "v_proj"]))
    assert adapted.peft_config["default"].target_modules == wanted
    found = {n.split(".")[-1] for n, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert found == wanted and table[f"liger_{name}"] == table.get(name, table[f"liger_{name}"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_finds_the_targets_of_random_weights():
    adapted = get_peft_model(from_scratch(), LoraConfig(task_type="CAUSAL_LM"))
    adapted(input_ids=ids(1, 8), labels=ids(1, 8)).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_the_version_has_one_owner():
    for package in (liger_ops, liger_layers, liger_models):
        assert package.__version__ == liger_linear.__version__
    done = subprocess.run([sys.executable, "-m", "liger_linear", "--version"], capture_output=True, text=True)
    assert done.stdout == f"liger-linear {liger_linear.__version__}\n"


MANUAL = """
import sys
from liger_linear.__main__ import main

commands = ("linearize", "finetune", "generate", "evaluate")
for arguments in (["--help"], ["--version"], [], ["linearise"], *([name, "--help"] for name in commands)):
    try:
        main(arguments)
    except SystemExit:
        pass
    else:
        sys.exit(f"expected {arguments} to end here")
assert not {"torch", "transformers", "numpy", "liger_models"} & set(sys.modules)
"""


def test_the_manual_needs_no_torch(tmp_path):
    assert run_elsewhere(MANUAL, tmp_path).stdout.count("usage: liger") == 5


def test_the_manual_names_what_there_is():
    # What is registered beside it is the user's own.
    assert set(command.GATES) <= set(with_gate())
    letters = {letter: name for letter, name in LETTERS.items() if name.partition(":")[0] in LAYERS}
    assert (letters, tuple(liger_models.PRESETS)) == (command.LETTERS, command.PRESETS)
    assert (tuple(liger_layers.POOLINGS), tuple(RECIPES)) == (command.POOLINGS, command.RECIPES)
    assert command.OBJECTIVES == OBJECTIVES
    assert tuple(liger_layers.FEATURE_MAPS) == command.FEATURE_MAPS


@pytest.mark.parametrize(
    ("installed", "warned"),
    [("5.17.0", False), ("5.24.3", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0", True), ("5.0", False)],
)
def test_an_untested_transformers_is_named(installed, warned, monkeypatch):
    bounds = ["torch>=2.11", "transformers<5.25,>=5.17", 'hypothesis>=6; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: bounds)
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _versions.warn_if_untested()
    assert [str(x.message) for x in seen] == [
        f"transformers: expected <5.25,>=5.17, which liger-linear was tested with, got {installed}"
    ] * warned
