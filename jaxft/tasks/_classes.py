"""What tasks with classes share: which names their classes have, in which order, and what the loss of each weighs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from jaxft.config import RunConfig
from jaxft.data.labels import declared_labels, fits, label_text, look_alikes, refuse_scores, sorted_labels
from jaxft.errors import UserError, nearest
from jaxft.tasks.contract import Note, Targets


def class_names(values: Iterable[object], config: RunConfig, stored: Targets | None, note: Note) -> tuple[str, ...]:
    """The names of the classes in the order of their ids: as declared (``data.labels``), as the head to be trained further has
    them, or sorted as the training rows have them.

    Args:
      values: the labels of the training rows; looked at once, and only different ones kept.
      stored: of the head that is to be trained further, if it names its classes.
      note: called with a warning for each pair of names that look alike.

    Raises:
      UserError: so many different numbers that they are scores, not classes.
    """
    different = distinct(values)
    declared, found = declared_labels(config.data.labels)[0], sorted_labels(different)
    labels = declared or found
    if stored is not None and stored.labels:
        # The model's own spelling stays: "True" and "true" are one name.
        same = tuple(map(label_text, stored.labels)) == declared if declared else fits(found, stored.labels)
        labels = stored.labels if same else labels
    if labels is found:
        refuse_scores(found, config.data.label)
    for warning in look_alikes(different, labels):
        note(f"warning: {warning}")
    return labels


def distinct(values: Iterable[object]) -> list[object]:
    """Each value once; 1, 1.0 and True are three."""
    return list({(type(value), value): value for value in values}.values())


def class_weights(
    wanted: Literal["none", "balanced"] | Mapping[str, float], targets: Targets
) -> tuple[float, ...] | None:
    """One weight per class, as ``task.class_weights`` says; None for 1 each.

    Raises:
      UserError: weights that do not name exactly the labels, negative ones, or a class without rows to balance by.
    """
    labels, counts = targets.labels, targets.counts
    if wanted == "balanced":
        empty = [label for label, count in zip(labels, counts, strict=True) if count == 0]
        if empty:
            raise UserError(f"task.class_weights=balanced: no training row has label {empty[0]!r}")
        return tuple(sum(counts) / (len(labels) * count) for count in counts)
    if not isinstance(wanted, Mapping):
        return None
    for name in wanted:
        if name not in labels:
            raise UserError(f"task.class_weights.{name}: unknown label: {nearest(name, labels)}")
    missing = [label for label in labels if label not in wanted]
    if missing:
        raise UserError(f"task.class_weights: no weight for label {missing[0]!r}")
    weights = tuple(wanted[label] for label in labels)
    if min(weights) < 0 or max(weights) == 0:
        raise UserError(f"task.class_weights={wanted}: weights must not be negative, nor all zero")
    return weights
