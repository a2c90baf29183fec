"""The rows of a run: read and encoded in memory, or opened from token caches. What is learnt of them is known afterwards."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

import numpy as np

from jaxft.config import DataConfig, RunConfig, to_tree
from jaxft.data.cache import Cache, check_made, open_cache
from jaxft.data.cache_files import AGAIN, MANIFEST, is_cache, read_manifest
from jaxft.data.encode import read_rows
from jaxft.data.examples import Split, make_split
from jaxft.data.held_out import Labelling, hold_out
from jaxft.data.labels import declared_labels, label_text
from jaxft.data.packing import CLASSES
from jaxft.data.processors.contract import Processor
from jaxft.data.sources.listing import suffix_of
from jaxft.data.sources.read import Reference, Row, shown
from jaxft.errors import UserError, listed
from jaxft.files import fits
from jaxft.hub.source import Note, Source
from jaxft.machine import buckets
from jaxft.tasks import Labelled, Targets, TaskModule, problem_of, scores_rows, stored_fields

_PART = 1 << 16  # examples looked at together
# Options of data that no row's encoding depends on; a tokenizer is compared by its hash, labels by their names.
_NOT_OF_ROWS = (
    *("train", "eval", "eval_fraction", "test", "test_fraction", "split_group", "stratify"),
    *("labels", "tokenizer", "buckets", "packing", "mixture", "lengths", "repeats", "read_ahead"),
)


class HeldOut(NamedTuple):
    """Encoded rows that are scored."""

    split: Split
    count: int
    """Rows that its examples are of."""
    rows: tuple[Row, ...] = ()
    """The rows themselves, where the task's scores need them, or its report."""


class Rows(NamedTuple):
    """The encoded rows of a run."""

    targets: Targets
    """With the number of training rows (or words) of each label."""
    train: Split
    count: int
    """Rows that the training examples are of."""
    eval: HeldOut
    test: HeldOut | None = None

    @property
    def held_out(self) -> tuple[HeldOut, ...]:
        """The parts that are scored."""
        return (self.eval,) if self.test is None else (self.eval, self.test)

    @property
    def splits(self) -> tuple[tuple[Split, int], ...]:
        """Each part, and how many rows it has."""
        return (self.train, self.count), *((part.split, part.count) for part in self.held_out)


def open_rows(config: RunConfig, module: TaskModule, processor: Processor, source: Source | None, note: Note) -> Rows:
    """The training rows and those that are scored, each from where the configuration says.

    Args:
      config: with ``data.long_texts`` settled.
      source: where weights come from; None: random ones.

    Raises:
      UserError: rows that cannot be read or learnt of, or a cache that was made otherwise than this run would.
    """
    data = config.data
    if data.train is None:
        raise UserError("data.train is not set; name a file, for instance data.train=my.csv")
    fields, columns = stored_fields(module, config, processor), module.columns(config)
    kept, taken = cached("data.train", data.train), dict[str, list[Row]]()
    if kept is not None:
        train = _opened(kept, "train", config, module, processor)
        targets, rows = targets_of(train), list[Row]()
        refuse_other_labels(data.labels, targets.labels, f"{kept}: its labels are")
        if shares := [key.removesuffix("_fraction") for key in shares_of(data)]:
            raise UserError(
                f"data.train={data.train} is a token cache, of which no rows can be held out; set {shares[0]}, to "
                "a cache beside it or to rows"
            )
    else:
        rows = read_rows(data.train, data, columns, note, grouped=True)
        # Before rows are held out: of scores, each label has one row.
        targets, train = module.study(rows, config, stored_targets(config, source, module), note), None
        rows, taken = divided(rows, config, module, note)
    held = {
        name: rows_of_split(name, config, module, processor, targets.labels, note) if here is None else here
        for name, here in {"eval": taken.get("eval"), "test": taken.get("test")}.items()
        if here is not None or getattr(data, name) is not None
    }
    if data.split_group is not None:
        _warn_of_groups({"train": rows} | {name: part for name, part in held.items() if isinstance(part, list)}, note)
    if train is None:
        train = make_split("train", module.encode(rows, processor, targets, config), fields)
        targets = dataclasses.replace(targets, counts=counts_of(train, targets.labels), rows=len(train))
    kept = scores_rows(module.Task) or hasattr(module.Task, "wrongness") or config.log.samples > 0

    def held_out(name: str, part: list[Row] | Cache) -> HeldOut:
        if isinstance(part, Cache):
            return HeldOut(part, part.rows)
        split = make_split(name, module.encode(part, processor, targets, config), fields)
        return HeldOut(split, len(part), tuple(part) if kept else ())

    parts = {name: held_out(name, part) for name, part in held.items()}
    count = train.rows if isinstance(train, Cache) else len(rows)
    return Rows(targets, train, count, parts["eval"], parts.get("test"))


def shares_of(data: DataConfig) -> dict[str, float]:
    """The shares of the training rows that are held out, by their keys."""
    found = {} if data.eval is not None else {"data.eval_fraction": data.eval_fraction}
    return found if data.test_fraction is None else {**found, "data.test_fraction": data.test_fraction}


def divided(
    rows: list[Row], config: RunConfig, module: TaskModule, note: Note
) -> tuple[list[Row], dict[str, list[Row]]]:
    """The training rows without those that are held out of them, and these by the name of their split."""
    shares = shares_of(config.data)
    if not shares:
        return rows, {}
    # The same rows for every train.seed: runs are compared on them.
    grouped = config.data.split_group is not None
    kept, found, said = hold_out(rows, shares, 0, labelling(config, module), grouped=grouped)
    note(f"{shown(config.data.train or '')}: {said}")
    return kept, {key.removeprefix("data.").removesuffix("_fraction"): part for key, part in found.items()}


def rows_of_split(
    name: str,
    config: RunConfig,
    module: TaskModule,
    processor: Processor,
    labels: tuple[str, ...],
    note: Note,
    *,
    others: str | None = None,
) -> list[Row] | Cache:
    """The rows that ``data.eval`` or ``data.test`` names.

    Args:
      labels: of the training rows.
      others: what messages say of these where they are a model's; its rows need no groups.
    """
    reference, data = getattr(config.data, name), config.data
    kept = cached(f"data.{name}", reference)
    if kept is not None:
        return open_held_out(kept, name, config, module, processor, labels, others or "the training rows have")
    return read_rows(reference, data, module.columns(config), note, grouped=others is None)


def _warn_of_groups(parts: dict[str, list[Row]], note: Note) -> None:
    """Says which groups are on two sides; rows of token caches have none."""
    groups = {name: {row.group for row in rows} for name, rows in parts.items()}
    for first, second in itertools.combinations(groups, 2):
        if shared := sorted(groups[first] & groups[second]):
            note(
                f"warning: {len(shared)} of the {len(groups[second])} groups of {second} are groups of {first} as well: "
                f"{listed(shared, 5)}"
            )


def labelling(config: RunConfig, module: TaskModule) -> Labelling:
    """What rows are held out in equal shares by: a column of labels, or several labels as the task reads them."""
    if not config.data.stratify:
        return None
    if hasattr(module, "row_labels"):
        return cast(Labelled, module).row_labels(config)
    return next((i for i, column in enumerate(module.columns(config)) if column.kind == "label"), None)


def stored_targets(config: RunConfig, source: Source | None, module: TaskModule) -> Targets | None:
    """What the head that is to be trained further was made for; None: there is none."""
    if source is None or source.head != module.Task.head or config.model.head == "fresh":
        return None
    return Targets(source.labels or (), problem=problem_of(module))


def counts_of(split: Split, labels: tuple[str, ...]) -> tuple[int, ...]:
    """How often each class occurs; ids below 0 are none. Empty where there are no classes, but numbers."""
    if not labels or split.fields["labels"].dtype != "int32":
        return ()
    found = np.zeros(len(labels), np.int64)
    for part in split.parts(_PART):
        ids = part.columns["labels"]
        if split.axis("labels") == CLASSES:  # 1 for each class that a row is of
            ids = np.nonzero(ids.reshape(-1, len(labels)))[1]
        found += np.bincount(ids[ids >= 0], minlength=len(labels))
    return tuple(found.tolist())


# ---------------------------------------------------------------------------------------------------------- token caches


def cached(key: str, reference: Reference) -> Path | None:
    """The folder of a token cache, if that is what a setting names.

    Raises:
      UserError: a cache among several sources, or a folder of caches.
    """
    folders = [_place(one) for one in ((reference,) if isinstance(reference, str) else reference)]
    caches = [folder for folder in folders if folder.is_dir() and is_cache(folder)]
    if not caches:
        if isinstance(reference, str) and (inside := [one.parent for one in folders[0].glob(f"*/{MANIFEST}")]):
            raise UserError(f"{key}={reference} holds token caches; name one: {listed(map(str, sorted(inside)))}")
        return None
    if len(folders) > 1:
        raise UserError(f"{key}: {caches[0]} is a token cache, which is read alone; build one of all these sources")
    return caches[0]


class _Encoded(TypedDict):
    labels: list[str]
    counts: list[int]
    problem: str | None


class _About(TypedDict):
    """What a cache that jaxft cache wrote says besides (:mod:`jaxft.training.caching`)."""

    rows: int
    tokenizer: str
    targets: _Encoded


def _place(reference: str) -> Path:
    """Where a source lies, if it is a folder; of an object store a copy of it."""
    if buckets.is_address(reference) and not suffix_of(reference) and not has_magic(reference):
        return buckets.fetched(reference)
    return Path(reference).expanduser()


def _opened(folder: Path, name: str, config: RunConfig, module: TaskModule, processor: Processor) -> Cache:
    said, wanted = read_manifest(folder), made_of(config, module, processor)
    # Options that the version which wrote it did not have yet had the value that is now their default.
    usual = {
        **{f"task.{key}": value for key, value in to_tree(type(config.task)()).items()},
        **{f"data.{key}": value for key, value in to_tree(DataConfig()).items()},
    }
    made = {key: usual[key] for key in wanted if key in usual} | said["made"]
    if not fits(said["about"], _About):
        raise UserError(f"{folder}: does not say what its rows were encoded for; {AGAIN}")
    was = said["about"]["tokenizer"]
    other = (
        f"a token cache made with another tokenizer (that of {was} then, {processor.folder} now, which gives other ids)"
    )
    check_made(folder, made, wanted, {"tokenizer": other})
    return open_cache(folder, name, stored_fields(module, config, processor))


def open_held_out(
    folder: Path,
    name: str,
    config: RunConfig,
    module: TaskModule,
    processor: Processor,
    labels: tuple[str, ...],
    others: str,
) -> Cache:
    """A cache of held-out rows.

    Args:
      name: of the split: ``eval``, ``test``.
      labels: that its ids must be of, in this order.
      others: what messages say of these.

    Raises:
      UserError: it was made otherwise than this run would, or of other labels.
    """
    if scores_rows(module.Task):
        raise UserError(
            f"data.{name}={folder} is a token cache, which holds no texts, and scores of {config.task.name} compare texts; name the rows"
        )
    cache = _opened(folder, name, config, module, processor)
    found = targets_of(cache).labels
    if found != labels:
        raise UserError(
            f"{folder}: a token cache with labels {_listed(found)}, {others} {_listed(labels)}; build both with one "
            "command (jaxft cache build)"
        )
    return cache


def refuse_other_labels(
    declared: Sequence[object] | Mapping[str, object] | None, labels: tuple[str, ...], whose: str
) -> None:
    """Raises UserError if ``data.labels`` declares other classes than there are.

    Args:
      whose: what messages say of those that there are.
    """
    names, _ = declared_labels(declared)
    if labels and names and names != tuple(map(label_text, labels)):
        raise UserError(f"data.labels={_listed(names)}: {whose} {_listed(labels)}; leave it out")


def _listed(labels: tuple[str, ...]) -> str:
    return f"[{listed(map(repr, labels))}]"


def targets_of(cache: Cache) -> Targets:
    """What its rows were encoded for."""
    said = cache.about["targets"]
    return Targets(tuple(said["labels"]), tuple(said["counts"]), said["problem"], len(cache))


def made_of(config: RunConfig, module: TaskModule, processor: Processor) -> dict[str, object]:
    """What encoded rows depend on besides the texts themselves, by dotted name."""
    options, data = to_tree(config.task), to_tree(config.data)
    # A module of another package need not say which of its options these are.
    names = ("name", *getattr(module, "ROW_OPTIONS", options))
    return {
        **{f"task.{name}": options[name] for name in dict.fromkeys(names)},
        **{f"data.{name}": value for name, value in data.items() if name not in _NOT_OF_ROWS},
        "data.max_length": processor.max_length,
        "tokenizer": processor.digest(),
    }
