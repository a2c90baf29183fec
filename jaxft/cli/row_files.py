"""Files of rows that a task has judged: all of them, or the worst mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from jaxft.data.sources.rows import Row
    from jaxft.tasks.contract import Arrays, Task

MOST_ERRORS = 200
"""Rows of ``errors.csv``."""


def write_rows(target: Path, judged: Iterable[Mapping[str, object]]) -> None:
    """Writes one line per row, as a task judged it.

    Raises:
      UserError: ``target`` cannot be written.
    """
    from jaxft.data.sources.write import row_writer
    from jaxft.files import file_written_whole

    with file_written_whole(target) as file:
        write = row_writer(str(target), file)
        for row in judged:
            write(dict(row))


def write_errors(
    out: Path, task: Task, outputs: Arrays, rows: Sequence[Row], order: np.ndarray, *, split: str = "eval"
) -> list[str]:
    """Writes ``errors.csv`` (of a test ``errors_test.csv``): the worst mistakes among the rows of a split, with their texts.

    Args:
      rows: of the split; none if they are a token cache's.
      order: [examples] the example that each batch's rows were, one after the other.

    Returns:
      Lines that say what was written, or why nothing was; a file of an earlier evaluation is then gone.
    """
    from jaxft.tasks import judges, mistakes

    target = out / ("errors.csv" if split == "eval" else f"errors_{split}.csv")
    if not judges(task):
        return []
    if not rows:
        target.unlink(missing_ok=True)
        return [f"no {target.name}: data.{split} is a token cache, which holds no texts"]
    worst, wrong = mistakes(task, outputs, rows, order, MOST_ERRORS)
    if not worst:
        target.unlink(missing_ok=True)
        return [f"no {target.name}: none of the {len(rows):,} rows is wrong"]
    write_rows(target, worst)
    which = f"the worst {len(worst)} of {wrong:,}" if wrong > len(worst) else f"all {wrong:,}"
    return [f"wrote {target}: {which} mistakes in {len(rows):,} rows, the worst first"]
