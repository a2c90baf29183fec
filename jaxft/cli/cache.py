"""``jaxft cache``: a run's rows, encoded once into files that ``data.train`` and ``data.eval`` may name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxft.cli.show_config import split_run_file
from jaxft.config import load_config
from jaxft.errors import UserError
from jaxft.machine.platform import set_up_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", choices=["build", "verify"], help="write caches; or check one's content")
    parser.add_argument(
        "run_file", nargs="?", help="build: YAML run file, as for jaxft train; verify: the cache's folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="build: for instance data.train=my.csv")
    parser.epilog = "exit code: 0, 1 a cache is damaged (verify names the bytes), 2 something to correct"
    parser.add_argument("--out", metavar="FOLDER", help="build: where train/ and eval/ are written")


def run(options: argparse.Namespace) -> int:
    """Builds the caches of a run, or checks one; 1 if it is damaged."""
    if options.what == "verify":
        return _verify(options)
    if options.out is None:
        raise UserError("cache build: --out FOLDER says where to write")
    config = load_config(*split_run_file(options.run_file, options.overrides))
    set_up_jax(None)
    from jaxft.data.sources.read import shown
    from jaxft.tasks import scores_rows, task
    from jaxft.training.caching import build_caches

    folders = build_caches(config, Path(options.out).expanduser(), _say)
    named = {folder.name: str(folder) for folder in folders}
    if scores_rows(task(config.task.name).Task):  # such scores compare texts
        named |= {name: shown(getattr(config.data, name)) for name in named if name != "train"}
    if config.data.test_fraction is not None:
        named["test_fraction"] = "null"
    print("train on them with:", *(f"data.{name}={value}" for name, value in named.items()))
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.run_file is None or options.overrides or options.out is not None:
        raise UserError("cache verify: name the folder of one cache, for instance: jaxft cache verify caches/train")
    set_up_jax(None)
    from jaxft.data.cache_files import damages, read_manifest
    from jaxft.training.caching import sources_said

    folder = Path(options.run_file).expanduser()
    found = list(damages(folder))
    for line in (*found, *sources_said(folder, read_manifest(folder)["about"])):
        print(line)
    if not found:
        print(f"{folder}: every byte is as it was written")
    return 1 if found else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
