"""What the documents of a corpus are of: sources of the command that built it, and bytes of their texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxft.data.corpus.files import AGAIN, MANIFEST, Body, read_manifest
from jaxft.errors import UserError


class Origin(NamedTuple):
    """Documents that follow each other and are of one source."""

    source: str
    documents: int
    size: int | None
    """Bytes of their texts in UTF-8; None: the build did not say."""


def origins_of(folders: Sequence[Path]) -> list[list[Origin]]:
    """The stretches of each corpus, in the order of its documents. Sources have names of their own: of several corpora, those of their
    folders too.

    Raises:
      UserError: a manifest contradicts itself.
    """
    bodies = [read_manifest(folder) for folder in folders]
    return [list(_stretches(folder, body, len(folders) > 1)) for folder, body in zip(folders, bodies, strict=True)]


def _stretches(folder: Path, body: Body, several: bool) -> Iterator[Origin]:
    sources = [str(source) for source in body["key"]["sources"]]
    for shard in body["shards"]:
        if "origins" not in shard:
            # A build of an earlier version: which source it is of is known where there is one.
            yield Origin(
                _name(folder, sources, sources[0] if len(sources) == 1 else None, several), shard["documents"], None
            )
            continue
        counted = 0
        for origin in shard["origins"]:
            if len(origin) != 3 or not 0 <= origin[0] < len(sources) or min(origin) < 0:
                raise UserError(f"{folder / MANIFEST}: damaged: documents of no source; {AGAIN}")
            named, documents, size = origin
            counted += documents
            yield Origin(_name(folder, sources, sources[named], several), documents, size)
        if counted != shard["documents"]:
            raise UserError(
                f"{folder / MANIFEST}: damaged: sources of {counted} documents, not {shard['documents']}; {AGAIN}"
            )


def _name(folder: Path, sources: Sequence[str], source: str | None, several: bool) -> str:
    if source is None or (several and len(sources) == 1):
        return str(folder)
    return f"{folder}: {source}" if several else source
