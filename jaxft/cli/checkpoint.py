"""``jaxft checkpoint``: what a run has stored, looked at, checked, exported and thinned out; all but ``export`` without jax."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.errors import LONGEST_LINE, UserError, listed, one_line, printable

if TYPE_CHECKING:
    from jaxft.checkpoint import Manifest

_WHAT = ("list", "inspect", "verify", "export", "prune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", choices=_WHAT, help="what to do")
    parser.add_argument("folder", help="a run's folder, or its checkpoints folder; s3:// and gs:// too")
    parser.add_argument("step", nargs="?", help="inspect, export: the step; verify: only this one")
    parser.add_argument("out", nargs="?", help="export: Hugging Face folder to write; must not exist, or be empty")
    parser.add_argument("--keep", type=int, metavar="K", help="prune: the last K steps stay")
    parser.add_argument("--keep-every", type=int, metavar="N", help="prune: steps that are multiples of N stay")
    parser.add_argument("--dry-run", action="store_true", help="prune: say what would go, delete nothing")
    parser.epilog = "exit code: 0, 1 something is damaged (verify), 2 something to correct"


def run(options: argparse.Namespace) -> int:
    """Does one of them; 1 if ``verify`` finds damage."""
    from jaxft.checkpoint.bucket import steps_seen
    from jaxft.machine import buckets

    _check_usage(options)
    if options.what == "prune" and buckets.is_address(options.folder):
        raise UserError(
            f"prune {options.folder}: works on folders; in a bucket a run thins out its own steps (checkpoint.keep)"
        )
    with steps_seen(options.folder, whole=options.what in ("verify", "export")) as folder:
        return _do(folder, options)


def _do(folder: Path, options: argparse.Namespace) -> int:
    from jaxft.checkpoint.folders import step_folders

    inside = folder / "checkpoints"
    folder = inside if inside.is_dir() else folder
    found = step_folders(folder)
    if not found:
        raise UserError(f"{options.folder}: no steps are stored here; name a run's folder")
    step = None if options.step is None else _step_of(options.step, found, folder)
    if options.what == "list":
        return _list(folder, found)
    if options.what == "inspect" and step is not None:
        return _inspect(found[step])
    if options.what == "export" and step is not None:
        return _export(found[step], options.out)
    if options.what == "prune":
        return _prune(folder, options)
    return _verify(found if step is None else {step: found[step]})


def _check_usage(options: argparse.Namespace) -> None:
    wanted = {"inspect": ("step",), "export": ("step", "out"), "prune": ("keep",)}.get(options.what, ())
    able = {"verify": ("step",), "prune": ("keep", "keep_every", "dry_run")}.get(options.what, wanted)
    for name in ("step", "out", "keep", "keep_every", "dry_run"):
        given = getattr(options, name) not in (None, False)
        shown = name.upper() if name in ("step", "out") else f"--{name.replace('_', '-')}"
        if given and name not in able:
            raise UserError(f"{options.what} takes no {shown}")
        if not given and name in wanted:
            raise UserError(f"{options.what}: {shown} is missing")
    for name in ("keep", "keep_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def _step_of(text: str, found: dict[int, Path], folder: Path) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) not in found:
        raise UserError(f"{folder}: there is no step {text}; there are: {listed(map(str, sorted(found)))}")
    return int(text)


_LONGEST_REASON = LONGEST_LINE - 60
"""Characters of what is wrong with a step, beside its number, time and size."""


def _list(folder: Path, found: dict[int, Path]) -> int:
    """A line per step; sizes are compared, nothing is hashed."""
    from jaxft.checkpoint.folders import read_all, set_aside

    # Each was the best when it was saved; the newest of them is.
    best = max((step for step, manifest in read_all(folder)[0].items() if manifest.best), default=None)
    for step, path in sorted(found.items()):
        problem = _state_of(path, hashes=False)[1]
        when = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        mark = "best" if step == best else ""
        print(f"{step:>9}  {when}  {_size(path) / 1e6:>12,.1f} MB  {mark:<4}  {problem or 'sizes as written'}")
    for path in set_aside(folder):
        print(f"{path.name}: {_size(path) / 1e6:,.1f} MB, set aside because it could not be used")
    return 0


def _state_of(path: Path, *, hashes: bool) -> tuple[Manifest | None, str | None]:
    """The manifest, if it can be read, and what is wrong with the step, if anything is."""
    from jaxft.checkpoint.manifest import DamagedCheckpoint, check_files, read_manifest

    manifest = None
    try:
        manifest = read_manifest(path)
        check_files(path, manifest, hashes=hashes)
    except DamagedCheckpoint as error:
        return manifest, one_line(f"damaged: {error.reason}", _LONGEST_REASON)
    return manifest, None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _inspect(path: Path) -> int:
    from jaxft.checkpoint.manifest import read_manifest
    from jaxft.config import to_yaml_line

    manifest = read_manifest(path)
    for name, leaf in manifest.tree.items():
        print(f"{printable(name)}  {leaf}")
    meta = dict(manifest.meta)
    config = meta.pop("config", {})
    for name, value in {"best": manifest.best, "format": manifest.format, **meta}.items():
        print(f"{printable(name)}: {json.dumps(value, ensure_ascii=False)}")
    sections = config if isinstance(config, dict) else {}
    for section, keys in sections.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            print(f"{printable(section)}.{printable(key)}={to_yaml_line(value)}")
    return 0


def _verify(found: dict[int, Path]) -> int:
    damaged = 0
    for step, path in sorted(found.items()):
        manifest, problem = _state_of(path, hashes=True)
        damaged += problem is not None
        files = 0 if manifest is None else len(manifest.files)
        print(f"step {step}: {problem or f'every byte of {files} files is as it was written'}")
    return 1 if damaged else 0


def _export(path: Path, out: str) -> int:
    from jaxft.cli import convert

    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(path), out]))


def _prune(folder: Path, options: argparse.Namespace) -> int:
    """Deletes steps that are neither asked for, nor the best, nor the newest that is whole."""
    from jaxft.checkpoint.folders import forget, kept_steps, read_all

    manifests, unreadable = read_all(folder)
    stay = kept_steps(manifests, options.keep, options.keep_every)
    whole = next(
        (s for s in sorted(manifests, reverse=True) if _state_of(folder / str(s), hashes=True)[1] is None), None
    )
    if whole is None:
        raise UserError(
            f"{folder}: none of the steps is whole; nothing was deleted (jaxft checkpoint verify says more)"
        )
    for step in sorted(unreadable):
        print(f"step {step} stays: it cannot be used, and may hold data: {unreadable[step]}")
    for step in sorted(manifests.keys() - stay - {whole}):
        size = _size(folder / str(step)) / 1e6
        if not options.dry_run:
            forget(folder, step)
        print(f"{'would delete' if options.dry_run else 'deleted'} step {step} ({size:,.1f} MB)")
    return 0
