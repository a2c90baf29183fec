"""What a command says on the console, and that nothing there (encoding, a reader that goes away) ends its work."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, TextIO, cast

from jaxft.config import RunConfig, flat, to_tree, to_yaml_line
from jaxft.errors import one_line, redacted
from jaxft.machine import streams

if TYPE_CHECKING:
    from jaxft.training.setup import Setup

WIDTH = 100
"""Columns that the lines of a run keep to."""

THRESHOLD_HELP = (
    "of two labels: the second where its probability is at least this (default: the likelier); of several for a text: those from it on; "
    "best: the thresholds that jaxft train tuned on its validation rows and stored with the model"
)


def threshold(text: str) -> float | str:
    """What ``--threshold`` is given: a number, or ``best``."""
    try:
        return text if text == "best" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'best'") from error


def show_anything() -> None:
    """Lets standard output and standard error escape what their encoding lacks; otherwise a label could end a run."""
    for stream in (sys.stdout, sys.stderr):
        # Not where someone has chosen another way already; UTF-8 lacks lone surrogates, of odd file names.
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Lasting:
    """A text stream that outlives what it writes to: the first failure is told, and what follows is dropped."""

    def __init__(self, stream: TextIO, tell: Callable[[OSError], None]) -> None:
        self._stream, self._tell, self._lost = stream, tell, False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        if self._lost:
            return
        try:
            action(*arguments)
        except OSError as error:
            self._lost = True
            drop_output(self._stream)
            self._tell(error)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def drop_output(stream: TextIO) -> None:
    """Sends what a stream still holds, and all that follows, nowhere: Python would try once more at exit, and complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def lasting_output(command: str, then: str) -> Iterator[None]:
    """Standard output and standard error that may be lost (``| head``, a full disk) without ending the block.

    Args:
      then: what is said on standard error, once, after the reason.
    """
    errors = _Lasting(sys.stderr, lambda error: None)  # nowhere is left to tell it

    def tell(error: OSError) -> None:
        errors.write(f"jaxft {command}: standard output: {error.strerror}; {then}\n")
        errors.flush()

    if "stdout" in streams.closed:
        errors.write(f"jaxft {command}: standard output is closed; {then}\n")
        errors.flush()
    output = _Lasting(sys.stdout, tell)
    with redirect_stdout(cast(TextIO, output)), redirect_stderr(cast(TextIO, errors)):
        yield


@contextmanager
def no_interrupt() -> Iterator[None]:
    """Lets a second Ctrl-C pass while the first one is being cleaned up after."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread: no signal arrives here
        yield
        return
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)


def first_in_environment() -> bool:
    """Whether launchers count this process as the first; for what is said before jax is there to ask."""
    variables = ("JAX_PROCESS_ID", "SLURM_PROCID", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID")
    return all(os.environ.get(name, "0") == "0" for name in variables)


def note(text: str) -> None:
    """A line on standard output, of the first process alone, without secrets."""
    from jaxft.machine.processes import is_first

    if is_first():
        print(redacted(text), flush=True)


def settings_lines(config: RunConfig) -> list[str]:
    """How a configuration differs from the defaults, as ``key=value``; long values are cut."""
    usual, tree = flat(to_tree(RunConfig())), flat(to_tree(config))
    changed = [f"  {key}={to_yaml_line(value)}" for key, value in tree.items() if usual.get(key, usual) != value]
    differ = f"{len(changed)} settings differ from the defaults" if changed else "the defaults"
    head = f"config: {differ}; all are in {config.train.out}/config.yaml"
    return [one_line(head), *(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in changed)]


def model_lines(setup: Setup) -> list[str]:
    """The network, what of it trains, and the devices that it lies on."""
    stacks = setup.model.facts.stacks
    sizes = [part for s in stacks for part in (f"{s.layers} layers", f"width {s.width}", f"{s.heads} heads")]
    head = [] if setup.model.head is None else [f"head {setup.model.head}"]
    rank = setup.config.model.lora.rank
    adapters = [] if rank is None else [f"adapters of rank {rank}"]
    trained, total = parameters_of(setup)
    mesh = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items() if size > 1)
    kind = setup.mesh.devices.flat[0].device_kind
    return [
        f"model: {', '.join([setup.family_name, *sizes, *head, *adapters])}",
        f"parameters: {trained:,} of {total:,} train" if trained < total else f"parameters: {total:,}, all train",
        f"mesh: {mesh} on {setup.mesh.size} devices ({kind})" if mesh else f"mesh: one device ({kind})",
    ]


def parameters_of(setup: Setup) -> tuple[int, int]:
    """(those that train, all)."""
    import jax
    import numpy as np

    from jaxft.training.optim import frozen_mask

    patterns = setup.config.optim.freeze
    # Of a stack that optim.freeze freezes in part, a flag per layer; adapters freeze whole parameters only.
    masks = frozen_mask(setup.shapes, setup.axes, patterns) if patterns else setup.frozen
    sizes = [leaf.size for leaf in jax.tree.leaves(setup.shapes)]
    trained = sum(size * (1 - float(np.mean(mask))) for size, mask in zip(sizes, jax.tree.leaves(masks), strict=True))
    return round(trained), sum(sizes)
