"""What a study of recovery found, as one table and one picture.

Both read the JSON files that `benchmarks.recovery` writes, one a configuration.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Figures of hidden keys, before the underscore and the number of tokens.
NEEDLES = ("passkey", "multikey", "multivalue")
# Columns: a title, the figure of the model as it is, and whether it is a share.
_COLUMNS: tuple[tuple[str, str, bool], ...] = (
    ("perplexity", "perplexity", False),
    ("loss beyond", "loss_beyond", False),
    ("KL", "kl", False),
    ("tokens agreed", "agreement", True),
    ("six tasks", "average", True),
)


def whole(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of the model as it is."""
    return found["measured"]["variants"]["everything"]


def report(out: Path, names: Sequence[str]) -> str:
    """A table of all that lies in a folder, a row a file in the order of names, and beside it a picture, report.png."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-[0-9]*.json"))]
    if not rows:
        raise ValueError(f"out: expected results in {out}, got none")
    rows = [also for row in rows for also in (row, *_recalling(row))]
    place = {name: i for i, name in enumerate(names)}
    rows.sort(key=lambda r: (r["wanted_tokens"], place.get(r["name"], len(place))))
    needles = sorted({k for r in rows for k in whole(r) if k.startswith(NEEDLES)}, key=_needle)
    titles = [title for title, *_ in _COLUMNS] + ["SQuAD", "MMLU", *(k.replace("_", " ") for k in needles)]
    titles[1:1] = ["of the original's", "late tokens"]
    titles += ["loss beyond without recurrence", "without recall", "minutes"]
    lines = [f"| configuration | tokens | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for row in rows:
        cells = " | ".join(_cells(row, rows, needles))
        lines.append(f"| {row.get('label', row['name'])} | {row.get('tokens', 0):,} | {cells} |")
    devices = ", ".join(sorted({r["device"] for r in rows}))
    predictions = ", ".join(sorted({f"{r['measured']['tokens']:,}" for r in rows}))
    about = "Late tokens: the last bin of perplexity by position. "
    about += "Loss beyond: of the predictions that have read more than the exact tokens of their own row, in nats."
    lines += ["", f"Perplexity of {predictions} predictions, on {devices}. {about}"]
    _picture(rows, out / "report.png")
    return "\n".join([*lines, "", "![perplexity, and pass-keys found by length](report.png)", ""])


def _recalling(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same weights with other numbers of tokens recalled, as rows of their own that took no training."""
    for recall, measured in row.get("recalling", {}).items():
        yield row | dict(label=f"{row['name']}, recalling {recall}", measured=measured)


def _needle(key: str) -> tuple[int, int]:
    kind, _, length = key.rpartition("_")
    return NEEDLES.index(kind), int(length)


def _cells(row: dict[str, Any], rows: list[dict[str, Any]], needles: list[str]) -> list[str]:
    """Of one row what the table says of it, "-" where it was not measured."""
    own, others = whole(row), row["measured"]["variants"]
    first = [_said(own.get(key), share) for _, key, share in _COLUMNS]
    last = own["positions"][-1]["perplexity"]
    base = [r for r in rows if r["name"] == "original" and r["wanted_tokens"] == row["wanted_tokens"]]
    first[1:1] = [_said(own["perplexity"] / whole(base[0])["perplexity"] if base else None, False), _said(last, False)]
    first += [_said(own.get("tasks", {}).get(task, {}).get("score"), True) for task in ("squad", "mmlu")]
    first += [_said(own.get(key), True) for key in needles]
    recalls = "no_recall" in others
    for name in ("no_recurrence" if recalls else "window", "no_recall"):
        other = others.get(name, {}).get("loss_beyond")
        first.append("-" if other is None else f"{other - own['loss_beyond']:+.3f}")
    seconds = sum(row.get(key, 0.0) for key in ("drawing_s", "linearizing_s", "training_s", "measuring_s"))
    seconds += row.get("first", {}).get("training_s", 0.0)
    return [*first, f"{seconds / 60:.1f}"]


def _said(value: float | None, share: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if share else f"{value:.3f}"


def _picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels: perplexity, and pass-keys found by length, a line a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.28 * len(rows) + 3.2), layout="constrained")
    names = [f"{r.get('label', r['name'])}, {r.get('tokens', 0):,}" for r in rows]
    left.barh(names, [whole(r)["perplexity"] for r in rows], color="#D55E00")
    left.set(xscale="log", title="Perplexity", ylim=(len(rows) - 0.4, -0.6))
    for name, row in zip(names, rows, strict=True):
        lengths = sorted(int(k.partition("_")[2]) for k in whole(row) if k.startswith("passkey_"))
        if lengths:
            right.plot(lengths, [100 * whole(row)[f"passkey_{n}"] for n in lengths], marker="o", label=name)
    right.set(title="Pass-keys found, %", xlabel="tokens of text", ylim=(-3, 103))
    right.set_xscale("log", base=2)
    if right.lines:
        right.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
