"""What the comparing scripts here share: the machine is printed first, then the rows, which ``--json`` keeps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxft.bench.machine import machine
from jaxft.files import write_atomic

Rows = list[dict[str, Any]]


def report(
    options: argparse.Namespace,
    packages: tuple[str, ...],
    compare: Callable[[argparse.Namespace], Rows],
    text_of: Callable[[Rows], str],
) -> None:
    """Prints machine and versions, compares, and prints what came of it.

    Args:
      options: with ``run``, the run file, and ``json``, where the rows go, or None.
      packages: whose versions are told.
    """
    about = machine(packages)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    rows = compare(options)
    if text := text_of(rows):
        print(text)
    if options.json:
        found = {"machine": about, "run": options.run, "rows": rows}
        write_atomic(Path(options.json), json.dumps(found, indent=1) + "\n")
