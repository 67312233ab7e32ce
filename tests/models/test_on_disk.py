"""Linearizing on disk writes what linearizing in memory would, in little memory, or nothing at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks import on_disk
from liger_models import checkpoint, linearize, linearize_on_disk
from liger_models.cli import main
from tests.models.tiny import NAMES, tiny, tiny_tokenizer

IDS = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def source(tmp_path):
    """Writes a tiny model in several files of bfloat16, and says where."""

    def write(name="llama", tokenizer=False, shard="40KB", dtype=torch.bfloat16, **options):
        folder = tmp_path / "source"
        tiny(name, **options).to(dtype).save_pretrained(folder, max_shard_size=shard)
        if tokenizer:
            tiny_tokenizer().save_pretrained(folder)
        return folder

    return write


def state(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_tokenizer_is_looked_for_in_the_folder(name, source, tmp_path, monkeypatch):
    folder, asked, find = source(name), [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: asked.append(name) or find(name))
    linearize_on_disk(folder, tmp_path / "out", calibration=IDS, window=8)
    assert {str(name) for name in asked} == {str(folder)}


@pytest.mark.parametrize("options", [dict(window=8), dict(pattern="MFL", window=8)], ids=["liger", "pattern"])
@pytest.mark.parametrize("name", NAMES)
def test_it_writes_what_linearizing_in_memory_would(name, options, source, tmp_path):
    folder, disk, memory = source(name), tmp_path / "disk", tmp_path / "memory"
    assert len(list(folder.glob("*.safetensors"))) > 1
    torch.manual_seed(5)
    assert linearize_on_disk(folder, disk, calibration=IDS, **options) == disk
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(5)
    linearize(model, calibration=IDS, **options).save_pretrained(memory)
    found, wanted = state(disk), state(memory)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert (disk / "config.json").read_text() == (memory / "config.json").read_text()


def test_files_stay_as_they_are_and_ties_stay_tied(source, tmp_path):
    folder = source("qwen2", shard="1GB", tokenizer=True)
    assert (folder / "model.safetensors").is_file()
    (folder / "LICENSE").write_text("free")
    (folder / "pytorch_model.bin").write_text("another format")
    out = linearize_on_disk(folder, tmp_path / "out")
    names = {path.name for path in folder.iterdir()} - {"model.safetensors", "pytorch_model.bin"}
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    new = {*shards, "model.safetensors.index.json", "modeling_liger.py"}
    assert {path.name for path in out.iterdir()} == names | new
    assert (out / shards[0]).read_bytes() == (folder / "model.safetensors").read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = [load_file(out / shard) for shard in shards]
    assert index["weight_map"] == {name: shard for shard, part in zip(shards, held, strict=True) for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in held for tensor in part.values())
    assert "lm_head.weight" not in index["weight_map"]
    model, _ = checkpoint.load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_new_parameters_may_fill_several_files(source, tmp_path):
    out = linearize_on_disk(source(), tmp_path / "out", calibration=IDS, memories=4, window=8)
    before, after = (len(list(folder.glob("*.safetensors"))) for folder in (tmp_path / "source", out))
    assert after > before + 1
    assert not checkpoint.open_weights(str(out), str(out)).training


def test_windows_alone_need_neither_text_nor_new_parameters(source, tmp_path):
    out = linearize_on_disk(source(shard="1GB"), tmp_path / "out", pattern="W", window=8)
    assert [path.name for path in out.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert checkpoint.open_weights(str(out), str(out)).config.liger["pattern"] == ["window"] * 3


def test_a_folder_may_be_replaced_by_what_becomes_of_it(source):
    folder = source()
    linearize_on_disk(folder, folder, calibration=IDS, overwrite=True)
    assert checkpoint.open_weights(str(folder), str(folder)).config.model_type == "liger_llama"


def test_every_chat_template_goes_along(source, tmp_path):
    folder = source(tokenizer=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    out = linearize_on_disk(folder, tmp_path / "out", calibration=IDS)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_the_folder_behind_a_link_is_replaced_and_the_link_stays(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    linearize_on_disk(source(), tmp_path / "link", calibration=IDS, overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()


def test_what_holds_the_source_is_not_replaced(source, tmp_path):
    inner = source()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="out: expected a folder that does not hold the model to read"):
        linearize_on_disk(inner, tmp_path, calibration=IDS, overwrite=True)
    assert (inner / "config.json").is_file()


def test_adapters_are_not_left_behind_in_silence(source, tmp_path):
    folder = source()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="model: expected no adapters, which are to be merged first"):
        linearize_on_disk(folder, tmp_path / "out", calibration=IDS)
    assert not (tmp_path / "out").exists()


def test_a_second_time_needs_leave_and_then_replaces(source, tmp_path):
    folder, out = source(), tmp_path / "out"
    linearize_on_disk(folder, out, calibration=IDS, window=8)
    with pytest.raises(ValueError, match="exists; pass --overwrite"):
        linearize_on_disk(folder, out, calibration=IDS)
    linearize_on_disk(folder, out, calibration=IDS, window=9, overwrite=True)
    assert json.loads((out / "config.json").read_text())["liger"]["window"] == 9
    with pytest.raises(ValueError, match="it is already linearized"):
        linearize_on_disk(out, tmp_path / "again", calibration=IDS)


def damage(folder, change):
    path = max(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if tensors[name].ndim == 2)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[-1, -1] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda f: damage(f, with_nan), {}, "expected finite values, got NaN or infinity"),
        (lambda f: damage(f, torch.Tensor.int), {}, r"expected one of .*, got torch\.int32"),
        (lambda f: damage(f, torch.Tensor.bool), {}, r"expected one of .*, got torch\.bool"),
        (lambda f: damage(f, lambda x: x[:-1].clone()), {}, r"expected shape \[\d+, 48\], got \["),
        (lambda f: max(f.glob("*.safetensors")).unlink(), {}, "expected every file of model.safetensors.index.json"),
        (lambda f: max(f.glob("*.safetensors")).write_bytes(b"x" * 99), {}, "could not read the weights"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), {}, "found neither"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), {}, "could not read the weights"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 0}'), {}, "could not read the"),
        (lambda f: (f / "config.json").unlink(), {}, "expected a local folder with a config.json"),
        (lambda f: (f / "config.json").write_text("{"), {}, "could not load"),
        (lambda f: None, dict(keep=[3]), "keep: expected layer indices from -3 to 2"),
        (lambda f: None, dict(calibration=None), "calibration: expected token ids, or a tokenizer in"),
        (lambda f: None, dict(calibration=IDS + 97), "calibration: expected ids from 0 to 96"),
        (lambda f: None, dict(gate="gate"), "gate: expected one of"),
    ],
)
def test_bad_input_leaves_nothing_behind(source, tmp_path, spoil, options, message):
    folder = source()
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        linearize_on_disk(folder, tmp_path / "out", **{"calibration": IDS, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_weight_is_named(source, tmp_path):
    folder = source(shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"found no model\.layers\.1\.self_attn\.o_proj\.weight"):
        linearize_on_disk(folder, tmp_path / "out", calibration=IDS)


def test_other_models_are_refused_with_a_reason(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="its architecture 'gpt2' is not in the list"):
        linearize_on_disk(tmp_path / "gpt2", tmp_path / "out")
    folder = tmp_path / "gpt2"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="expected weights that are not quantized"):
        linearize_on_disk(folder, tmp_path / "out")


def test_the_command_line(source, tmp_path, capsys):
    folder, out = str(source(tokenizer=True)), str(tmp_path / "out")
    assert main(["linearize", folder, "--out", out, "--on-disk", "--window", "8", "--keep", "1"]) == 0
    assert main(["generate", out, "the quick", "--max-new-tokens", "3"]) == 0
    assert main(["linearize", folder, "--out", out + "2", "--on-disk", "--select", "1"]) == 2
    assert "expected neither --select nor --dtype" in capsys.readouterr().err


def test_memory_stays_below_the_largest_file_and_a_third(tmp_path):
    sizes = dict(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16
    )
    largest = on_disk.write(tmp_path / "source", "150MB", **sizes)
    found = on_disk.measured(tmp_path / "source", tmp_path / "out", rows=2, length=64)
    whole = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    added = found["peak"] - found["before"]
    print(f"weights {whole / 1e6:.0f} MB, largest file {largest / 1e6:.0f} MB, memory added {added / 1e6:.0f} MB")
    assert whole > 3 * largest
    assert added <= 1.3 * largest


@pytest.mark.parametrize("on_disk", [False, True])
def test_features_are_not_fitted_to_what_overflows(on_disk, source, tmp_path):
    folder = source(dtype=torch.float16)
    for path in folder.glob("*.safetensors"):
        tensors = {n: 3e4 * x.sign() if "q_proj.weight" in n else x for n, x in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="fitted to finite numbers, got NaN or infinity in feature"):
        if on_disk:
            linearize_on_disk(folder, tmp_path / "out", calibration=IDS, window=8)
        else:
            linearize(AutoModelForCausalLM.from_pretrained(folder).eval(), calibration=IDS, window=8)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
