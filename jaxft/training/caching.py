"""Token caches of a run's rows: read, encoded and written in flat memory, however many there are."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxft import tasks
from jaxft.config import RunConfig
from jaxft.data.cache import open_cache, write_cache
from jaxft.data.cache_files import MANIFEST, is_cache, remove_cache
from jaxft.data.encode import checked_rows
from jaxft.data.examples import Split
from jaxft.data.held_out import Strata
from jaxft.data.lengths import lengths_text
from jaxft.data.processors.contract import Processor
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_checks import check_vocabulary
from jaxft.data.rendering import has_lengths
from jaxft.data.sources.read import Reference, Row, files_of, shown
from jaxft.errors import UserError
from jaxft.files import JsonObject, refuse_existing
from jaxft.hub.source import Note, Source
from jaxft.tasks import TaskModule
from jaxft.training.processors import processor_of
from jaxft.training.recipe import open_start
from jaxft.training.rows import cached, counts_of, labelling, made_of, shares_of, stored_targets
from jaxft.training.setup import settled

_SECONDS_BETWEEN_WORDS = 5.0
_SPLITS = ("train", "eval", "test")


class _Part(NamedTuple):
    """What is to be written as a cache."""

    rows: _Rows
    mask: np.ndarray | None = None
    """[rows] bool: which of them; None: every one."""


def build_caches(config: RunConfig, out: Path, note: Note) -> tuple[Path, ...]:
    """Writes the training rows and those that are scored as ``train``, ``eval`` and, if there is a test, ``test`` inside ``out``; their
    folders.

    Rows are read two or three times: for what there is to learn, and to be encoded. What an interrupted build left
    is written anew.

    Raises:
      UserError: anything in the configuration or rows that cannot work, or ``out`` holds something else.
    """
    module = tasks.task(config.task.name)
    config = settled(config, module)
    for name in _SPLITS:
        key, reference = f"data.{name}", getattr(config.data, name)
        if reference is not None and cached(key, reference) is not None:
            raise UserError(f"{key}={shown(reference)} is a token cache already; name the rows themselves")
    _make_room(out, [out / name for name in _SPLITS], note)
    source = open_start(config, note)
    processor = processor_of(config, source)
    if source is not None and isinstance(processor, Tokenizer):
        check_vocabulary(processor, source.family.facts(source.config).inputs, paired=config.data.text_pair is not None)
    build = _Build(config, module, processor, source, note)
    parts = build.parts()
    folders = {name: out / name for name in parts}
    try:
        # The few held-out rows first: what is wrong with them shows at once.
        for name in reversed(parts):
            build.write(folders[name], parts[name])
    except BaseException:
        for folder in folders.values():
            remove_cache(folder)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
    return tuple(folders.values())


def _make_room(out: Path, folders: Sequence[Path], note: Note) -> None:
    """Refuses a folder that holds anything but what is left of a build, which is removed."""
    if (folders[0] / MANIFEST).is_file():  # it is written last
        raise UserError(f"{out} holds token caches already; remove them, or name another --out")
    if any(map(is_cache, folders)):
        note(f"{out}: holds a build that was not finished; it is begun anew")
        for folder in folders:
            remove_cache(folder)
    refuse_existing(out)


class _Rows:
    """Rows of a source, read anew each time that they are asked for."""

    def __init__(
        self, reference: Reference, read: Callable[[Reference, Note], Iterator[Row]], note: Note, *, media: bool
    ) -> None:
        self.reference, self._read, self._note, self._media = reference, read, note, media
        self.files = _identity(reference, media=media)

    def __iter__(self) -> Iterator[Row]:
        note, self._note = self._note, lambda text: None  # what is found out about files is said once
        return self._read(self.reference, note)

    def chosen(self, mask: np.ndarray | None) -> Iterator[Row]:
        """The rows for which a mask [rows] is true; None: every row."""
        yield from self if mask is None else compress(self, mask)
        if (now := _identity(self.reference, hashed=False, media=self._media)) != [
            one | {"sha256": None} for one in self.files
        ]:
            changed = next((a["path"] for a, b in zip(self.files, now, strict=False) if a["size"] != b["size"]), "")
            raise UserError(f"{shown(self.reference)}: {changed} has changed while it was read; build the cache again")


class _Build:
    """What the caches of one run have in common."""

    def __init__(
        self, config: RunConfig, module: TaskModule, processor: Processor, source: Source | None, note: Note
    ) -> None:
        self._config, self._module, self._processor, self._source, self._note = config, module, processor, source, note
        self._columns = module.columns(config)

    def parts(self) -> dict[str, _Part]:
        """The training rows and those that are scored. What there is to learn is known afterwards."""
        data = self._config.data
        if data.train is None:
            raise UserError("data.train is not set; name a file, for instance data.train=my.csv")
        shares = shares_of(data)
        if shares and tasks.scores_rows(self._module.Task):
            raise UserError(
                f"{next(iter(shares)).removesuffix('_fraction')} is not set: scores of {self._config.task.name} compare texts, which a "
                "cache of held-out rows has not; name rows of their own"
            )
        rows = self._rows(data.train)
        strata = Strata(labelling(self._config, self._module), grouped=data.split_group is not None)
        seen = _counted(rows, strata)
        stored = stored_targets(self._config, self._source, self._module)
        self.targets = self._module.study(seen, self._config, stored, self._note)
        found = {"train": _Part(rows)}
        if shares:
            for _ in seen:  # what the task did not look at
                pass
            part = strata.held_out(shares, 0)
            self._note(f"{shown(data.train)}: {strata.text(part, shares)}")
            names = ["train", *(key.removeprefix("data.").removesuffix("_fraction") for key in shares)]
            found = {name: _Part(rows, part == place) for place, name in enumerate(names)}
        named = {name: _Part(self._rows(where)) for name in _SPLITS[1:] if (where := getattr(data, name)) is not None}
        found |= named
        return {name: found[name] for name in _SPLITS if name in found}

    def _rows(self, reference: Reference) -> _Rows:
        if reference == "-":
            raise UserError(
                "data.train=-: standard input can be read once only, and a cache needs it twice; name a file"
            )
        data, columns = self._config.data, self._columns
        media = any(column.kind in ("image", "sound") for column in columns)

        def read(one: Reference, note: Note) -> Iterator[Row]:
            return checked_rows(one, data, columns, note, grouped=True)

        return _Rows(reference, read, self._note, media=media)

    def write(self, folder: Path, part: _Part) -> None:
        """Writes one cache."""
        rows, mask = part
        total = None if mask is None else int(mask.sum())
        config, module, processor = self._config, self._module, self._processor
        fields = tasks.stored_fields(module, config, processor)
        pace = _Pace(folder.name, total, self._note)
        encoded = module.encode(pace.counted(rows.chosen(mask)), processor, self.targets, config)

        def about(split: Split) -> dict[str, object]:
            targets = dataclasses.replace(self.targets, counts=counts_of(split, self.targets.labels), rows=len(split))
            return {
                "rows": pace.rows,
                "targets": dataclasses.asdict(targets),
                "tokenizer": str(processor.folder),
                "source": {"reference": shown(rows.reference), "files": rows.files, "held_out_of_it": mask is not None},
                "versions": {name: version(name) for name in ("jaxft", "tokenizers")},
            }

        made = made_of(config, module, processor)
        most = {"tokens": processor.vocab_size - 1} if isinstance(processor, Tokenizer) else {"image": 255}
        write_cache(folder, encoded, fields, made, about, most)
        cache = open_cache(folder, folder.name, fields)
        if has_lengths(cache):
            self._note(f"{folder.name}: {lengths_text(cache, config.data.max_length, cache.rows)}")
        size = sum(path.stat().st_size for path in folder.iterdir())
        self._note(f"{folder}: {cache.rows} rows, {size / 2**20:.1f} MiB, {pace.speed():,.0f} rows/s")


def _counted(rows: Iterable[Row], strata: Strata) -> Iterator[Row]:
    for row in rows:
        strata.add(row)
        yield row


class _Pace:
    """How fast rows go by, with a word now and then."""

    def __init__(self, name: str, total: int | None, note: Note) -> None:
        self._name, self._note = name, note
        self._total = "" if total is None else f" of {total:,}"
        self.rows = 0
        self._began = self._said = time.monotonic()

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows."""
        for row in rows:
            yield row
            self.rows += 1
            if self.rows % 1024 == 0 and time.monotonic() - self._said > _SECONDS_BETWEEN_WORDS:
                self._said = time.monotonic()
                self._note(f"{self._name}: {self.rows:,}{self._total} rows, {self.speed():,.0f} rows/s")

    def speed(self) -> float:
        """Rows per second so far."""
        return self.rows / max(time.monotonic() - self._began, 1e-9)


def _identity(reference: Reference, *, hashed: bool = True, media: bool = False) -> list[dict[str, object]]:
    """Path, size and hash of the files that a source is read from."""
    return [
        {"path": str(path), "size": path.stat().st_size, "sha256": _sha256(path) if hashed else None}
        for path in files_of(reference, media=media)
    ]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources_said(folder: Path, about: JsonObject) -> Iterator[str]:
    """Whether the files that a cache was made of are as they were, a line each."""
    for said in about["source"]["files"]:
        path = Path(said["path"])
        if not path.is_file():
            yield f"{folder}: its source {path} is not here"
        elif path.stat().st_size != said["size"] or _sha256(path) != said["sha256"]:
            yield f"{folder}: its source {path} has changed since: rows that are encoded anew may be others"
