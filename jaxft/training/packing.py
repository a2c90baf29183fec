"""How the rows of a run are packed: whether at all, and how many rows a batch of so many labelled texts takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from jaxft import tasks
from jaxft.config import RunConfig
from jaxft.data.batch import Fields, Shape
from jaxft.data.examples import Examples, Split
from jaxft.data.loader import Batches, make_buckets
from jaxft.data.packing import TARGET, TEXTS, Packed, pack, packed_fields, sides_of
from jaxft.errors import UserError
from jaxft.models.contract import Facts, Head

Note = Callable[[str], None]
_LOOKED_AT = 200
"""Batches whose padding stands for that of all."""
_WORTH = 0.95
"""Packing is taken where it costs at most this share of what buckets cost: how rows are put together is not free of charge."""


def counts_texts(fields: Fields) -> bool:
    """Whether batches of packed rows are counted in texts, each of which has labels or the like of its own; language models count
    rows.

    Args:
      fields: of batches of one text a row.
    """
    return TEXTS in packed_fields(fields)["weights"].axes


def row_length(config: RunConfig) -> int:
    """Tokens of the longest row that a run can have: ``data.max_length`` for each text that its task puts into one."""
    return config.data.max_length * tasks.texts_of_row(config.task)


def target_room(split: Split, config: RunConfig) -> int | None:
    """Tokens that a row has for what is to be written; None: its texts are no pairs."""
    return tasks.sizes_of(config.task)[TARGET] if TARGET in sides_of(split.fields) else None


def packs(config: RunConfig, module: tasks.TaskModule) -> tuple[bool, bool]:
    """Whether several texts share a row in training, and in evaluation: where that lets a model write, each row is one text's."""
    packing = config.data.packing in ("best_fit", "concatenated")
    return packing, packing and not hasattr(module.Task, "written")


def tells_texts_apart(facts: Facts, fields: Fields, head: Head) -> bool:
    """Whether a model can learn from packed rows: not if its head answers once a row, where each text has labels of its own.

    Args:
      fields: of batches of packed rows.
    """
    return "starts" not in fields or "starts" in facts.inputs or head.classes != "rows"


def rows_of_batch(split: Examples, size: int) -> int:
    """The rows of a batch of so many examples: as many, or, where rows hold several labelled texts, those that hold ``size`` texts on
    average. No mesh changes it: a run is the same on any."""
    if not holds_texts(split):
        return size
    return max(1, round(size * len(split) / all_examples(split)))


def examples_in(split: Examples, rows: np.ndarray) -> int:
    """How many examples some rows hold."""
    return int(split.sizes(TEXTS)[rows].sum()) if holds_texts(split) else len(rows)


def all_examples(split: Examples) -> int:
    """How many examples the rows of a split hold."""
    return int(split.sizes(TEXTS).sum()) if holds_texts(split) else len(split)


def examples_of(split: Examples, rows: np.ndarray) -> np.ndarray:
    """The examples that some rows hold, one after the other; where rows are packed, those of the split that was packed."""
    if not isinstance(split, Packed):
        return rows
    return np.concatenate([split.texts[split.first[row] : split.first[row + 1]] for row in rows])


def holds_texts(split: Examples) -> bool:
    """Whether rows hold several texts each, with labels or the like of their own."""
    return TEXTS in split.fields["weights"].axes


def refuse_unknown_rows(config: RunConfig, fields: Fields) -> None:
    """For those who have read no texts. Raises UserError if only these say how many rows a batch has, or whether rows are packed at all.

    Args:
      fields: of batches of one text a row.
    """
    if config.data.packing == "auto" or (config.data.packing != "none" and counts_texts(fields)):
        raise UserError(
            f"data.packing={config.data.packing}: what a batch looks like follows from the lengths of the texts, which are not read here; "
            "give the rows that `jaxft train` says: data.packing=none train.batch_size=ROWS data.buckets=[data.max_length]"
        )


def packed(split: Split, config: RunConfig, note: Note) -> Packed:
    """The texts of a split in rows of :func:`row_length` tokens; says how full they are."""
    length, more = row_length(config), target_room(split, config)
    made = pack(split, length, more)
    tokens = made.sizes("length").sum()
    said = "" if more is None else f" and {made.sizes(TARGET).sum() / (len(made) * more):.1%} of {more} of targets"
    what = "texts" if more is None else "pairs"
    note(
        f"{split.name}: packed {len(split)} {what} into {len(made)} rows of {length} tokens, "
        f"{tokens / (len(made) * length):.1%} full{said}"
    )
    return made


def _full(made: Packed, config: RunConfig) -> float:
    """The share of packed rows that is no padding, on both sides of pairs."""
    more = target_room(made.source, config)
    tokens = made.sizes("length").sum() + (0 if more is None else made.sizes(TARGET).sum())
    return float(tokens / (len(made) * (row_length(config) + (more or 0))))


def _places(shape: Shape) -> int:
    """Tokens of a batch of a shape, on both sides of pairs."""
    return shape.tokens + shape.rows * dict(shape.sizes).get(TARGET, 0)


def _in_buckets(split: Split, config: RunConfig) -> tuple[list[Shape], int]:
    """The shapes of a run's first batches without packing, and how many tokens these hold that are no padding."""
    buckets = make_buckets(config.data.buckets, row_length(config))
    batches = Batches(split, config.train.batch_size, buckets, config.train.seed)
    shapes = [batches.shape_of(step) for step in range(min(_LOOKED_AT, batches.steps_per_epoch))]
    sizes = np.sum([split.sizes(axis) for axis in sides_of(split.fields)], axis=0)
    tokens = sum(int(sizes[batches.rows_of(step)].sum()) for step in range(len(shapes)))
    return shapes, tokens


def padding_text(split: Split, config: RunConfig) -> str:
    """How much padding buckets and packed rows would cost, on one line.

    Args:
      split: training rows.
    """
    length = row_length(config)
    shapes, tokens = _in_buckets(split, config)
    share = _full(pack(split, length, target_room(split, config)), config)
    return (
        f"padding: {1 - tokens / sum(map(_places, shapes)):.1%} in buckets, {1 - share:.1%} in packed rows of {length}"
    )


def choose_packing(
    split: Split, config: RunConfig, facts: Facts | None, able: bool, note: Note
) -> Literal["none", "best_fit"]:
    """What ``data.packing=auto`` means for a run, ``none`` or ``best_fit``: whichever is expected to cost less; says why.

    Padding in buckets is that of the run's own first batches. A token costs what its layers do, and attention to all others of its row:
    of D features and rows of S tokens, 1 + S / (6 D) (Kaplan et al. 2020, section 2.1).

    Args:
      split: training rows.
      facts: of the model; None: it is not known yet, and attention is left out.
      able: whether the task can train on packed rows.
    """
    length = row_length(config)
    shapes, tokens = _in_buckets(split, config)
    padded = sum(map(_places, shapes))
    in_buckets = f"{1 - tokens / padded:.1%} of the tokens in buckets are padding"
    if not able:
        note(
            f"data.packing=auto: none, for texts of the task {config.task.name} cannot share a row with this model; {in_buckets}"
        )
        return "none"
    share = _full(pack(split, length, target_room(split, config)), config)

    def cost(tokens: float, long: int) -> float:
        return tokens * (1 + (0 if facts is None else long / (6 * facts.stacks[0].width)))

    bucketed = sum(cost(_places(shape), dict(shape.sizes)["length"]) for shape in shapes)
    chosen: Literal["none", "best_fit"] = "best_fit" if cost(tokens / share, length) <= _WORTH * bucketed else "none"
    note(f"data.packing=auto: {chosen}; {in_buckets}, {1 - share:.1%} in packed rows of {length}")
    return chosen
