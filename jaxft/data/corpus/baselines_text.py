"""What counts of one corpus make of another, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from jaxft.data.corpus.baselines import MOST_TOKENS, MOST_VOCABULARY, held_out_bits, learn
from jaxft.data.corpus.files import TOKENIZER
from jaxft.data.corpus.origins import origins_of
from jaxft.data.corpus.store import open_corpus
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError


def baseline_lines(folder: Path, other: Path) -> Iterator[str]:
    """A table of a unigram's and a trigram's bits a token, perplexity and bits a byte on held-out documents.

    Args:
      folder: the corpus that is counted.
      other: the one that is held out.

    Raises:
      UserError: they are of different tokenizers, or there is nothing to count.
    """
    corpus, held_out, tokenizer = open_corpus(folder), open_corpus(other), Tokenizer(folder / TOKENIZER)
    if corpus.key["tokenizer"] != held_out.key["tokenizer"]:
        raise UserError(f"{other}: a corpus of another tokenizer than {folder}; build both with one (jaxft data build)")
    if corpus.digest == held_out.digest:
        raise UserError(f"{other}: has the same tokens as {folder}, so nothing is held out; name another corpus")
    vocabulary, before = int(corpus.key["vocabulary"]), tokenizer.special.before
    if vocabulary > MOST_VOCABULARY:
        raise UserError(
            f"{folder}: a vocabulary of {vocabulary:,} tokens; trigrams are counted of at most {MOST_VOCABULARY:,}"
        )
    model, counted = learn(corpus, vocabulary, before)
    found = held_out_bits(model, held_out, before)
    if not found.tokens:
        raise UserError(f"{other}: no document has a token that can be predicted")
    sizes = [origin.size for origin in origins_of([other])[0]]
    size = None if None in sizes else sum(one or 0 for one in sizes)
    first = f", the first {MOST_TOKENS:,}" if counted == MOST_TOKENS and corpus.tokens > MOST_TOKENS else ""
    yield f"\n{other}: {found.tokens:,} tokens predicted from the counts of {counted:,} tokens of {folder}{first}"
    yield f"{'':<34}{'bits/token':>12}{'perplexity':>14}{'bits/byte':>12}"
    for name, bits in (
        ("uniform", math.log2(vocabulary) * found.tokens),
        ("unigram", found.unigram),
        ("trigram (modified Kneser-Ney)", found.trigram),
    ):
        of_bytes = f"{bits / size:>12.4f}" if size else f"{'n/a':>12}"
        yield f"{name:<34}{bits / found.tokens:>12.4f}{2 ** (bits / found.tokens):>14,.2f}{of_bytes}"
    if not size:
        yield f"{other}: was built by an earlier version, which did not store bytes of texts; build it again for bits a byte"
    if not before:
        yield "the first token of each document is not predicted: the tokenizer names none that comes before documents"
