"""``jaxft tokenizer``: a vocabulary learnt of texts, as a tokenizer folder that `transformers` reads too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from jaxft.config import load_config
from jaxft.data.corpus.options import Documents, Invalid, Options
from jaxft.errors import UserError
from jaxft.machine.platform import set_up_jax

_ABLE = ("data.text", "data.header", "data.quotes", "data.missing_text")
_TRIED = 1000
"""Texts that the tokenizer is tried on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", choices=["train"], help="learn a tokenizer of texts")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files, folders, patterns; and data.text=COLUMN")
    parser.add_argument("--kind", required=True, choices=["wordpiece", "bpe", "unigram"], help="how it is learnt")
    parser.add_argument("--size", required=True, type=int, help="tokens of the vocabulary, special ones among them")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where to write; must not exist, or be empty")
    parser.add_argument(
        "--for", dest="use", choices=["encoder", "decoder", "encoder-decoder"], default="encoder",
        help="encoder (default): [CLS], [SEP], [MASK]; decoder: <|endoftext|>; encoder-decoder: </s>",
    )  # fmt: skip
    parser.add_argument(
        "--begin",
        action="store_true",
        help="decoder: texts begin with <|endoftext|>, so that their first token is learnt",
    )
    parser.add_argument(
        "--sentinels",
        type=int,
        default=0,
        metavar="N",
        help="encoder-decoder: N tokens <extra_id_0>, ... for span corruption",
    )
    parser.add_argument("--lowercase", action="store_true", help="texts are read in lower case")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of a row, as the files state it (default: 512)"
    )
    parser.add_argument(
        "--sample", type=float, default=1.0, metavar="F", help="share of the texts that is read (default: 1)"
    )
    parser.add_argument("--documents", choices=get_args(Documents), default="line", help="what is one in .txt files")
    parser.add_argument("--invalid-utf8", choices=get_args(Invalid), default="refuse", help="lines that are no UTF-8")


def run(options: argparse.Namespace) -> int:
    """Learns a tokenizer and says what it makes of some of the texts."""
    settings = [one for one in options.sources if one.startswith("data.") and "=" in one]
    sources = [one for one in options.sources if one not in settings]
    for one in settings:
        if one.partition("=")[0] not in _ABLE:
            raise UserError(f"tokenizer train {one}: of a run's settings, {', '.join(_ABLE)} are for it")
    _check(options)
    if not sources:
        raise UserError("tokenizer train: name files, folders or patterns of texts")
    set_up_jax(None)
    from jaxft.data.corpus.duplicates import text_hash
    from jaxft.data.corpus.parts import Counts, divide, documents_of
    from jaxft.data.processors.tokenizer_training import Wanted, train_tokenizer, tried
    from jaxft.files import refuse_existing

    data, out = load_config(None, settings).data, Path(options.out).expanduser()
    refuse_existing(out)
    made = Options(data.text, data.header, data.quotes, data.missing_text, options.documents, options.invalid_utf8)
    counts, kept, seen = Counts(), list[str](), [0, 0]

    def texts() -> Iterator[str]:
        counts.counts.clear()
        kept.clear()
        seen[:] = [0, 0]
        for part in divide(sources, made):
            for document in documents_of(part, made, counts, _say):
                if options.sample < 1 and text_hash(document.text) >= options.sample * 2.0**64:
                    continue
                seen[0] += 1
                seen[1] += len(document.text.encode())
                if len(kept) < _TRIED:
                    kept.append(document.text)
                elif seen[0] % 1009 == 0:  # later ones too, without a second reading
                    kept[seen[0] // 1009 % _TRIED] = document.text
                yield document.text

    wanted = Wanted(
        options.kind, options.size, options.use, options.lowercase, options.max_length, options.begin, options.sentinels
    )
    tokenizer = train_tokenizer(texts, wanted, out)
    print(f"{out}: {options.kind} of {tokenizer.vocab_size:,} tokens, of {seen[0]:,} texts, {seen[1] / 2**20:,.1f} MiB")
    if tokenizer.vocab_size < options.size:
        print(f"{out}: fewer than --size {options.size:,}: the texts hold no more that is worth a token")
    for what, count in counts.counts.items():
        print(f"{out}: {count:,} {what.replace('_', ' ')}, the first: {counts.places[what]}")
    print(f"{out}: {tried(tokenizer, kept).said()}")
    return 0


def _check(options: argparse.Namespace) -> None:
    from jaxft.data.processors.tokenizer_training import MOST_SIZE

    if not 1 <= options.size <= MOST_SIZE:
        raise UserError(f"--size {options.size}: must lie between 1 and {MOST_SIZE}")
    if options.sentinels and options.use != "encoder-decoder":
        raise UserError("--sentinels: is for --for encoder-decoder")
    if not 0 <= options.sentinels < options.size:
        raise UserError(f"--sentinels {options.sentinels}: must be 0 or more, and below --size")
    if options.begin and options.use != "decoder":
        raise UserError("--begin: is for --for decoder; encoders' texts begin with [CLS]")
    if not 3 <= options.max_length <= 1 << 20:
        raise UserError(f"--max-length {options.max_length}: must lie between 3 and {1 << 20}")
    if not 0 < options.sample <= 1:
        raise UserError(f"--sample {options.sample}: must be above 0, and at most 1")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
