"""What is said of a run's rows before it starts: how long they are, which labels they have, which of them are in two splits."""

from __future__ import annotations

from jaxft.config import RunConfig
from jaxft.data.cache import Cache
from jaxft.data.duplicates import duplicates
from jaxft.data.lengths import counted, lengths_text
from jaxft.data.rendering import has_lengths
from jaxft.errors import listed
from jaxft.hub.source import Note
from jaxft.training.rows import Rows


def report_data(found: Rows, config: RunConfig, note: Note) -> None:
    """Says lengths and labels of the splits, and warns of what they have in common."""
    for split, rows in found.splits:
        texts = has_lengths(split)
        note(
            f"{split.name}: {lengths_text(split, config.data.max_length, rows) if texts else counted(len(split), rows)}"
        )
    _warn_of_duplicates(found, note)
    targets = found.targets
    if not targets.labels:
        return
    if not targets.counts:
        numbers = found.train.columns["labels"]
        note(f"{targets.labels[0]}: {numbers.min():.4g} to {numbers.max():.4g}, mean {numbers.mean():.4g}")
        if numbers.min() == numbers.max():
            note("warning: all training rows have the same number: there is nothing to learn")
        return
    note(f"labels: {listed(targets.labels)}")
    what = "word" if found.train.axis("labels") == "length" else "row"
    for rows, said in ((0, f"no training {what} has"), (1, f"only one training {what} has")):
        few = [label for label, count in zip(targets.labels, targets.counts, strict=True) if count == rows]
        if few:
            note(f"warning: {said} label {listed(few)}")


def _warn_of_duplicates(found: Rows, note: Note) -> None:
    """Says how many held-out rows are training rows too; rows of a token cache are not read for it."""
    for split in (part.split for part in found.held_out):
        if isinstance(found.train, Cache) or isinstance(split, Cache):
            continue
        what = "held-out" if split.name == "eval" else split.name
        if copies := len(duplicates(found.train, split).shared):
            note(
                f"warning: {copies} of {len(split)} {what} rows are training rows as well: scores say less of new texts (jaxft data)"
            )
