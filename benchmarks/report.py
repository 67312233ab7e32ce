"""JSON that is on disk after every row, whatever happens to the next."""

import importlib.metadata
import importlib.util
import json
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and its software."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {
        n: importlib.metadata.version(n) for n in ("triton", "fla-core") if importlib.util.find_spec(n.split("-")[0])
    }
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return dict(device=name, torch=torch.__version__, date=date) | versions


class Report:
    """Sections of rows by name, and why others are missing."""

    def __init__(self, about: dict[str, Any], path: Path | None):
        self.found, self.path = about | dict(failed={}), path
        self._lock = threading.Lock()

    def add(self, section: str, name: str, row: Any) -> None:
        with self._lock:
            self.found.setdefault(section, {})[name] = row
            shown = {n: f"{y:.3g}" if isinstance(y, float) else y for n, y in row.items()} if type(row) is dict else row
            self._write(f"{section} {name}: {shown}")

    def fail(self, section: str, name: str, why: str) -> None:
        with self._lock:
            self.found["failed"][f"{section} {name}"] = why
            self._write(f"{section} {name} FAILED: {why}")

    def _write(self, said: str) -> None:
        print(said, flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
