"""What `measure_variants` found, as Markdown, JSON and one picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from liger_models._whole import write_json

# Colours are told apart by the colour-blind, as in the demonstration's report.
STYLES = {
    "original": dict(color="#0072B2", linestyle="--", marker="o", markerfacecolor="white"),
    "window": dict(color="#767676", linestyle=":", marker="^", markerfacecolor="white"),
    "no_recall": dict(color="#009E73", linestyle="-.", marker="v"),
    "no_recurrence": dict(color="#CC79A7", linestyle="-.", marker="D"),
    "everything": dict(color="#D55E00", linestyle="-", marker="s"),
}
_SHARES = ("passkey", "multikey", "multivalue", "agreement", "average", "share")
_NEEDLES = ("passkey", "multikey", "multivalue")


def write_report(folder: Path, result: Mapping[str, Any], title: str) -> None:
    """report.json, report.md and report.png in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", result)
    text = f"# {title}\n\n{markdown(result)}"
    if (figure := picture(result["variants"], title)) is not None:
        figure.savefig(folder / "report.png", dpi=120)
        plt.close(figure)
        text += "\n![perplexity by position, and keys found by length](report.png)\n"
    (folder / "report.md").write_text(text, encoding="utf-8")


def markdown(result: Mapping[str, Any]) -> str:
    """A table of figures by variant, and one of perplexity by position where it was measured."""
    variants = result["variants"]
    flat = {name: flattened(row) for name, row in variants.items()}
    figures = list(dict.fromkeys(key for row in flat.values() for key in row))
    lines = [f"| | {' | '.join(variants)} |", "|---" * (len(variants) + 1) + "|"]
    for figure in figures:
        cells = " | ".join(cell(figure, row.get(figure)) for row in flat.values())
        lines.append(f"| {figure.replace('_', ' ')} | {cells} |")
    positions = {name: row["positions"] for name, row in variants.items() if "positions" in row}
    if positions:
        bins = _bins(next(iter(positions.values())))
        lines += ["", f"| perplexity, tokens read before | {' | '.join(bins)} |", "|---" * (len(bins) + 1) + "|"]
        for name, rows in positions.items():
            cells = " | ".join(f"{row['perplexity']:.2f}" for row in rows)
            lines.append(f"| {name} | {cells} |")
    about = f"{result['tokens']:,} predictions."
    if result["exact"]:
        about += f" loss beyond: of those that have read more than the {result['exact']} exact tokens, in nats."
    return "\n".join([*lines, "", about, ""])


def flattened(row: Mapping[str, Any]) -> dict[str, float]:
    """Figures that are single numbers, and the score of each task with its number of examples."""
    found = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
    seconds = found.pop("seconds", None)
    for name, own in row.get("tasks", {}).items():
        if "score" in own:
            count = f" ({own['examples']:.0f} examples)" if "examples" in own else ""
            found[f"task {name}{count}"] = own["score"]
    return found | ({} if seconds is None else {"seconds": seconds})


def cell(figure: str, value: float | None) -> str:
    """A share as per cent, anything else with four digits."""
    if value is None:
        return "-"
    if figure.startswith(("task ", *_SHARES)):
        return f"{100 * value:.1f} %"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def picture(variants: Mapping[str, Mapping[str, Any]], title: str, styles: Mapping[str, dict] = STYLES):
    """A panel of perplexity by position, and one for each kind of hidden key; None where neither was measured."""
    positions = {name: row["positions"] for name, row in variants.items() if "positions" in row}
    kinds = [kind for kind in _NEEDLES if any(_lengths(row, kind) for row in variants.values())]
    if not positions and not kinds:
        return None
    number = bool(positions) + len(kinds)
    figure, axes = plt.subplots(1, number, figsize=(5.2 * number, 4.4), squeeze=False, layout="constrained")
    figure.suptitle(title, ha="left", x=0.01, fontweight="bold")
    panels = list(axes[0])
    if positions:
        _by_position(panels.pop(0), positions, styles)
    for axis, kind in zip(panels, kinds, strict=True):
        for name, row in variants.items():
            if lengths := _lengths(row, kind):
                shares = [100 * row[f"{kind}_{n}"] for n in lengths]
                axis.plot(lengths, shares, label=name, **styles.get(name, {}))
        axis.set_xscale("log", base=2)
        axis.set_title(f"{kind}, % found", loc="left", fontsize=11)
        axis.set(xlabel="tokens of text", ylim=(-3, 103))
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=9)
    return figure


def _by_position(axis, positions: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, dict]) -> None:
    for name, rows in positions.items():
        axis.plot(range(len(rows)), [row["perplexity"] for row in rows], label=name, **styles.get(name, {}))
    longest = max(positions.values(), key=len)
    axis.set_title("Perplexity by position", loc="left", fontsize=11)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xticks(range(len(longest)), _bins(longest))
    axis.set(xlabel="tokens read before")


def _bins(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{row['start']}-{row['stop']}" for row in rows]


def _lengths(row: Mapping[str, Any], kind: str) -> list[int]:
    return sorted(int(key[len(kind) + 1 :]) for key in row if re.fullmatch(rf"{kind}_\d+", key))
