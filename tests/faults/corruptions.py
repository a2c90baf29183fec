"""Bits flipped, blocks zeroed or swapped, files cut or gone, in every class of file that a run leaves: nothing may be silently wrong.

A damaged checkpoint may give the older step, with a warning that names what is wrong; an export or a cache may be refused. What is given
without a word must be what was stored, bit for bit.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .course import Course, sealed, state_of
from .report import Report

_BLOCK = 4096
_LOGGER = logging.getLogger("jaxft.checkpoint")


def run(course: Course, count: int, seed: int) -> Report:
    """Damages files of a finished run so many times, one at a time."""
    report, rng = Report("corruptions"), random.Random(seed)
    folder = course.folder / "damaged"
    shutil.copytree(course.folder / "whole", folder)
    of_checkpoints = _Checkpoints(folder)
    judges: dict[str, Callable[[Path, str], str | None]] = {
        "checkpoint": of_checkpoints,
        "manifest": of_checkpoints,
        "export": _Export(folder),
        "log": _log,
        "cache": _Cache(course),
    }
    newest = folder / "checkpoints" / str(sealed(folder)[-1])
    files = {
        "checkpoint": [path for path in newest.rglob("*") if path.is_file() and path.name != "jaxft.json"],
        "manifest": [newest / "jaxft.json"],
        "export": [path for path in (folder / "export").iterdir() if path.suffix != ".md"],
        "log": [folder / "log.jsonl"],
        "cache": [path for path in (course.folder / "cache").rglob("*") if path.is_file()],
    }
    for number in range(count):
        kind = ("checkpoint", "export", "checkpoint", "manifest", "cache", "log")[number % 6]
        path = rng.choice(sorted(files[kind]))
        good = path.read_bytes()
        how, bad = _damaged(good, rng)
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
        problem = judges[kind](path, how)
        path.write_bytes(good)
        report.count(
            f"{kind}: {how}", None if problem is None else f"{path.relative_to(course.folder)} {how}: {problem}"
        )
    shutil.rmtree(folder)
    return report


def _damaged(good: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """What was done, and what the file holds then (None: it is gone); never what it held before."""
    if not good:
        return ("longer", b"x") if rng.random() < 0.5 else ("gone", None)
    how = rng.choice(["flipped", "flipped", "flipped", "zeroed", "swapped", "cut", "longer", "gone"])
    raw = bytearray(good)
    if how in ("zeroed", "swapped"):
        size = max(1, min(_BLOCK, len(raw) // 4))
        first, second = (rng.randrange(len(raw) - size + 1) for _ in range(2))
        if how == "zeroed":
            raw[first : first + size] = bytes(size)
        else:
            raw[first : first + size], raw[second : second + size] = (
                raw[second : second + size],
                raw[first : first + size],
            )
    elif how == "cut":
        del raw[rng.randrange(len(raw)) :]
    elif how == "longer":
        raw += bytes(rng.randrange(256) for _ in range(rng.randint(1, 99)))
    elif how == "gone":
        return how, None
    if how == "flipped" or raw == good:
        bit = rng.randrange(8 * len(good))
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        how = "flipped"
    return how, bytes(raw)


class _Checkpoints:
    """Restores the newest step that is whole, and the damaged one by its number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._states = {step: state_of(folder, step) for step in sealed(folder)}

    def __call__(self, path: Path, how: str) -> str | None:
        from jaxft.checkpoint import Checkpoints
        from jaxft.errors import UserError
        from jaxft.trees import nested, paths_of

        newest = max(self._states)
        like = nested(dict(self._states[newest]))
        warned = _Warnings()
        with Checkpoints(self._folder / "checkpoints", keep=99) as store:
            with warned:
                restored = store.restore(like)
            try:
                asked = store.restore(like, newest)
            except UserError as error:
                asked = None
                if "\n" in str(error):
                    return f"more than one line: {error}"
        if self._differs(restored.step, paths_of(restored.state)):
            return f"step {restored.step} is not what was stored"
        if restored.step != newest and not warned.lines:
            return f"step {restored.step} was taken without a word"
        if asked is not None and self._differs(newest, paths_of(asked.state)):
            return f"step {newest}, asked for, is not what was stored"
        return None

    def _differs(self, step: int, found: dict[str, np.ndarray]) -> bool:
        stored = self._states[step]
        return set(found) != set(stored) or any(
            np.asarray(found[name]).tobytes() != stored[name].tobytes() for name in stored
        )


class _Export:
    """Loads the model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "export"
        self._wanted = self._loaded()

    def _loaded(self) -> dict[str, bytes]:
        import jax

        import jaxft

        _, params, tokenizer = jaxft.load(str(self._folder), note=lambda line: None)
        leaves = {
            jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(params)
        }
        rows = tokenizer(["animal1 word3 tool5", "word1"])
        return leaves | {f"tokens {name}": np.asarray(value).tobytes() for name, value in rows.items()}

    def __call__(self, path: Path, how: str) -> str | None:
        from jaxft.errors import UserError

        try:
            found = self._loaded()
        except UserError as error:
            return f"more than one line: {error}" if "\n" in str(error) else None
        return None if found == self._wanted else "another model was loaded without a word"


def _log(path: Path, how: str) -> str | None:
    """What a run that goes on says of its log."""
    from jaxft.reporting.records import log_said

    newest = sealed(path.parent)[-1]
    meta = json.loads((path.parent / "checkpoints" / str(newest) / "jaxft.json").read_text())["meta"]
    said = log_said(path, meta["log"], newest)
    if how == "longer":  # lines after a checkpoint are those of steps that are taken again
        return None if said is None else f"told of lines that came later: {said}"
    return None if said is not None else "changed without a word"


class _Cache:
    """Verifies a token cache of the training rows."""

    def __init__(self, course: Course) -> None:
        from jaxft.__main__ import main

        self._folder = course.folder / "cache"
        with _Quiet():
            if main(["cache", "build", *course.options, "--out", str(self._folder)]) != 0:
                raise RuntimeError("the cache could not be built")

    def __call__(self, path: Path, how: str) -> str | None:
        from jaxft.__main__ import main

        with _Quiet():
            code = main(["cache", "verify", str(path.parent)])
        return None if code in (1, 2) else f"jaxft cache verify ended with {code}"


class _Quiet:
    """Nothing of a command is printed."""

    def __enter__(self) -> None:
        import contextlib
        import io

        self._both = contextlib.ExitStack()
        self._both.enter_context(contextlib.redirect_stdout(io.StringIO()))
        self._both.enter_context(contextlib.redirect_stderr(io.StringIO()))

    def __exit__(self, *_: object) -> None:
        self._both.close()


class _Warnings(logging.Handler):
    """What the checkpoint store warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        _LOGGER.addHandler(self)
        _LOGGER.propagate = False

    def __exit__(self, *_: object) -> None:
        _LOGGER.removeHandler(self)
        _LOGGER.propagate = True
