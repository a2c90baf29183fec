"""What a corpus holds, as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxft.data.corpus.files import TOKENIZER, read_manifest
from jaxft.data.corpus.origins import Origin, origins_of
from jaxft.data.corpus.store import Corpus, open_corpus
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import one_line

_WINDOWS = (128, 512, 1024, 2048, 8192)
_SHOWN = 400  # characters of a document
_LEFT_OUT = {
    "empty": "empty or blank",
    "missing": "without a text",
    "duplicates": "copies of an earlier one",
    "near_duplicates": "nearly copies of an earlier one",
    "invalid_utf8": "lines that are not valid UTF-8",
}


def summary(folder: Path) -> Iterator[str]:
    """Documents, tokens, lengths, and what was left out."""
    body, corpus = read_manifest(folder), open_corpus(folder)
    counts, places = body["statistics"]["counts"], body["statistics"]["places"]
    size = sum(said["size"] for shard in body["shards"] for said in shard["files"].values())
    yield (
        f"{folder}: {corpus.documents:,} documents, {corpus.tokens:,} tokens in {len(corpus.shards)} shards, {size / 2**20:,.1f} MiB "
        f"({'uint16' if body['dtype'] == '<u2' else 'uint32'})"
    )
    at = [percentile(corpus, share) for share in (50, 95, 99)]
    beyond = ", ".join(f"{share_beyond(corpus, window):.1%} > {window}" for window in _WINDOWS)
    yield f"{folder}: tokens of a document: median {at[0]:,}, 95 % {at[1]:,}, 99 % {at[2]:,}, max {corpus.lengths[-1, 0]:,}; {beyond}"
    by_source = _by_source(folder)
    size = None if any(origin.size is None for origin in by_source) else sum(origin.size or 0 for origin in by_source)
    if size is not None:
        unknown = ""
        if counts.get("unknown_tokens"):
            share = counts["unknown_tokens"] / (counts.get("tokens", 0) or corpus.tokens)
            unknown = f"; {share:.3%} unknown, the first in {places['unknown_tokens']}"
        yield f"{folder}: {size:,} bytes of text, {size / corpus.tokens:.2f} a token{unknown}"
        if len(by_source) > 1:
            for origin in by_source:
                yield f"{folder}: of {origin.source}: {origin.documents:,} documents, {origin.size:,} bytes"
    elif counts.get("bytes"):
        whole = "" if body["key"]["eval_fraction"] is None else " (all splits)"
        tokens = counts.get("tokens", 0) or corpus.tokens
        yield f"{folder}: {counts['bytes'] / tokens:.2f} bytes of text a token{whole}" + (
            f"; {counts['unknown_tokens'] / tokens:.3%} unknown, the first in {places['unknown_tokens']}"
            if counts.get("unknown_tokens")
            else ""
        )
    for name, what in _LEFT_OUT.items():
        if counts.get(name):
            done = ", replaced" if name == "invalid_utf8" and body["key"]["invalid_utf8"] == "replace" else ", left out"
            yield f"{folder}: {counts[name]:,} {what}{done}; the first: {places[name]}"


def _by_source(folder: Path) -> list[Origin]:
    """The documents of each source together."""
    found: dict[str, Origin] = {}
    for one in origins_of([folder])[0]:
        before = found.get(one.source, Origin(one.source, 0, 0))
        size = None if before.size is None or one.size is None else before.size + one.size
        found[one.source] = Origin(one.source, before.documents + one.documents, size)
    return list(found.values())


def percentile(corpus: Corpus, share: float) -> int:
    """The least length that so many percent of the documents do not exceed."""
    ends = np.cumsum(corpus.lengths[:, 1])
    return int(corpus.lengths[np.searchsorted(ends, np.ceil(share / 100 * ends[-1])), 0])


def share_beyond(corpus: Corpus, length: int) -> float:
    """The share of documents of more than so many tokens."""
    sizes, counts = corpus.lengths.T
    return int(counts[sizes > length].sum()) / corpus.documents


def samples(folder: Path, count: int) -> Iterator[str]:
    """Some documents, spread over the corpus, as text again."""
    corpus, tokenizer = open_corpus(folder), Tokenizer(folder / TOKENIZER)
    count = min(count, corpus.documents)
    for number in [corpus.documents * i // count for i in range(count)]:
        tokens = corpus.document(number)
        text = str(tokenizer.decode(tokens[: 2 * _SHOWN], special=True))
        yield f"\ndocument {number:,}, {len(tokens):,} tokens:"
        yield f"  {one_line(text, _SHOWN)}"
