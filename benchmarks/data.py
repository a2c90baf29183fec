"""What corpora cost: reading packed batches against array_record with Grain, building against the bare tokenizer, resuming at a thousand
million documents.

    python benchmarks/data.py --tokenizer MODEL --texts FILE.jsonl [--length 512] [--seconds 5]

Reading is of one core and of the page cache; both contenders are read in turn, and the medians of rounds are given. Each gives int32
tokens, segments and positions [32, length]; array_record's records are rows of this kind that were packed before, in bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Fast

from jaxft.data.batch import text_fields
from jaxft.data.corpus.batches import Stream, StreamBatches
from jaxft.data.corpus.build import Task, build, make_builder
from jaxft.data.corpus.files import Shard
from jaxft.data.corpus.mixture import Mixture
from jaxft.data.corpus.options import Options
from jaxft.data.corpus.plan import make_plan
from jaxft.data.corpus.reading import BestFit, Concatenated, Rows
from jaxft.data.corpus.share import Share
from jaxft.data.corpus.store import Corpus, corpus_of, open_corpus
from jaxft.data.packing import packed_fields
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.hub.source import resolve_folder

_ROWS = 32
_ROUNDS = 3


def main() -> None:
    """Prints a line of JSON for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", required=True, help="JSON Lines with a key text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    folder = resolve_folder(options.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = _build(Path(scratch), folder, Path(options.texts))
        _read(Path(scratch), corpus, options.length, options.seconds)
    _resume(options.length)


def _say(**said: object) -> None:
    print(json.dumps(said), flush=True)


# ------------------------------------------------------------------------------------------------- building


_HELD: dict[str, Any] = {}


def _begin(target: Path, folder: Path, options: Options, digest: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _HELD.update(
        build=make_builder(target, folder, options, digest), bare=Fast.from_file(str(folder / "tokenizer.json"))
    )
    _HELD["bare"].no_truncation()
    _HELD["bare"].no_padding()


def _bare(texts: list[str]) -> int:
    """The library alone."""
    batches = (texts[first : first + 512] for first in range(0, len(texts), 512))
    return sum(len(one) for batch in batches for one in _HELD["bare"].encode_batch_fast(batch))


def _part(task: Task) -> None:
    _HELD["build"](task)


def _build(scratch: Path, folder: Path, source: Path) -> Corpus:
    """Building on two cores, and the tokenizer alone in two processes, in turn."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    halves = [texts[::2], texts[1::2]]
    options = Options(part_bytes=max(1 << 20, source.stat().st_size // 16))
    ratios: list[float] = []
    for number in range(_ROUNDS):
        target = scratch / f"corpus{number}"
        plan = make_plan(target, [str(source)], Tokenizer(folder), options)
        build(plan, Tokenizer(folder), Share(0, 1), 2, lambda text: None)
        corpus = open_corpus(target)
        tasks = [Task(part, pieces, None) for part, pieces in enumerate(plan.parts)]
        # Processes, imports and the vocabulary are there before the clock starts, for both.
        with get_context("spawn").Pool(2, _begin, (target, folder, options, plan.key["tokenizer"])) as pool:
            pool.starmap(_bare, [(["warm"],)] * 2, chunksize=1)
            began = time.perf_counter()
            bare = sum(pool.starmap(_bare, [(half,) for half in halves], chunksize=1)) / (time.perf_counter() - began)
            began = time.perf_counter()
            pool.map(_part, tasks, chunksize=1)
            built = corpus.tokens / (time.perf_counter() - began)
        ratios.append(built / bare)
        _say(build_tokens_per_s=round(built), bare_tokens_per_s=round(bare), ratio=round(ratios[-1], 3))
    _say(build_to_bare_median=round(statistics.median(ratios), 3))
    return open_corpus(scratch / "corpus0")


# ------------------------------------------------------------------------------------------------- reading


def _speed(batch: Callable[[int], int], seconds: float) -> float:
    batch(0)
    # Processor time of this thread and its helpers: tokens a second and core, whatever else the machine does.
    tokens, step, began = 0, 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        tokens += batch(step)
        step += 1
    return tokens / spent


def _batches(rows: Rows, corpus: Corpus) -> StreamBatches:
    stream = Stream("train", packed_fields(text_fields(0)), (rows,), Mixture(), (corpus.digest,))
    return StreamBatches(stream, _ROWS, (rows.length,), 0)


def _read(scratch: Path, corpus: Corpus, length: int, seconds: float) -> None:
    found: dict[str, list[float]] = {}
    ours = {
        name: _batches(kind(corpus, length), corpus)
        for name, kind in (("concatenated", Concatenated), ("best_fit", BestFit))
    }
    for name, batches in ours.items():
        tokens = sum(int(batches[step]["mask"].sum()) for step in range(batches.steps_per_epoch))
        _say(what=name, density=round(tokens / (batches.steps_per_epoch * _ROWS * length), 4))
    readers: dict[str, Callable[[int], int]] = {
        name: (lambda step, batches=batches: int(batches[step]["mask"].sum())) for name, batches in ours.items()
    }
    readers["array_record + grain"] = _grain(scratch, ours["concatenated"], length)
    for _ in range(_ROUNDS):
        for name, reader in readers.items():
            found.setdefault(name, []).append(_speed(reader, seconds))
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, speed in medians.items():
        _say(what=name, length=length, million_tokens_per_s=round(speed / 1e6, 2))
    _say(times_array_record=round(medians["concatenated"] / medians["array_record + grain"], 1))


def _grain(scratch: Path, batches: StreamBatches, length: int) -> Callable[[int], int]:
    """The same rows as records of array_record, shuffled and batched by Grain."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(scratch / "rows.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        for row in range(_ROWS):
            writer.write(np.stack([batch[name][row] for name in ("tokens", "segments", "positions")]).tobytes())
    writer.close()

    def parsed(record: bytes) -> dict[str, np.ndarray]:
        values = np.frombuffer(record, np.int32).reshape(3, length)
        return {"tokens": values[0], "segments": values[1], "positions": values[2]}

    source = grain.sources.ArrayRecordDataSource([path])
    data = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(parsed).batch(_ROWS)

    def read(step: int) -> int:
        batch = data[step]
        assert batch is not None
        return int((batch["segments"] != 0).sum())

    return read


# ------------------------------------------------------------------------------------------------- resuming


def _resume(length: int) -> None:
    """The first batch of a run that goes on far inside a corpus of 10^9 documents, in files that hold nothing but zeros."""
    documents, size = 1_000_000_000, 64
    shards = 1000
    each = documents // shards
    # The shards of one file: a thousand views of it make the corpus.
    shard = Shard(np.zeros(each * size, np.uint16), np.arange(each + 1, dtype=np.int64) * size)
    corpus = corpus_of("synthetic", [shard] * shards, np.array([[size, documents]], np.int64), "synthetic", {})
    for name, kind in (("concatenated", Concatenated), ("best_fit", BestFit)):
        spent = []
        for step in (1, 123_456, 1_234_567):
            began = time.process_time()
            batches = _batches(kind(corpus, length), corpus)
            batches[step % batches.steps_per_epoch]
            spent.append(time.process_time() - began)
        _say(what=name, documents=corpus.documents, resume_ms=round(1e3 * max(spent), 1))


if __name__ == "__main__":
    main()
