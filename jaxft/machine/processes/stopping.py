"""Being told to stop: after the current step, with everything saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import jax


@dataclass
class Stop:
    """Whether someone has asked for a stop."""

    requested: bool = False
    agreed: Callable[[int], bool] | None = None
    """Whether all processes stop after a step; None: this process is alone."""

    def after(self, step: int) -> bool:
        """Whether to stop now that this step is done; the same answer in all processes."""
        return self.requested if self.agreed is None else self.agreed(step)


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C ask for a stop after the current step; a second Ctrl-C stops at once.

    Of several processes, jax's preemption service has SIGTERM: told to one, it finds a step that no process has passed
    yet, after which all stop. Ctrl-C, which a terminal sends to all, is for the launcher to pass on as SIGTERM.
    """
    stop = Stop()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        stop.agreed = multihost_utils.reached_preemption_sync_point
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook's worker): signals are the caller's business
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
