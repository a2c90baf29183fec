"""``jaxft data build|show|verify``: texts tokenised once into a corpus, what it holds, and whether every byte is as it was written."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jaxft.config import load_config
from jaxft.data.corpus.options import Documents, Duplicates, Invalid, Options
from jaxft.errors import UserError
from jaxft.machine.platform import set_up_jax

if TYPE_CHECKING:
    from jaxft.data.corpus.batches import StreamOf
    from jaxft.data.corpus.plan import Plan
    from jaxft.data.processors.tokenizer import Tokenizer

WORDS = ("build", "show", "verify")
_ABLE = ("data.text", "data.header", "data.quotes", "data.missing_text")
_OPTIONS = (
    "tokenizer",
    "out",
    "workers",
    "part",
    "documents",
    "invalid_utf8",
    "duplicates",
    "eval_fraction",
    "part_bytes",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of ``build``."""
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="build: a model's folder, or one of jaxft tokenizer train"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="build: where to write; the same command goes on with what is there"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="build: processes (default: as many as there are cores)"
    )
    parser.add_argument(
        "--part", metavar="I/N", help="build: this machine's share (default: what a SLURM array or the like says)"
    )
    parser.add_argument(
        "--documents", choices=get_args(Documents), help="build: what is one in .txt files (default: line)"
    )
    parser.add_argument(
        "--invalid-utf8", choices=get_args(Invalid), help="build: lines that are no UTF-8 (default: refuse)"
    )
    parser.add_argument("--duplicates", choices=get_args(Duplicates), help="build: leave out copies (default: keep)")
    parser.add_argument("--eval-fraction", type=float, metavar="F", help="build: hold out documents, as OUT/eval")
    parser.add_argument(
        "--part-bytes", type=int, metavar="BYTES", help="build: of a source, to one shard (default: 64 MiB)"
    )
    parser.add_argument(
        "--baselines",
        metavar="CORPUS",
        help="show: what a unigram and a trigram of the corpus make of another one, held out: bits a token and a byte",
    )


def refuse_options(options: argparse.Namespace) -> None:
    """Raises UserError if options of ``build`` are given to something else."""
    for name in _OPTIONS:
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: is for jaxft data build")
    if options.baselines is not None and options.run_file != "show":
        raise UserError("--baselines: is for jaxft data show CORPUS")


def run(options: argparse.Namespace) -> int:
    """Builds, shows or verifies a corpus."""
    if options.run_file == "build":
        if options.baselines is not None:
            raise UserError("--baselines: is for jaxft data show CORPUS")
        return _build(options)
    refuse_options(options)
    if len(options.overrides) != 1:
        raise UserError(f"data {options.run_file}: name the folder of one corpus")
    set_up_jax(None)
    folder = Path(options.overrides[0]).expanduser()
    return _show(folder, options.rows, options.baselines) if options.run_file == "show" else _verify(folder)


def _build(options: argparse.Namespace) -> int:
    for name in ("tokenizer", "out"):
        if getattr(options, name) is None:
            raise UserError(f"data build: --{name} FOLDER is missing")
    settings = [one for one in options.overrides if one.partition("=")[0].startswith("data.") and "=" in one]
    sources = [one for one in options.overrides if one not in settings]
    if not sources:
        raise UserError('data build: name files, folders or patterns of texts, for instance "wiki/*.jsonl.gz"')
    for one in settings:
        if one.partition("=")[0] not in _ABLE:
            raise UserError(f"data build {one}: of a run's settings, {', '.join(_ABLE)} are for it")
    made = _options(options, settings)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    if not 1 <= workers <= 4096:
        raise UserError(f"--workers {workers}: must lie between 1 and 4096")
    set_up_jax(None)
    from jaxft.data.corpus.build import build
    from jaxft.data.corpus.plan import make_plan
    from jaxft.data.corpus.share import share_of
    from jaxft.data.processors.tokenizer import Tokenizer
    from jaxft.hub.source import resolve_folder

    share = share_of(options.part, os.environ)
    tokenizer = Tokenizer(resolve_folder(options.tokenizer))
    plan = make_plan(Path(options.out).expanduser(), sources, tokenizer, made)
    if build(plan, tokenizer, share, workers, _say):
        _say_done(plan)
    return 0


def _options(options: argparse.Namespace, settings: list[str]) -> Options:
    data = load_config(None, settings).data
    given = {name: value for name in _OPTIONS[4:] if (value := getattr(options, name)) is not None}
    made = Options(data.text, data.header, data.quotes, data.missing_text, **given)
    made.check()
    return made


def _say_done(plan: Plan) -> None:
    from jaxft.data.corpus.show import summary

    names = []
    for split, folder in plan.folders.items():
        for line in summary(folder):
            print(line)
        names.append(f"data.{split or 'train'}={folder}")
    print("train on it with:", *names, "data.packing=concatenated")


def _show(folder: Path, rows: int, held_out: str | None) -> int:
    from jaxft.data.corpus.baselines_text import baseline_lines
    from jaxft.data.corpus.show import samples, summary

    if held_out is not None:
        for line in (*summary(folder), *baseline_lines(folder, Path(held_out).expanduser())):
            print(line)
        return 0
    for line in (*summary(folder), *samples(folder, rows)):
        print(line)
    return 0


def show_rows(stream: StreamOf, tokenizer: Tokenizer, count: int, seed: int) -> int:
    """Prints the first rows of a run on corpora, token by token."""
    import shutil

    import numpy as np

    from jaxft.reporting.data_text import example_lines

    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for number in range(min(count, len(stream))):
        row = stream.batch(np.array([number]), seed)
        tokens = row["tokens"][0, row["mask"][0] != 0]
        kind = f"{row['segments'].max()} documents" if "segments" in row else f"label {row['labels'][0]}"
        print(f"\ntraining row {number}, {kind}:")
        print("\n".join(example_lines({"tokens": tokens}, tokenizer.pieces(tokens), {}, width)))
    return 0


def _verify(folder: Path) -> int:
    from jaxft.data.corpus.files import damages

    found = list(damages(folder))
    for line in found:
        print(line)
    if not found:
        print(f"{folder}: every byte is as it was written")
    return 1 if found else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
