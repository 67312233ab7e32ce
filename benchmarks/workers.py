"""Processes that measure and say so in JSON, a line a row: what breaks one of them costs its own rows only."""

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any


class Worker:
    """One that has imported everything and waits, for seconds that others use, until it is told to begin."""

    def __init__(self, command: list[str], **environment: Any):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True)
        self._process = subprocess.Popen([sys.executable, *command], **pipe, **environment)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def tell(self, line: str = "") -> None:
        # Of one that is gone already, `heard` says why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def heard(self, seconds: float) -> Any:
        """The next row; an error that says why if there will be none."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                self.stop()
                raise TimeoutError("no time left") from None
            if line is None:
                raise EOFError(self.complaint())
            # Compilers print what they like.
            if line.startswith("{"):
                return json.loads(line)

    def rows(self, seconds: float) -> Iterator[dict[str, Any]]:
        """All rows until it ends, which an error says if it ended badly."""
        end = time.monotonic() + seconds
        while True:
            try:
                yield self.heard(end - time.monotonic())
            except EOFError as ended:
                if self._process.wait():
                    raise RuntimeError(str(ended)) from None
                return

    def complaint(self) -> str:
        self._said.seek(0)
        return f"exit status {self._process.wait()}: {self._said.read()[-600:]}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
