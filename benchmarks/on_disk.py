"""Peak memory of linearizing a random Llama of 1.2 billion parameters on disk, and of doing so in memory.

python -m benchmarks.on_disk --out benchmarks/results/on-disk.json

Memory is what /proc says of a process of its own: before the conversion, with everything imported, and at most.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

# Of Llama 3.2 1B: 1,235,814,400 parameters, embeddings tied.
SIZES = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)


def write(folder: Path, shard: str, **sizes) -> int:
    """Write a random bfloat16 Llama in files of at most `shard`; the bytes of the largest."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | sizes), rope_parameters=dict(rope_type="default", rope_theta=500000.0))
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def status(name: str) -> int:
    """Bytes that /proc/self/status tells under this name."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def convert(source: Path, out: Path, rows: int, length: int, on_disk: bool) -> dict[str, float]:
    """Linearize in this process; its memory before and at most, in bytes, and the seconds it took."""
    from liger_models import checkpoint, linearize, linearize_on_disk

    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    before, start = status("VmRSS"), time.perf_counter()
    if on_disk:
        linearize_on_disk(source, out, calibration=ids)
    else:
        model = checkpoint.open_weights(str(source), str(source), dtype="auto")
        linearize(model, calibration=ids).save_pretrained(out)
    return {"before": before, "peak": status("VmHWM"), "seconds": time.perf_counter() - start}


def measured(source: Path, out: Path, rows: int = 8, length: int = 256, on_disk: bool = True) -> dict[str, float]:
    """The same in a new process, whose peak is its own."""
    call = f"convert(Path({str(source)!r}), Path({str(out)!r}), {rows}, {length}, {on_disk})"
    code = f"import json; from pathlib import Path; from benchmarks.on_disk import convert; print(json.dumps({call}))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="1GB", help="largest file of weights (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where 8 GB of models go for a while; default: a temporary one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "source"
        largest = write(source, args.shard)
        rows = {
            "on disk": measured(source, Path(folder) / "disk"),
            "in memory": measured(source, Path(folder) / "memory", on_disk=False),
        }
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"Weights {size / 1e9:.2f} GB, largest file {largest / 1e9:.3f} GB")
    print("| | before, GB | peak, GB | peak / largest file | added / largest file | s |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        row["of_largest"], row["added_of_largest"] = row["peak"] / largest, (row["peak"] - row["before"]) / largest
        cells = (row["before"] / 1e9, row["peak"] / 1e9, row["of_largest"], row["added_of_largest"])
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in cells)} | {row['seconds']:.1f} |")
    result = {"torch": torch.__version__, "transformers": transformers.__version__, "largest": largest, "size": size}
    if args.out:
        args.out.write_text(json.dumps(result | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
