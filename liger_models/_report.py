"""The demonstration's report: Markdown, JSON and one picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_PANELS = (
    ("cache_bytes", "cache, MB", 1e-6),
    ("decode_ms_per_token", "decoding, ms a token", 1.0),
    ("prefill_s", "prefill, s", 1.0),
)


def write_report(folder: Path, result: dict) -> None:
    """report.json, report.md and report.png in a folder that exists."""
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(result), encoding="utf-8")
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(12, 3.6), layout="constrained")
    for axis, (key, label, factor) in zip(axes, _PANELS, strict=True):
        for name, rows in result["costs"].items():
            axis.plot([r["context"] for r in rows], [factor * r[key] for r in rows], marker="o", label=name)
        axis.set(xlabel="context, tokens", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(folder / "report.png", dpi=120)
    plt.close(figure)


def _markdown(result: dict) -> str:
    p = result["perplexity"]
    lines = [
        f"# {Path(result['model']).name}, linearized",
        "",
        "| held-out perplexity | |",
        "|---|---|",
        f"| the original | {p['original']:.2f} |",
        f"| linearized, no training | {p['linearized']:.2f} |",
        f"| linearized, after {result['training_tokens']:,} tokens of LoRA | {p['fine_tuned']:.2f} |",
        "",
        "| context | cache, MB | decoding, ms a token | prefill, s |",
        "|---|---|---|---|",
    ]
    for a, b in zip(result["costs"]["original"], result["costs"]["linearized"], strict=True):
        cells = [f"{factor * a[key]:.2f} -> {factor * b[key]:.2f}" for key, _, factor in _PANELS]
        lines.append(f"| {a['context']:,} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Original -> linearized; one run each on this machine ({result['threads']} threads, torch {result['torch']}).",
        "",
        "![cache, decoding and prefill against context length](report.png)",
        "",
        f"Reloaded from disk, the logits differ by {result['reloaded_logits_difference']:.1e}.",
        "",
        f"> {result['sample']['prompt']}",
        "",
        *(f"    {line}" for line in result["sample"]["text"].splitlines()),
        "",
    ]
    return "\n".join(lines)
