"""A run that takes no step any more is ended, with what each of its threads was doing in a file."""

from __future__ import annotations

import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from jaxft.errors import HUNG
from jaxft.machine import processes, signals
from jaxft.reporting.sinks import Clock

NAME = "hang.txt"
_TIMES = 20
"""A step is waited for at least so many times the median of those before."""
_FOR_OTHERS = 5.0
"""Seconds more that are given to a process that others wait for."""
_KEPT = 101
"""Steps that the median is of."""


@contextmanager
def watched(clock: Clock, seconds: float | None, out: Path) -> Iterator[None]:
    """Ends the process if no step is done for too long, once the first one is; what pauses the clock does not count.

    Where jaxft is part of someone else's program, it is told and not ended.

    Args:
      clock: what steps and pauses are told to.
      seconds: a step is waited for so long, or twenty times the median step if that is longer; None: for ever.
      out: where ``hang.txt`` goes.
    """
    if seconds is None:
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_watch, args=(clock, seconds, out, ended), name="jaxft-watchdog", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(clock: Clock, seconds: float, out: Path, ended: threading.Event) -> None:
    look = min(1.0, seconds / 10)
    taken: deque[float] = deque(maxlen=_KEPT)
    seen, idle, last = clock.steps, 0.0, time.monotonic()
    while not ended.wait(look):
        now = time.monotonic()
        # Of a process that was itself stopped (Ctrl-Z, a debugger), only the moment before and after counts.
        idle, last = idle + min(now - last, 2 * look), now
        if clock.steps != seen:
            if seen:  # before the first one, more than a step was waited for
                taken.append(idle / (clock.steps - seen))
            seen, idle = clock.steps, 0.0
        elif clock.resting:
            idle = 0.0
        limit = max(seconds, _TIMES * statistics.median(taken)) if taken else seconds
        if processes.behind() is not None:
            limit += _FOR_OTHERS  # it is to say itself what it is doing
        if clock.steps and idle > limit:
            _tell(out, clock.steps, idle)
            return


def _tell(out: Path, steps: int, idle: float) -> None:
    index = jax.process_index()
    path = out / (NAME if index == 0 else f"hang-{index}.txt")
    who = processes.behind()
    line = f"no step for {idle:.0f} s, after {steps} here{f'; {who}' if who else ''}"
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}: {line}; all threads, that of the steps last:\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        where = f"what each thread was doing is in {path}"
    except OSError as error:
        where = f"{path} cannot be written: {error.strerror}"
    text = f"{line} (train.watchdog): {where}; the same command goes on from the last checkpoint"
    program = signals.program()
    if program is not None:
        program.end(text, HUNG)
    print(f"warning: {text}", file=sys.stderr, flush=True)
