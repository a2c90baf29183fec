"""``jaxft mine``: pairs of texts in, the same pairs with hard negatives out, found by a trained embedding model."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.config import DataConfig
    from jaxft.inference.mining import Mined, Pairs

COLUMN = "negatives"
"""The column of the negatives that are written."""
SCORES = ("score", "negative_scores")
"""The columns of cosines: of the pair, and of its negatives."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", help="a trained embedding model: exported folder, run folder, checkpoint or hub id")
    parser.add_argument(
        "pairs", help="rows of an anchor and its partner: data.text and data.text_pair name the columns"
    )
    parser.add_argument("out", help="JSON Lines: the pairs, and a list of negatives for each")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance data.text=query data.text_pair=passage"
    )
    parser.add_argument("--corpus", help="further texts that negatives may be taken from (default: all partners alone)")
    parser.add_argument("--corpus-column", help="its column of texts (default: data.text_pair)")
    parser.add_argument("--negatives", type=int, default=3, help="how many for each pair (default: 3)")
    parser.add_argument("--from-rank", type=int, default=1, help="the nearest candidate to take (default: 1)")
    parser.add_argument("--to-rank", type=int, help="the farthest one (default: as far as --sampling top needs)")
    parser.add_argument("--max-score", type=float, help="the highest cosine of a negative")
    parser.add_argument("--margin", type=float, help="how far it is at least below the cosine of the partner")
    parser.add_argument("--relative-margin", type=float, help="the same as a share of that cosine, for instance 0.05")
    parser.add_argument(
        "--sampling", choices=["top", "random"], default="top", help="the nearest of the range (default), or any of it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --sampling random (default: 0)")
    parser.add_argument(
        "--fewer", choices=["drop", "keep"], default="drop",
        help="pairs with fewer negatives than asked for: left out (default), or written with those that there are",
    )  # fmt: skip
    parser.add_argument("--scores", action="store_true", help="write cosines too: score and negative_scores")
    parser.add_argument("--batch-size", type=int, default=64, help="texts computed at once (default: 64)")


def run(options: argparse.Namespace) -> int:
    """Writes the pairs with their negatives, and says how near these are."""
    from jaxft.config.ranges import MOST_ROWS
    from jaxft.errors import UserError
    from jaxft.inference.mining import Mining
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    names = [field.name for field in dataclasses.fields(Mining)]
    wanted = Mining(**{name: getattr(options, name) for name in names})
    _check_paths(options)
    if options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if options.batch_size > MOST_ROWS:
        raise UserError(f"--batch-size {options.batch_size}: must be at most {MOST_ROWS}")
    set_up_jax(compile_cache.FOLDER)
    from jaxft.inference.mining import embedding_config, mine, numbered, pair_vectors
    from jaxft.inference.predict import open_model

    served = open_model(options.model, options.overrides, _say)
    names = _names(served.config.data)
    data = embedding_config(served).data
    corpus = None
    if options.corpus is not None:
        corpus = (text for (text,) in _read(options.corpus, (options.corpus_column or names[1],), data))
    pairs = numbered(_read(options.pairs, names, data), corpus)
    _say(
        f"{len(pairs.pairs)} pairs, {len(pairs.anchors)} different anchors, {pairs.among} different texts to choose negatives from"
    )
    vectors = pair_vectors(served, pairs.anchors, pairs.texts, options.batch_size, _say)
    mined = mine(*vectors, pairs.pairs, pairs.itself, wanted, pairs.among)
    written = _write(options, names, pairs, mined)
    for line in _said(options, pairs, mined, written):
        print(line)
    print(
        f"train on them with: data.train={options.out} data.text={names[0]} data.text_pair={names[1]} "
        f"task.negatives=[{COLUMN}] task.negatives_per_row={options.negatives}"
    )
    return 0


def _check_paths(options: argparse.Namespace) -> None:
    """Raises UserError before anything is computed for a file that cannot be, or must not be, written."""
    from jaxft.errors import UserError

    out = Path(options.out)
    if "=" in options.out or out.suffix not in (".jsonl", ".ndjson", ".jsonlines"):
        raise UserError(f"{options.out}: negatives are written as JSON Lines; name a file that ends in .jsonl")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: cannot be written: {'it is a folder' if out.is_dir() else 'its folder is not there'}")
    for name in (options.pairs, options.corpus):
        if name is not None and Path(name).exists() and out.exists() and out.samefile(name):
            raise UserError(f"{out}: is one of the files that are read; name another one")
    if options.corpus is None and options.corpus_column is not None:
        raise UserError(f"--corpus-column {options.corpus_column}: there is no --corpus; leave it out")


def _names(data: DataConfig) -> tuple[str, str]:
    """The columns of anchors and their partners."""
    from jaxft.errors import UserError

    if data.text_pair is None:
        raise UserError(
            "mine reads texts that belong together: name the columns, for instance data.text=query data.text_pair=passage"
        )
    names = (data.text, data.text_pair)
    taken = [name for name in names if name in (COLUMN, *SCORES)]
    if taken or names[0] == names[1]:
        what = f"{taken[0]!r} is the name of a column that is written" if taken else "they are the same column"
        raise UserError(f"data.text={names[0]} data.text_pair={names[1]}: {what}; rename it in the data")
    return names


def _read(reference: str, names: tuple[str, ...], data: DataConfig) -> Iterator[tuple[str, ...]]:
    """The texts of rows, as the rules of ``data`` leave them.

    Raises:
      UserError: one of them is blank.
    """
    from jaxft.data.encode import Column, checked_rows
    from jaxft.errors import UserError

    columns = [Column(name, "text") for name in names]
    for row in checked_rows(reference, data, columns, _say):
        for value, name in zip(row.values, names, strict=True):
            if not str(value).strip():
                raise UserError(
                    f"{row.where}: column {name!r} holds an empty text; remove the row, or leave such rows out with "
                    "data.missing_text=skip"
                )
        yield tuple(map(str, row.values))


def _write(options: argparse.Namespace, names: tuple[str, str], pairs: Pairs, mined: Mined) -> int:
    """Writes the pairs that have negatives enough; returns how many these are."""
    from jaxft.data.sources.write import row_writer
    from jaxft.files import file_written_whole

    written, counts = 0, mined.counts
    with file_written_whole(Path(options.out)) as file:
        write = row_writer(options.out, file)
        for (anchor, _), texts, score in zip(pairs.pairs, pairs.spelt, mined.partners.tolist(), strict=True):
            found = counts[anchor]
            if found < options.negatives and options.fewer == "drop":
                continue
            row: dict[str, object] = dict(zip(names, texts, strict=True))
            row[COLUMN] = [pairs.texts[i] for i in mined.chosen[anchor, :found]]
            if options.scores:
                near = [round(score, 6) for score in mined.scores[anchor, :found].tolist()]
                row |= dict(zip(SCORES, (round(score, 6), near), strict=True))
            write(row)
            written += 1
    return written


def _said(options: argparse.Namespace, pairs: Pairs, mined: Mined, written: int) -> Iterator[str]:
    """What came of it, a line for each thing."""
    from jaxft.inference.mining import spread_of

    yield f"wrote {options.out}: {written} of {len(pairs.pairs)} pairs"
    counts = mined.counts
    if short := int((counts < options.negatives).sum()):
        none, of_pairs = int((counts == 0).sum()), int((counts[pairs.pairs[:, 0]] < options.negatives).sum())
        done = "left out" if options.fewer == "drop" else "written with those that there are"
        yield (
            f"{short} of {len(counts)} anchors have fewer than {options.negatives} negatives ({none} have none): their {of_pairs} "
            f"pairs are {done} (--fewer)"
        )
    yield f"cosines of partners: {spread_of(mined.partners)}"
    yield f"cosines of negatives: {spread_of(mined.scores)}"
    near = mined.scores[pairs.pairs[:, 0]]
    if there := int((mined.chosen[pairs.pairs[:, 0]] >= 0).sum()):
        share = int((near >= mined.partners[:, None]).sum()) / there
        yield (
            f"{share:.1%} of the negatives are at least as near as the partner: many of these may be right as well "
            "(--margin, --relative-margin, --from-rank)"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
