"""docs/python.md: its blocks run, in order, and what they leave is served by the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import tiny
from quick_xla import quick_flags

PAGE = Path(__file__).parent.parent / "docs/python.md"

# One process, as a reader's notebook is one.
_SCRIPT = """
import sys
sys.path.insert(0, ".")
for number, block in enumerate(open("page.txt").read().split("\\0")):
    print(f"-- block {number}", flush=True)
    exec(compile(block, f"docs/python.md, block {number}", "exec"), globals())
from jaxft.__main__ import main
print("-- commands", flush=True)
# Embeddings are of unit length, and padding has no part in them.
shorter = embeddings(weights, tokenizer(["the old house"], buckets=[8]))[0]
assert abs(float(house @ house) - 1) < 1e-6 and abs(float(shorter @ house) - 1) < 1e-5
# A run remembers its task and its family; an export must be told of the family.
assert main(["eval", "runs/focal", "data.eval=reviews.csv"]) == 0
assert main(["predict", "runs/quiet", "--text", "the cat"]) == 0
assert main(["predict", "runs/quiet/export", "model.family=mypkg.quiet_bert", "--text", "the cat"]) == 0
assert main(["predict", "runs/quiet/export", "--text", "the cat"]) == 2
"""


def blocks() -> list[tuple[str, str]]:
    """(file name or "", code) of each block of Python."""
    found = re.findall(r"^```python(?: file=(\S+))?\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == PAGE.read_text().count("```python")
    return found


def test_the_page_on_python_runs(tmp_path: Path) -> None:
    tiny.make_folder(tmp_path / "my-model", "classification", tiny.LABELS)
    tiny.write_csv(tmp_path / "reviews.csv", tiny.rows(48))
    code = []
    for name, block in blocks():
        if name:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
        else:
            code.append(block)
    (tmp_path / "page.txt").write_text("\0".join(code))
    root = str(PAGE.parent.parent)
    # One device, whatever this suite has.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said, served = done.stdout.split("-- commands\n")
    assert said.count("time to first step") == 1  # the other two were asked to be quiet
    assert "unknown config key 'train.batch_sise'" in said
    assert "'the small cat sleeps'" in said or "the small cat sleeps" in said
    assert served.count('"label"') == 2
    assert "model family 'quiet_bert' is not supported" in done.stderr
