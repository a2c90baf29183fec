"""Being told to stop: after the current step, with everything saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import jax

from jaxft.machine import signals


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
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the current step; a second one ends at once.

    Of several processes, jax's preemption service has SIGTERM: told to one, it finds a step that no process has passed
    yet, after which all stop. The other signals are passed on to it.
    """
    stop = Stop()

    def ask() -> None:
        stop.requested = True

    def pass_on() -> None:
        if not stop.requested:
            stop.requested = True
            os.kill(os.getpid(), signal.SIGTERM)

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        stop.agreed = multihost_utils.reached_preemption_sync_point
        ask = pass_on
    told = signals.program()
    if told is None:
        with _handled(stop, ask):
            yield stop
        return
    told.ask = ask
    try:
        yield stop
    finally:
        told.ask = None


@contextmanager
def _handled(stop: Stop, ask: Callable[[], None]) -> Iterator[None]:
    """Handlers for a run that is part of someone else's program, which a second signal must not end: it is an interrupt there."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        ask()

    # SIGTERM of several processes is jax's.
    mine = [number for number in signals.STOPPING if stop.agreed is None or number != signal.SIGTERM]
    try:
        before = {
            number: signal.signal(number, handle) for number in mine if signal.getsignal(number) != signal.SIG_IGN
        }
    except ValueError:  # not the main thread (a notebook's worker): signals are the caller's business
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
