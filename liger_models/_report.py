"""The demonstration's report: Markdown, JSON and one picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from liger_models._whole import write_json
from liger_models.costs import PROCESS

# Colour says which model, and is told apart by the colour-blind; a broken line says that it was not tuned.
STYLES = {
    "original": dict(color="#0072B2", linestyle="--", marker="o", markerfacecolor="white"),
    "window only": dict(color="#767676", linestyle=":", marker="^", markerfacecolor="white"),
    "linearized": dict(color="#D55E00", linestyle="--", marker="s", markerfacecolor="white"),
    "original, tuned alike": dict(color="#0072B2", linestyle="-", marker="o"),
    "linearized, tuned": dict(color="#D55E00", linestyle="-", marker="s"),
}
_TIMES = {"decode_ms": ("decoding", "ms a token"), "prefill_s": ("prefill", "s")}


def write_report(folder: Path, result: dict) -> None:
    """report.json, report.md and report.png in a folder that exists."""
    write_json(folder / "report.json", result)
    (folder / "report.md").write_text("\n".join(_markdown(result)), encoding="utf-8")
    figure = _picture(result)
    figure.savefig(folder / "report.png", dpi=120)
    plt.close(figure)


def _title(result: dict) -> str:
    return f"{Path(result['model']).stem}, linearized"


def _machine(result: dict) -> str:
    m = result["machine"]
    threads = f"{m['threads']} thread{'' if m['threads'] == 1 else 's'}"
    return f"{m['processor']}, {threads}, torch {m['torch']}, {result['date']}"


def _picture(result: dict):
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.2))
    figure.subplots_adjust(left=0.075, right=0.98, top=0.865, bottom=0.165, hspace=0.42, wspace=0.2)
    figure.suptitle(_title(result), x=0.075, y=0.975, ha="left", fontsize=15, fontweight="bold")
    figure.text(0.075, 0.918, _machine(result), ha="left", fontsize=10, color="#444444")
    quality, cache, decode, prefill = axes.flat
    _quality(quality, result["quality"])
    # A kernel on a GPU takes no processor time; on one thread of a quiet processor the two are the same.
    gpu = result["machine"]["device"] == "cuda"
    for name, rows in result["costs"].items():
        contexts = [row["context"] for row in rows]
        cache.plot(contexts, [row["cache_bytes"] / 1e6 for row in rows], **STYLES[name])
        for axis, key in ((decode, "decode_ms"), (prefill, "prefill_s")):
            spread = [row[key if gpu else PROCESS[key]] for row in rows]
            medians = [s["median"] for s in spread]
            bars = [[s["median"] - s["low"] for s in spread], [s["high"] - s["median"] for s in spread]]
            axis.errorbar(contexts, medians, bars, capsize=4, **STYLES[name])
    for axis, label in ((cache, "Cache, MB"), (decode, "Decoding, ms a token"), (prefill, "Prefill, s")):
        axis.set_title(label, loc="left", fontsize=11)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axis.minorticks_off()
        axis.set(xlabel="context, tokens", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*quality.get_legend_handles_labels(), loc="lower center", ncols=5, frameon=False, fontsize=10)
    kind = "wall time" if gpu else "processor time of one thread"
    note = f"In brackets: perplexity of all positions. Times: {kind}, medians and quartiles, in turns."
    figure.text(0.5, 0.055, note, ha="center", color="#444444")
    return figure


def _quality(axis, quality: dict) -> None:
    for name, style in STYLES.items():
        rows = quality[name]["by_position"]
        label = f"{name} ({quality[name]['perplexity']:.1f})"
        axis.plot(range(len(rows)), [row["perplexity"] for row in rows], label=label, **style)
    axis.set_title("Perplexity by position", loc="left", fontsize=11)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xticks(range(len(rows)), _bins(rows))
    axis.set(xlabel="tokens read before")


def _bins(rows: list[dict]) -> list[str]:
    return [f"{row['start']}-{row['stop']}" for row in rows]


def _markdown(result: dict) -> list[str]:
    whole = {name: found["perplexity"] for name, found in result["quality"].items()}
    sample = result["sample"]
    return [
        f"# {_title(result)}",
        "",
        f"{_machine(result)}. It took {result['seconds'] / 60:.1f} minutes; {result['planned_seconds'] / 60:.1f} were "
        "estimated.",
        "",
        "![perplexity by position, and cache, decoding and prefill against context length](report.png)",
        "",
        "## Quality",
        "",
        *_positions(result["quality"]),
        "",
        f"Tuned alike: {result['training_tokens']:,} tokens of LoRA for each, of the same text in the same order. "
        "Tuning teaches the text as well, so the tuned compare with the tuned: linearized, "
        f"{whole['linearized, tuned']:.2f} against {whole['original, tuned alike']:.2f}; before tuning, "
        f"{whole['linearized']:.2f} against {whole['original']:.2f}. Window only is the linearized model before tuning "
        "with recall and recurrence switched off.",
        "",
        "## Costs",
        "",
        *_costs(result),
        "",
        "Medians, in brackets their quartiles. The two tuned models took turns, A B B A, with every prefill and every "
        "token, on one thread; the ratios are of medians. Wall time grows with whatever else the machine does, and so "
        "may its ratio; process time, the processor's, hardly does, and the picture shows it (on a GPU, wall time).",
        "",
        "## The saved model: linearized, tuned",
        "",
        f"Reloaded from disk, its logits differ by {result['reloaded_logits_difference']:.1e}. What it says:",
        "",
        f"> {sample['prompt']}",
        "",
        *(f"    {line}" for line in sample["text"].splitlines()),
        "",
    ]


def _positions(quality: dict) -> list[str]:
    bins = _bins(next(iter(quality.values()))["by_position"])
    lines = [f"| held-out perplexity, tokens read before | {' | '.join(bins)} | all |", "|---" * (len(bins) + 2) + "|"]
    for name in STYLES:
        cells = [row["perplexity"] for row in quality[name]["by_position"]] + [quality[name]["perplexity"]]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return lines


def _costs(result: dict) -> list[str]:
    """A row a figure and context: every model, and how many times more the first takes than the second."""
    costs = result["costs"]
    lines = [f"| | context | {' | '.join(costs)} | ratio |", "|---" * (len(costs) + 3) + "|"]

    def add(label: str, key: str, cell) -> None:
        for *rows, ratio in zip(*costs.values(), result["ratios"], strict=True):
            cells = " | ".join(cell(row[key]) for row in rows)
            lines.append(f"| {label} | {rows[0]['context']:,} | {cells} | {ratio[key]:.2f} |")

    add("cache, MB", "cache_bytes", lambda value: f"{value / 1e6:.1f}")
    for key, (what, unit) in _TIMES.items():
        add(f"{what}, {unit}", key, _cell)
        add(f"{what}, process time, {unit}", PROCESS[key], _cell)
    return lines


def _cell(spread: dict) -> str:
    return f"{spread['median']:.3g} ({spread['low']:.3g} to {spread['high']:.3g})"
