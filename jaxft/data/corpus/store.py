"""A corpus, opened: a flat stream of tokens over memory-mapped shards, and the places in it where documents begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from jaxft.data.corpus.files import LENGTHS, Body, Shard, mapped, opened, read_manifest
from jaxft.files import JsonObject

__all__ = ["Corpus", "corpus_of", "open_corpus"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents one after the other. Nothing is read before it is asked for."""

    name: str
    """What messages call it: its folder."""
    shards: tuple[Shard, ...]
    first_token: Int64[np.ndarray, " shards+1"]
    """Where each shard begins in the stream."""
    first_document: Int64[np.ndarray, " shards+1"]
    lengths: Int64[np.ndarray, "distinct 2"]
    """How many documents have how many tokens: pairs of a length and a count."""
    digest: str
    """A hash of all tokens, and of where documents begin."""
    key: JsonObject
    """What it was made of and by."""

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.first_token[-1])

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return int(self.first_document[-1])

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document."""
        shard = int(np.searchsorted(self.first_document, number, "right")) - 1
        tokens, offsets = self.shards[shard]
        start, stop = offsets[number - self.first_document[shard] :][:2]
        return tokens[start:stop]

    def documents_in(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Where the documents that a stretch of the stream has tokens of begin and end."""
        shard = int(self.first_token.searchsorted(start, "right")) - 1
        found = []
        while shard < len(self.shards) and (base := int(self.first_token[shard])) < stop:
            offsets = self.shards[shard].offsets
            first = max(0, int(offsets.searchsorted(start - base, "right")) - 1)
            last = min(int(offsets.searchsorted(stop - base)), len(offsets) - 1)
            if first < last:
                found.append(offsets[first : last + 1] + base)
            shard += 1
        return np.concatenate([part[:-1] for part in found]), np.concatenate([part[1:] for part in found])

    def copy(self, start: int, out: Int32[np.ndarray, " tokens"]) -> None:
        """Copies a stretch of the stream that begins at ``start`` and is as long as ``out``."""
        shard = int(self.first_token.searchsorted(start, "right")) - 1
        at, done = start - int(self.first_token[shard]), 0
        while done < len(out):
            found = self.shards[shard].tokens[at : at + len(out) - done]
            out[done : done + len(found)] = found
            done, at, shard = done + len(found), 0, shard + 1

    def fill(self, start: int, out: Int32[np.ndarray, " tokens"], begins: np.ndarray) -> None:
        """Copies a stretch of the stream, and marks which of its tokens begin a document.

        Args:
          start: place of its first token.
          out: where tokens are written; its size is that of the stretch.
          begins: [tokens], set to 1 where a document begins.
        """
        shard = int(self.first_token.searchsorted(start, "right")) - 1
        done, size = 0, len(out)
        while done < size:
            tokens, offsets = self.shards[shard]
            at = start + done - int(self.first_token[shard])
            count = min(size - done, len(tokens) - at)
            if count > 0:
                out[done : done + count] = tokens[at : at + count]
                first, last = offsets.searchsorted((at, at + count))
                begins[offsets[first:last] + (done - at)] = 1
                done += count
            shard += 1


def open_corpus(folder: Path) -> Corpus:
    """Opens a corpus.

    Raises:
      UserError: there is none, or it is not whole.
    """
    body: Body = read_manifest(folder)
    shards = tuple(opened(folder, number, said, body["dtype"]) for number, said in enumerate(body["shards"]))
    lengths = mapped(folder / LENGTHS, "<i8", body["lengths"]["size"] // 16, 2)
    return corpus_of(str(folder), shards, lengths, body["digest"], body["key"])


def corpus_of(name: str, shards: Sequence[Shard], lengths: np.ndarray, digest: str, key: JsonObject) -> Corpus:
    """A corpus of shards that are open."""
    tokens = np.cumsum([0, *(len(shard.tokens) for shard in shards)], dtype=np.int64)
    documents = np.cumsum([0, *(len(shard.offsets) - 1 for shard in shards)], dtype=np.int64)
    return Corpus(name, tuple(shards), tokens, documents, lengths, digest, key)
