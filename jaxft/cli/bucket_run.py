"""A run whose folder is in a bucket: held there, fetched at the start, put there with each step and at the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jaxft.cli.console import note
from jaxft.config import RunConfig
from jaxft.errors import StorageError, UserError
from jaxft.machine import buckets

Stored = Callable[[], None]


@contextmanager
def in_bucket(config: RunConfig, out: Path) -> Iterator[Stored | None]:
    """For as long as the block lasts, ``out`` is the folder of this machine for what ``train.out`` names in a bucket; gives what puts it
    there. None: ``train.out`` is a folder.

    Raises:
      UserError: another run is at work there, it cannot be used, or processes do not share ``out``.
      StorageError: the store did not answer for too long.
    """
    address = config.train.out
    if not buckets.is_address(address):
        yield None
        return
    from jaxft.checkpoint.mirror import mirrored
    from jaxft.machine import processes

    with ExitStack() as stack, _named(out, address):
        mirror = None
        _check_shared(out, address)
        with processes.raise_together():
            if processes.is_first():
                mirror = stack.enter_context(mirrored(address, out, config.checkpoint.keep, note))
        stored = _nothing if mirror is None else mirror.sync
        try:
            yield stored
        except StorageError:
            raise
        except UserError:
            # What the log says of the end is worth having there, if the store takes it and a run had begun.
            if any(out.rglob("log.jsonl")):
                with _said():
                    stored()
            raise
        with processes.raise_together():
            stored()
            note(f"{address} holds all of it")


def _nothing() -> None:
    """Other processes than the first put nothing."""


def _check_shared(out: Path, address: str) -> None:
    """Refuses processes that do not see each other's files: parts of a state would be missing in what is put."""
    import jax

    from jaxft.machine import processes

    if jax.process_count() == 1:
        return
    met = out / f".met-{processes.first_says(random.getrandbits(30))}"
    if processes.is_first():
        met.touch()
    processes.barrier("bucket")
    with processes.raise_together():
        if not met.exists():
            raise UserError(
                f"train.out={address}: this process does not see {out} of process 0; processes on several hosts need a JAXFT_CACHE "
                "on a file system that all share"
            )
    if processes.is_first():
        met.unlink()


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
