"""The end of a build: manifests, written once all parts are sealed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxft.data.corpus.files import (
    LENGTHS,
    MANIFEST,
    FileSaid,
    Hashed,
    Seal,
    ShardSaid,
    digest_of,
    opened,
    token_type,
    write_sealed,
    written_whole,
)
from jaxft.data.corpus.parts import said_of
from jaxft.data.corpus.plan import Plan
from jaxft.errors import UserError
from jaxft.files import JsonObject


def write_manifests(plan: Plan, seals: Sequence[Seal]) -> None:
    """Makes each split's folder a corpus; the first split's last, which says that all is done.

    Raises:
      UserError: a split has no document.
    """
    for split, folder in reversed(plan.folders.items()):
        shards = [seal["shards"][split] for seal in seals]
        documents, tokens = (sum(shard[name] for shard in shards) for name in ("documents", "tokens"))
        if not documents:
            what = "no document is left" if len(plan.folders) == 1 else f"no document is left for {split}"
            raise UserError(f"{plan.folder}: {what} of {', '.join(plan.key['sources'])}; look at what was left out")
        dtype = token_type(plan.key["vocabulary"]).str
        body = {
            "key": {**plan.key, "parts": said_of(plan.parts)},
            "dtype": dtype,
            "documents": documents,
            "tokens": tokens,
            "shards": shards,
            "lengths": _write_lengths(folder, shards, dtype),
            "statistics": _statistics(seals),
            "digest": digest_of(shards),
        }
        write_sealed(folder / MANIFEST, body)


def _statistics(seals: Sequence[Seal]) -> JsonObject:
    """What happened to the documents of all splits, where each thing was first seen, and hashes of the sources."""
    counts: dict[str, int] = {}
    places: dict[str, str] = {}
    for seal in seals:
        for name, count in seal["counts"].items():
            counts[name] = counts.get(name, 0) + count
        places = seal["places"] | places
    return {"counts": counts, "places": places, "source_hashes": [seal["source"] for seal in seals]}


def _write_lengths(folder: Path, shards: Sequence[ShardSaid], dtype: str) -> FileSaid:
    """How many documents have how many tokens, in pairs of int64, lengths in order."""
    found: dict[int, int] = {}
    for number, shard in enumerate(shards):
        lengths, counts = np.unique(np.diff(opened(folder, number, shard, dtype).offsets), return_counts=True)
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            found[length] = found.get(length, 0) + count
    with written_whole(folder / LENGTHS) as file:
        out = Hashed(file)
        out.write(np.array(sorted(found.items()), "<i8").reshape(-1, 2))
    return out.said()
