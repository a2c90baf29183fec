"""A run whose folder is in a bucket: held there, fetched at the start, put there with each step and at the end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.cli.console import note
from jaxft.config import RunConfig
from jaxft.errors import StorageError, UserError
from jaxft.machine import buckets

if TYPE_CHECKING:  # they import jax, whose import takes seconds
    from jaxft.checkpoint.apart import RunBucket
    from jaxft.checkpoint.mirror import Mirror


@contextmanager
def in_bucket(config: RunConfig, out: Path) -> Iterator[RunBucket | None]:
    """For as long as the block lasts, ``out`` is the folder of this machine for what ``train.out`` names in a bucket; gives what puts it
    there. None: ``train.out`` is a folder.

    Raises:
      UserError: another run is at work there, or it cannot be used.
      StorageError: the store did not answer for too long.
    """
    address = config.train.out
    if not buckets.is_address(address):
        yield None
        return
    from jaxft.checkpoint.mirror import followed, mirrored
    from jaxft.machine import processes

    with ExitStack() as stack, _named(out, address):
        mirror, keep, apart = None, config.checkpoint.keep, not _is_shared(out)
        with processes.raise_together():
            if processes.is_first():
                mirror = stack.enter_context(mirrored(address, out, keep, note, apart=apart))
        if apart:
            note("each process has a folder of its own, and puts its part of each step into the bucket")
            with processes.raise_together():
                mirror = followed(address, out, keep) if mirror is None else mirror
        bucket = _bucket_of(mirror, apart)
        try:
            yield bucket
        except StorageError:
            raise
        except UserError:
            # What the log says of the end is worth having there, if the store takes it and a run had begun.
            if any(out.rglob("log.jsonl")):
                with _said():
                    bucket.sync()
            raise
        with processes.raise_together():
            bucket.sync()
            note(f"{address} holds all of it")


def _bucket_of(mirror: Mirror | None, apart: bool) -> RunBucket:
    from jaxft.checkpoint.apart import RunBucket
    from jaxft.machine import processes

    def sync() -> None:
        if mirror is not None and processes.is_first():
            mirror.sync()

    def share(folder: Path) -> None:
        if mirror is None or not apart:
            return
        with processes.raise_together():
            sync()
        with processes.raise_together():
            if not processes.is_first():
                mirror.fetch_folder(folder)

    return RunBucket(sync, mirror if apart else None, share)


def _is_shared(out: Path) -> bool:
    """Whether all processes see the folder of process 0."""
    import jax

    from jaxft.machine import processes

    if jax.process_count() == 1:
        return True
    met = out / f".met-{processes.first_says(random.getrandbits(30))}"
    if processes.is_first():
        met.touch()
    processes.barrier("bucket")
    shared = not processes.anyone(not met.exists())
    if processes.is_first():
        met.unlink()
    return shared


@contextmanager
def _named(out: Path, address: str) -> Iterator[None]:
    """Errors of the block name what the user named."""
    try:
        yield
    except UserError as error:
        error.args = (str(error).replace(str(out), address),)
        raise


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        note(f"warning: {error}")
