"""A program in place of python, which records how a launcher starts it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

_RECORDER = """#!{python}
import json, os, signal, sys, time
sys.stdout.reconfigure(line_buffering=True)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
index = os.environ.get("JAX_PROCESS_ID") or os.environ.get("SLURM_PROCID", "0")
record = dict(arguments=sys.argv[1:], environ=dict(os.environ), folder=os.getcwd(), pid=os.getpid())
path = os.path.join({folder!r}, os.environ.get("MEGASCALE_SLICE_ID", "0") + "-" + index)
open(path + ".tmp", "w").write(json.dumps(record))
os.rename(path + ".tmp", path + ".json")
print("out of", index)
print("error of", index, file=sys.stderr)
deadline = time.monotonic() + 20
while "wait" in sys.argv and not told and time.monotonic() < deadline:
    time.sleep(0.02)
if told:
    time.sleep(0.3 * int(index))  # the others save longer
    print("saved by", index)
    sys.exit(130)
sys.exit(int(dict(a.split("=") for a in sys.argv if "=" in a).get("exit", 0)))
"""


class Recorder:
    """The program, and what it has recorded."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.program = folder / "recorder"
        self.program.write_text(_RECORDER.format(python=sys.executable, folder=str(folder)))
        self.program.chmod(0o700)

    def records(self) -> list[dict[str, Any]]:
        """One per process, in order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def environs(self) -> list[dict[str, str]]:
        return [record["environ"] for record in self.records()]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    folder = tmp_path / "recorded"
    folder.mkdir()
    return Recorder(folder)


@pytest.fixture
def clean_env() -> dict[str, str]:
    """The environment without the suite's settings, and without a launcher's."""
    ours = ("JAX", "SLURM", "XLA", "LIBTPU", "TPU_", "MEGASCALE", "PYTHON", "COV")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
