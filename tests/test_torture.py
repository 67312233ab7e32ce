"""The machinery of `make torture`, on a few cases: it counts what holds, and sees what does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What a command would do if outputs were written in place, or a full disk were not told.
BROKEN = """
import contextlib, runpy, sys
from liger_models import _whole, checkpoint

@contextlib.contextmanager
def in_place(folder, overwrite=False):
    folder.mkdir(exist_ok=True)
    yield folder

sys.argv[0] = "torture"
checkpoint.written_whole = in_place
runpy.run_module("tests.torture", run_name="__main__")
"""


def torture(path, *before, only, cases):
    command = [sys.executable, *before, "--only", only, "--cases", cases, "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ)
    return done, json.loads(path.read_text(encoding="utf-8"))


def test_what_holds_is_counted(tmp_path):
    done, found = torture(tmp_path / "found.json", "-m", "tests.torture", only="kills,disk,races,hostile", cases="0.01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: row["passed"] for name, row in found["rows"].items()} == dict(kills=10, disk=2, races=1, hostile=1)
    assert not any(row["failures"] for row in found["rows"].values()) and found["commit"] and found["torch"]


def test_what_does_not_hold_is_seen(tmp_path):
    done, found = torture(tmp_path / "found.json", "-c", BROKEN, only="kills", cases="0.02")
    kills = found["rows"]["kills"]
    assert done.returncode == 1 and kills["passed"] < kills["cases"] == 20
    assert kills["failures"][0]["case"] and kills["failures"][0]["seed"] == 0 and "kills" in done.stdout
