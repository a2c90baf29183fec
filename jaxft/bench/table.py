"""Writing the measured table behind ``model.attention=auto`` (jaxft/attention/measured.json), in a checkout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jaxft
from jaxft.bench.attention import Result
from jaxft.bench.attention_case import TORCH

if TYPE_CHECKING:  # it imports jax
    from jaxft.attention.choice import Measured

TABLE = Path(jaxft.__file__).parent / "attention/measured.json"


def rows_of(results: Iterable[Result]) -> list[Measured]:
    """Rows of the table: one per shape, ms forwards and backwards of each backend that was asked for by name."""
    found: dict[str, Measured] = {}
    for result in results:
        case = result.case
        if case.backend in (*TORCH, "auto", "reference"):
            continue
        row: Measured = {
            "platform": result.platform,
            "operands": case.operands,
            "size": case.size,
            "length": case.length,
            "dropout": case.dropout > 0,
            "ms": {},
        }
        found.setdefault(json.dumps(row), row)["ms"][case.backend] = round(result.both.median, 3)
    return list(found.values())


def write_table(rows: Sequence[Mapping[str, object]], platform: str, source: str) -> None:
    """Replaces the rows of one platform."""
    table = json.loads(TABLE.read_text())
    table["sources"] = {**table.get("sources", {}), platform: source}
    table["rows"] = [row for row in table["rows"] if row["platform"] != platform] + list(rows)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    TABLE.write_text(f'{{"sources": {json.dumps(table["sources"], indent=1)},\n "rows": [\n{lines}\n]}}\n')
