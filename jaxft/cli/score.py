"""``jaxft score``: rows in, the same rows out with how probable their replies are under a model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.config import DataConfig
    from jaxft.data.processors.replies import Asked
    from jaxft.inference.scoring import Score

SUFFIXES = ("logp", "tokens")
"""What the columns that are written add to the name of a reply's column."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", help="exported folder, run folder, checkpoint or hub id of a decoder")
    parser.add_argument(
        "rows",
        help="a .csv .tsv .jsonl .parquet file: data.text names the column of replies, data.text_pair that of others, if there are two; "
        "each a text or a list of messages",
    )
    parser.add_argument(
        "out", help="JSON Lines: the rows, and <column>_logp and <column>_tokens of each column of replies"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance data.text=chosen data.text_pair=rejected"
    )
    parser.add_argument(
        "--prompt",
        help="the column of what replies answer, a text or a list of messages (default: as the model's run says; without any, two replies "
        "hold it, whatever they begin with alike, and a single text is scored whole)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="replies computed at once (default: 16)")


def run(options: argparse.Namespace) -> int:
    """Writes the rows with their scores, and says what these are on average."""
    from jaxft.config.ranges import MOST_ROWS
    from jaxft.data.sources.write import row_writer
    from jaxft.errors import UserError
    from jaxft.files import file_written_whole
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    if not 1 <= options.batch_size <= MOST_ROWS:
        raise UserError(f"--batch-size {options.batch_size}: must lie in 1..{MOST_ROWS}")
    _check_paths(options)
    set_up_jax(compile_cache.FOLDER)
    from jaxft.inference.chunks import chunks
    from jaxft.inference.predict import open_model
    from jaxft.inference.scoring import make_scorer

    served = open_model(options.model, options.overrides, _say)
    data, prompt = served.config.data, options.prompt or getattr(served.config.task, "prompt", None)
    names = (data.text,) if data.text_pair is None else (data.text, data.text_pair)
    scores, counts = make_scorer(served, options.batch_size), _Counts({name: [0.0, 0] for name in names})
    with file_written_whole(Path(options.out)) as file:
        write = row_writer(options.out, file)
        for chunk in chunks(_read(options.rows, names, prompt, data), 16 * options.batch_size):
            made = iter(scores([asked for _, several in chunk for asked in several]))
            for row, several in chunk:
                found = {name: next(made) for name in names}
                counts.add(found, several[0].where)
                write({**row, **dict(_cells(found))})
            _say(f"{counts.rows} rows are scored")
        if not counts.rows:
            raise UserError(f"{options.rows}: the data set is empty")
    print(f"wrote {options.out}: {counts.rows} rows")
    for line in counts.said(served.tokenizer.max_length):
        print(line)
    return 0


def _check_paths(options: argparse.Namespace) -> None:
    """Raises UserError before anything is computed for a file that cannot be, or must not be, written."""
    from jaxft.errors import UserError

    out = Path(options.out)
    if "=" in options.out or out.suffix not in (".jsonl", ".ndjson", ".jsonlines"):
        raise UserError(f"{options.out}: scored rows are written as JSON Lines; name a file that ends in .jsonl")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: cannot be written: {'it is a folder' if out.is_dir() else 'its folder is not there'}")
    if out.exists() and Path(options.rows).exists() and out.samefile(options.rows):
        raise UserError(f"{out}: is the file that is read; name another one")


@dataclass
class _Counts:
    sums: dict[str, list[float]]
    """By column of replies: log-probabilities and tokens."""
    rows: int = 0
    cut: int = 0
    silent: int = 0

    def add(self, found: dict[str, Score], where: str) -> None:
        """Counts the scores of a row.

        Raises:
          UserError: one is not finite.
        """
        from jaxft.errors import UserError

        self.rows += 1
        self.cut += any(one.dropped for one in found.values())
        self.silent += any(not one.tokens for one in found.values())
        for name, one in found.items():
            if not math.isfinite(one.logp):
                raise UserError(
                    f"{where}: the model gives column {name!r} no probability ({one.logp}); its weights are not usable"
                )
            self.sums[name][0] += one.logp
            self.sums[name][1] += one.tokens

    def said(self, limit: int | None) -> Iterator[str]:
        """What was found, a line for each thing."""
        for name, (logp, tokens) in self.sums.items():
            per = logp / tokens if tokens else math.nan
            yield f"{name}: {logp / self.rows:.3f} nats a reply, {per:.3f} a token, {tokens / self.rows:.1f} tokens a reply"
        if self.cut:
            yield f"{self.cut} of {self.rows} rows were truncated to {limit} tokens (data.max_length)"
        if self.silent:
            yield f"{self.silent} of {self.rows} rows have a reply of which no token is left"


def _cells(found: dict[str, Score]) -> Iterator[tuple[str, object]]:
    for name, one in found.items():
        # As many digits as float32 has.
        yield from zip((f"{name}_{suffix}" for suffix in SUFFIXES), (float(f"{one.logp:.9g}"), one.tokens), strict=True)


def _read(
    reference: str, names: tuple[str, ...], prompt: str | None, data: DataConfig
) -> Iterator[tuple[dict[str, object], list[Asked]]]:
    """Each row as it is, by column, and its prompt with each reply."""
    from jaxft.data.encode import Column
    from jaxft.data.processors.replies import Asked, shared_prompt
    from jaxft.data.row_rules import check_texts
    from jaxft.data.sources.read import column_names, form_of, iter_rows
    from jaxft.data.sources.rows import Carried

    wanted = [Column(name, "messages") for name in (*(() if prompt is None else (prompt,)), *names)]
    form = form_of(data, _say)
    present = column_names(reference, data.text, form)
    taken = [name for name in (f"{name}_{suffix}" for name in names for suffix in SUFFIXES) if name in present]
    if taken:
        _say(f"{reference}: {', '.join(taken)} {'is' if len(taken) == 1 else 'are'} there already and written anew")
    carried = [Carried(name) for name in present]
    for row in iter_rows(reference, (*(column.wanted for column in wanted), *carried), form):
        check_texts(row, wanted)
        texts = row.values[: len(wanted)]
        if prompt is not None:
            before, replies = texts[0], texts[1:]
        elif len(names) == 2:
            before, *replies = shared_prompt(texts[0], texts[1], row.where)
        else:
            before, replies = None, texts
        # Plain lines have no columns, but one text each.
        whole = dict(zip(present or names, map(_as_given, row.values[len(wanted) if present else 0 :]), strict=True))
        yield whole, [Asked(before, reply, row.where) for reply in replies]


def _as_given(value: object) -> object:
    """A value that was carried along; lists and mappings went as JSON, and JSON has no NaN."""
    from jaxft.data.sources.rows import JsonText

    if isinstance(value, JsonText):
        return json.loads(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
