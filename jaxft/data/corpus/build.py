"""Building a corpus: parts of the sources are tokenised by any number of processes and machines, and sealed one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np

from jaxft.data.corpus import duplicates
from jaxft.data.corpus.files import (
    TOKENIZER,
    Hashed,
    Seal,
    ShardSaid,
    check_file,
    read_manifest,
    read_sealed,
    remove_leftovers,
    seal_file,
    shard_files,
    token_type,
    write_sealed,
    written_whole,
)
from jaxft.data.corpus.finish import write_manifests
from jaxft.data.corpus.options import Options
from jaxft.data.corpus.parts import Counts, Document, Part, check_sizes, documents_of, source_hash, times_of
from jaxft.data.corpus.plan import Plan, begin
from jaxft.data.corpus.share import Share
from jaxft.data.corpus.workers import results
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.files import folder_written_whole

Note = Callable[[str], None]
_TOGETHER = 512  # documents tokenised together
_CHARACTERS = 1 << 21  # of documents tokenised together: the tokenizer needs a hundred bytes for each token
_SECONDS_BETWEEN_WORDS = 5.0


class Made(NamedTuple):
    """A document as it is stored."""

    split: str
    tokens: np.ndarray
    named: int
    """Which source of the command it is of."""
    size: int
    """Bytes of its text in UTF-8."""


class Task(NamedTuple):
    """A part that is to be tokenised."""

    number: int
    part: Part
    left_out: np.ndarray | None
    """[documents] uint8, 0 for those that stay; None: all do."""


def build(plan: Plan, tokenizer: Tokenizer, share: Share, workers: int, note: Note) -> bool:
    """Does this machine's share of a build, and the end of it if all parts are sealed; whether the corpus is finished.

    Raises:
      UserError: the folder holds another build, or anything in the sources cannot be read.
    """
    state = begin(plan)
    if state == "done":
        note(f"{plan.folder}: is built already, of the same sources with the same tokenizer and options")
        remove_leftovers(plan.folder)
        return True
    _save_tokenizer(plan, tokenizer)
    sealed = {number for number in range(len(plan.parts)) if _is_sealed(plan, number)}
    mine = [number for number in range(len(plan.parts)) if number % share.count == share.index]
    wanted = [number for number in mine if number not in sealed]
    note(
        f"{plan.folder}: {state}; {len(plan.parts)} parts, {len(sealed)} done"
        + (f"; share {share.index} of {share.count}: {len(wanted)} to do" if share.count > 1 else "")
    )
    left_out = _duplicates(plan, share, workers, note) if wanted and plan.options.duplicates != "keep" else None
    tasks = [Task(number, plan.parts[number], None if left_out is None else left_out[number]) for number in wanted]
    pace = _Pace(len(tasks), note)
    arguments = (plan.folder, tokenizer.folder, plan.options, plan.key["tokenizer"])
    for _, seal in results(make_builder, arguments, tasks, workers):
        pace.done(seal)
    return _finished(plan, note)


def _finished(plan: Plan, note: Note) -> bool:
    seals = []
    for number in range(len(plan.parts)):
        try:
            seals.append(cast(Seal, read_sealed(plan.folder / seal_file(number), Seal)))
        except FileNotFoundError:
            if plan.is_done:  # by another machine, at the same time
                return True
            done = sum((plan.folder / seal_file(number)).is_file() for number in range(len(plan.parts)))
            note(
                f"{plan.folder}: {done} of {len(plan.parts)} parts are done; whoever does the last one finishes the corpus"
            )
            return False
    write_manifests(plan, seals)
    remove_leftovers(plan.folder)
    return True


def _save_tokenizer(plan: Plan, tokenizer: Tokenizer) -> None:
    """Puts the tokenizer beside the tokens."""
    for folder in plan.folders.values():
        if (target := folder / TOKENIZER).is_dir():
            continue
        try:
            with folder_written_whole(target) as temporary:
                tokenizer.save(temporary)
        except (UserError, OSError):
            if not target.is_dir():  # another machine was quicker
                raise


def _is_sealed(plan: Plan, number: int) -> bool:
    """Whether a part is done.

    Raises:
      UserError: its sources have changed since.
    """
    part = plan.parts[number]
    try:
        seal = cast(Seal, read_sealed(plan.folder / seal_file(number), Seal))
    except FileNotFoundError:
        return False
    check_sizes(part)
    if seal["times"] != times_of(part) and source_hash(part) != seal["source"]:
        raise UserError(
            f"{part[0].source}: has changed since part {number} of {plan.folder} was made of it; put it back, or remove the folder and "
            "build again"
        )
    for split, shard in seal["shards"].items():
        for name, said in shard["files"].items():
            check_file(plan.folder / split / name, said)
    return True


def _duplicates(plan: Plan, share: Share, workers: int, note: Note) -> list[np.ndarray]:
    """For each part, which documents are left out. Hashes that other machines have made are not made again."""
    count = len(plan.parts)
    # Each machine begins at its own share, so that machines that start together help each other.
    order = sorted(range(count), key=lambda number: ((number - share.index) % share.count, number))
    missing = [number for number in order if not duplicates.hashes_file(plan.folder, number).is_file()]
    tasks = [duplicates.Task(number, plan.parts[number]) for number in missing]
    for _ in results(duplicates.make_hasher, (plan.folder, plan.options), tasks, workers):
        pass
    found = duplicates.find_duplicates(plan.folder, count, plan.options)
    copies, near = duplicates.counted(found)
    total = sum(map(len, found))
    nearly = f", {near} nearly ({near / max(total, 1):.1%})" if plan.options.duplicates == "near" else ""
    note(
        f"duplicates: {copies} of {total} documents are copies of an earlier one ({copies / max(total, 1):.1%}){nearly}; left out"
    )
    return found


# ------------------------------------------------------------------------------------------------- one part


def make_builder(folder: Path, tokenizer: Path, options: Options, digest: str) -> Callable[[Task], Seal]:
    """What tokenises parts in a process.

    Raises:
      UserError: the tokenizer is no longer the one that the plan is of.
    """
    opened = Tokenizer(tokenizer)
    if opened.digest() != digest:
        raise UserError(
            f"{tokenizer}: the tokenizer has changed while the corpus was built; remove the folder and build again"
        )
    return partial(build_part, folder, opened, options)


def build_part(folder: Path, tokenizer: Tokenizer, options: Options, task: Task) -> Seal:
    """Tokenises and seals a part."""
    check_sizes(task.part)
    times, counts = times_of(task.part), Counts()
    documents = documents_of(task.part, options, counts, lambda text: None)
    if task.left_out is not None:
        documents = _kept(documents, task.left_out, counts)
    shards = _write(folder, task.number, _encoded(documents, tokenizer, options, counts), tokenizer.vocab_size, options)
    source = source_hash(task.part)
    if times_of(task.part) != times:
        raise UserError(f"{task.part[0].source}: has changed while it was read; build again")
    seal: Seal = {"shards": shards, "counts": counts.counts, "places": counts.places, "source": source, "times": times}
    write_sealed(folder / seal_file(task.number), seal)
    return seal


def _kept(documents: Iterator[Document], left_out: np.ndarray, counts: Counts) -> Iterator[Document]:
    for document, why in zip(documents, left_out.tolist(), strict=True):
        if why:
            counts.add("duplicates" if why == 1 else "near_duplicates", document.where)
        else:
            yield document


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer, options: Options, counts: Counts) -> Iterator[Made]:
    """Each document as it is stored; it ends with the tokenizer's end token, if there is one."""
    end, unknown = tokenizer.special.end, tokenizer.special.unknown
    for batch in _batches(documents):
        try:
            found = tokenizer.ids([document.text for document in batch])
        except UserError as error:
            raise UserError(f"{batch[0].where} and the {len(batch) - 1} documents after it: {error}") from error
        for document, ids in zip(batch, found, strict=True):
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
            if not ids:
                counts.add("empty", document.where)
                continue
            counts.add("tokens", number=len(ids))
            size = len(document.text if document.text.isascii() else document.text.encode())
            counts.add("bytes", number=size)
            tokens = np.array(ids, np.uint32)
            if unknown is not None and (lost := np.count_nonzero(tokens == unknown)):
                counts.add("unknown_tokens", document.where, int(lost))
            yield Made(_split_of(document.text, options), tokens, document.named, size)


def _split_of(text: str, options: Options) -> str:
    if options.eval_fraction is None:
        return ""
    return "eval" if duplicates.text_hash(text) < options.eval_fraction * 2.0**64 else "train"


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    found, size = list[Document](), 0
    for document in documents:
        found.append(document)
        size += len(document.text)
        if size > _CHARACTERS or len(found) == _TOGETHER:
            yield found
            found, size = [], 0
    if found:
        yield found


class _Shard:
    """A shard while it is written."""

    def __init__(self, tokens: IO[bytes], offsets: IO[bytes], dtype: np.dtype) -> None:
        self._tokens, self._offsets, self._dtype = Hashed(tokens), Hashed(offsets), dtype
        self._sizes: list[int] = []
        self._held: list[np.ndarray] = []
        self._origins: list[list[int]] = []

    def add(self, one: Made) -> None:
        """Appends a document."""
        self._held.append(one.tokens)
        self._sizes.append(len(one.tokens))
        if not self._origins or self._origins[-1][0] != one.named:
            self._origins.append([one.named, 0, 0])
        self._origins[-1][1] += 1
        self._origins[-1][2] += one.size
        if len(self._held) > 1 << 10:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._tokens.write(np.concatenate(self._held).astype(self._dtype))
        self._held = []

    def close(self, names: tuple[str, str]) -> ShardSaid:
        """Writes what is held; what is said of the shard."""
        self._flush()
        ends = np.concatenate([[0], np.cumsum(self._sizes)]).astype("<i8")
        self._offsets.write(ends)
        files = dict(zip(names, (self._tokens.said(), self._offsets.said()), strict=True))
        return {
            "documents": len(self._sizes),
            "tokens": int(ends[-1]),
            "files": files,
            "origins": self._origins,
        }


def _write(
    folder: Path, number: int, encoded: Iterator[Made], vocabulary: int, options: Options
) -> dict[str, ShardSaid]:
    """Writes the shards of a part, one of each split; they are on the disk when the call is over."""
    names = shard_files(number)
    with ExitStack() as files:
        shards = {}
        for split in options.splits:
            tokens, offsets = (files.enter_context(written_whole(folder / split / name)) for name in names)
            shards[split] = _Shard(tokens, offsets, token_type(vocabulary))
        for one in encoded:
            shards[one.split].add(one)
        return {split: shard.close(names) for split, shard in shards.items()}


class _Pace:
    """How fast tokens come, with a word now and then."""

    def __init__(self, parts: int, note: Note) -> None:
        self._parts, self._note = parts, note
        self._done = self._tokens = 0
        self._began = self._said = time.monotonic()

    def done(self, seal: Seal) -> None:
        """A part is done."""
        self._done += 1
        self._tokens += sum(shard["tokens"] for shard in seal["shards"].values())
        now = time.monotonic()
        if self._done == self._parts or now - self._said > _SECONDS_BETWEEN_WORDS:
            self._said = now
            speed = self._tokens / max(now - self._began, 1e-9)
            self._note(f"{self._done} of {self._parts} parts, {self._tokens:,} tokens, {speed:,.0f} tokens/s")


def folders_said(plan: Plan) -> Sequence[tuple[str, int, int]]:
    """(folder, documents, tokens) of each split of a finished corpus."""
    found = [(str(folder), read_manifest(folder)) for folder in plan.folders.values()]
    return [(folder, body["documents"], body["tokens"]) for folder, body in found]
