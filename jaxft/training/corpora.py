"""Runs on corpora (``jaxft data build``): opened, checked against the run's tokenizer, and mixed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxft import tasks
from jaxft.config import RunConfig
from jaxft.data.corpus.batches import Stream, StreamOf
from jaxft.data.corpus.course import course_of
from jaxft.data.corpus.files import MANIFEST, is_corpus
from jaxft.data.corpus.mixture import Mixture, make_mixture
from jaxft.data.corpus.paired import Paired, PairStream
from jaxft.data.corpus.pairs import LEAST, SHORTEST, Pairing
from jaxft.data.corpus.reading import BestFit, Concatenated, Rows, Source
from jaxft.data.corpus.store import Corpus, corpus_of, open_corpus
from jaxft.data.packing import packed_fields
from jaxft.data.processors.contract import Processor, TextProcessor
from jaxft.data.processors.opened import as_text
from jaxft.data.sources.read import Reference, shown
from jaxft.errors import UserError, listed
from jaxft.hub.source import Note
from jaxft.tasks import TaskModule

_READ = ("concatenated", "best_fit")
_FIELDS = {"tokens", "mask", "types", "weights", "segments", "positions"}


class Streams(NamedTuple):
    """What a run reads of corpora."""

    train: StreamOf
    eval: StreamOf
    test: StreamOf | None = None

    @property
    def held_out(self) -> tuple[StreamOf, ...]:
        """The parts that are scored."""
        return (self.eval,) if self.test is None else (self.eval, self.test)


def corpora(key: str, reference: Reference | None) -> list[Path]:
    """The folders of corpora that a setting names; empty if it names rows.

    Raises:
      UserError: corpora beside other sources, or a folder of corpora.
    """
    names = [] if reference is None else [reference] if isinstance(reference, str) else list(reference)
    folders = [Path(name).expanduser() for name in names]
    found = [folder for folder in folders if folder.is_dir() and is_corpus(folder)]
    if not found:
        for folder in folders:
            if folder.is_dir() and (inside := sorted(str(one.parent) for one in folder.glob(f"*/{MANIFEST}"))):
                raise UserError(f"{key}={folder} holds corpora; name one: {listed(inside)}")
        return []
    if len(found) < len(folders):
        raise UserError(
            f"{key}={shown(reference or '')}: {found[0]} is a corpus, other sources are not; build one of them too"
        )
    return found


def open_streams(config: RunConfig, module: TaskModule, processor: Processor, note: Note) -> Streams | None:
    """The corpora of a run; None: it reads rows.

    Raises:
      UserError: the task cannot be trained on a corpus, or one is of another tokenizer.
    """
    data = config.data
    train = corpora("data.train", data.train)
    if not train:
        said = {"data.mixture": data.mixture, "data.lengths": data.lengths, "train.batch_ramp": config.train.batch_ramp}
        staged = [f"{key}={value}" for key, value in said.items() if value is not None]
        if data.packing == "concatenated" or staged:
            what = staged[0] if staged else "data.packing=concatenated"
            raise UserError(
                f"{what}: is for corpora (jaxft data build), and data.train={shown(data.train or '')} is none"
            )
        return None
    tokenizer = as_text(processor)
    pairing = tasks.pairing(config.task, tokenizer)
    if pairing is None and set(packed_fields(module.fields(config, tokenizer.pad_id))) != _FIELDS:
        raise UserError(
            f"data.train={shown(data.train or '')}: a corpus has texts alone, and {config.task.name} needs more; name rows"
        )
    if pairing is not None and data.packing != "none":
        raise UserError(
            f"data.packing={data.packing}: each row of the task {config.task.name} is one pair of texts; use none"
        )
    if pairing is None and data.packing not in _READ:
        raise UserError(
            f"data.packing={data.packing}: documents of a corpus share rows: choose concatenated (cut at data.max_length) or best_fit "
            "(documents whole)"
        )
    if data.eval is None or data.test_fraction is not None:
        key = "data.test_fraction" if data.eval is not None else "data.eval"
        raise UserError(
            f"{key}: nothing can be held out of a corpus that is built; set {key.removesuffix('_fraction')} to another corpus "
            "(jaxft data build --eval-fraction 0.01 makes two)"
        )
    mixed = len(train) if data.mixture is not None else 1
    groups = [[folder] for folder in train] if mixed > 1 else [train]
    mixture = (
        Mixture() if data.mixture is None else make_mixture(data.mixture, mixed, course_of(config), "data.mixture")
    )
    make = functools.partial(_stream, config, module, tokenizer, note)
    streams = {}
    for name, reference in (("eval", data.eval), ("test", data.test)):
        if reference is not None:
            folders = corpora(f"data.{name}", reference)
            if not folders:
                raise UserError(f"data.{name}={shown(reference)}: must be a corpus as data.train is (jaxft data build)")
            streams[name] = make(name, [folders], Mixture())
    found = Streams(make("train", groups, mixture), **streams)
    _check_course(config, found.train, note)
    _check_repeats(config, train, found.train, note)
    return found


def _stream(
    config: RunConfig,
    module: TaskModule,
    tokenizer: TextProcessor,
    note: Note,
    name: str,
    groups: Sequence[Sequence[Path]],
    mixture: Mixture,
) -> StreamOf:
    made = [_together([_opened(folder, tokenizer) for folder in folders]) for folders in groups]
    digests, fields = tuple(corpus.digest for corpus in made), module.fields(config, tokenizer.pad_id)
    if (pairing := tasks.pairing(config.task, tokenizer)) is not None:
        pairs = tuple(_pairs(config, pairing, corpus) for corpus in made)
        for corpus, one in zip(made, pairs, strict=True):
            note(f"{name}: {corpus.name}: {_said(corpus, one)}{_short(corpus, one)}")
        return PairStream(name, fields, pairs, mixture, digests)
    rows = [_rows(config, tokenizer, corpus) for corpus in made]
    for corpus, one in zip(made, rows, strict=True):
        note(f"{name}: {corpus.name}: {_said(corpus, one)}")
    return Stream(name, packed_fields(fields), tuple(rows), mixture, digests)


def _pairs(config: RunConfig, pairing: Pairing, corpus: Corpus) -> Paired:
    """A corpus in rows of pairs.

    Raises:
      UserError: rows, or documents, are too short, or no other document can be taken from.
    """
    made, length = Paired(corpus, config.data.max_length, pairing), config.data.max_length
    if length < SHORTEST:
        raise UserError(f"data.max_length={length}: rows of two texts need {SHORTEST} tokens at least")
    documents = corpus.documents - made.short
    if documents < made.needs:
        few = f"{documents} of {corpus.documents:,} documents can be parted into two texts of {LEAST} tokens or more"
        raise UserError(
            f"{corpus.name}: {few}; task.sentences={pairing.kind} needs {made.needs}: build it of longer ones"
        )
    return made


def _short(corpus: Corpus, pairs: Paired) -> str:
    few = pairs.short
    return f"; {few:,} documents ({few / corpus.documents:.1%}) are too short for two texts and left out" if few else ""


def _rows(config: RunConfig, tokenizer: TextProcessor, corpus: Corpus) -> Rows:
    """A corpus in rows.

    Raises:
      UserError: documents are to be rewritten, which rows that are cut anywhere have no room for.
    """
    length, rewriting = config.data.max_length, tasks.rewriting(config.task, tokenizer)
    if config.data.packing == "best_fit":
        if rewriting is not None and length <= rewriting.room:
            raise UserError(f"data.max_length={length}: documents get {rewriting.room} tokens more; set it higher")
        return BestFit(corpus, length, rewriting)
    if rewriting is not None:
        raise UserError(
            f"data.packing={config.data.packing}: the task rewrites documents as they are read, which rows that are cut anywhere have no "
            "room for; set data.packing=best_fit"
        )
    return Concatenated(corpus, length)


def _said(corpus: Corpus, rows: Source) -> str:
    sizes, counts = corpus.lengths.T
    long = int(counts[sizes > rows.longest].sum())
    beyond = (
        f"; {long:,} documents ({long / corpus.documents:.1%}) are longer than a row and go on in others"
        if long
        else ""
    )
    return (
        f"{corpus.documents:,} documents, {corpus.tokens:,} tokens in {rows.count:,} rows of {rows.length}, "
        f"{corpus.tokens / (rows.count * rows.length):.1%} full{beyond}"
    )


def _opened(folder: Path, tokenizer: TextProcessor) -> Corpus:
    corpus = open_corpus(folder)
    if corpus.key["tokenizer"] != tokenizer.digest():
        raise UserError(
            f"{folder}: a corpus of another tokenizer than {tokenizer.folder}, which gives other ids; set "
            f"data.tokenizer={folder}/tokenizer or build it again"
        )
    if corpus.lengths[-1, 0] < 2:
        raise UserError(f"{folder}: no document has more than one token: there is nothing to predict")
    return corpus


def _together(made: Sequence[Corpus]) -> Corpus:
    """Several corpora as one."""
    if len(made) == 1:
        return made[0]
    found: dict[int, int] = {}
    for corpus in made:
        for size, count in corpus.lengths.tolist():
            found[size] = found.get(size, 0) + count
    shards = [shard for corpus in made for shard in corpus.shards]
    lengths = np.array(sorted(found.items()), np.int64)
    name, digest = (" + ".join(getattr(one, what) for one in made) for what in ("name", "digest"))
    return corpus_of(name, shards, lengths, digest, made[0].key)


def _check_repeats(config: RunConfig, folders: Sequence[Path], train: StreamOf, note: Note) -> None:
    """Says how often a run reads each source. Raises UserError if that is more often than it may."""
    data, steps = config.data, config.train.steps
    if data.mixture is None:
        if data.repeats is not None and (epochs := _epochs(config, train)) > data.repeats:
            raise UserError(
                f"data.repeats={data.repeats:g}: the run reads its rows {epochs:.2f} times; train less, or raise it"
            )
        return
    if steps is None:
        raise UserError("train.epochs: a mixture of corpora has no epochs; set train.steps")
    last = max(map(int, data.mixture))
    if last >= steps:
        raise UserError(f"data.mixture: a stage begins at step {last}, and the run ends at {steps}; leave it out")
    taken = train.mixture.taken(course_of(config).blocks_before(steps))
    for folder, source, rows in zip(folders, train.sources, taken, strict=True):
        times = rows / source.count
        note(f"mixture: {folder}: {rows:,} rows ({rows / sum(taken):.1%}), each {times:.2f} times")
        if data.repeats is not None and times > data.repeats:
            raise UserError(
                f"data.repeats={data.repeats:g}: {folder} would be read {times:.2f} times in {steps} steps; lower its weight in "
                "data.mixture, train less, or raise it"
            )


def _epochs(config: RunConfig, train: StreamOf) -> float:
    if config.train.steps is None:
        return config.train.epochs or 0
    return course_of(config).blocks_before(config.train.steps) / len(train)


def _check_course(config: RunConfig, train: StreamOf, note: Note) -> None:
    """Says what the stages of a run are. Raises UserError if they cannot be those of its rows or of its length."""
    said = {"data.lengths": config.data.lengths, "train.batch_ramp": config.train.batch_ramp}
    for key, stages in said.items():
        if stages is None:
            continue
        if config.train.steps is None:
            raise UserError(f"{key}: stages begin at steps, so that a run must say how many it has; set train.steps")
        if (last := max(map(int, stages))) >= config.train.steps:
            note(f"warning: {key}: a stage begins at step {last}, and the run ends at {config.train.steps}")
    if config.data.lengths is not None and any(source.said() for source in train.sources):
        raise UserError(
            "data.lengths: the task rewrites documents, or pairs parts of them, which shorter rows would cut; leave it out"
        )
    if any(stages is not None for stages in said.values()):
        note(f"stages (rows x tokens): {course_of(config).text()}")
