"""Being told to stop: after the current step, with everything saved."""

from __future__ import annotations

import itertools
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

from jaxft.machine import signals
from jaxft.machine.processes import letters

_LOOK_SECONDS = 1.0
"""How often a process looks whether another one was told to stop."""
_ANSWER_SECONDS = 0.05
_CLOSE_SECONDS = 5.0
"""How long a process waits for the others at its end: one that was lost does not answer."""
_occasions = itertools.count()


class Stop:
    """Whether someone has asked for a stop."""

    def __init__(self) -> None:
        self.requested = False
        """Whether a process that is alone was asked to stop."""

    def ask(self) -> None:
        """Asks for a stop; may be called by a signal's handler."""
        self.requested = True

    def after(self, step: int) -> bool:
        """Whether to stop now that this step is done; the same answer in all processes."""
        return self.requested


class Together(Stop):
    """Several processes: told to one, all stop after the same step.

    A thread of each looks whether another was asked. If one was, it holds its process up between two steps, says how many it has
    done, and waits until all have: they stop after the next one of whoever has done most. That is how jax's preemption service
    does it, too, which waits for the others without letting go of Python's lock: whatever thread of this process they need never answers.

    Args:
      index, count: this process among the others.
      occasion: a name, the same in all processes, and never used again.
    """

    def __init__(self, index: int, count: int, occasion: str) -> None:
        super().__init__()
        self._index, self._count, self._occasion = index, count, occasion
        self._between = threading.Lock()
        self._done, self._last, self._ended = 0, -1, False
        self._told: queue.SimpleQueue[bool] = queue.SimpleQueue()  # safe in a signal's handler
        self._thread = threading.Thread(target=self._look, name="jaxft-stop", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Asks all processes."""
        self._told.put(True)

    def after(self, step: int) -> bool:
        """Counts calls, not steps: a run may go back."""
        with self._between:
            self._done += 1
            return self._done == self._last

    def close(self) -> None:
        """This process does no more steps: nobody waits for it."""
        self._ended = True
        self._told.put(False)
        self._thread.join(_CLOSE_SECONDS)

    def _look(self) -> None:
        while not self._asked():
            if self._ended:
                letters.say(self._key(self._index), "ended")
                return
        with self._between:
            letters.say(self._key(self._index), "ended" if self._ended else str(self._done))
            said = [self._said_by(other) for other in range(self._count)]
            if "ended" not in said:
                self._last = max(map(int, said)) + 1

    def _asked(self) -> bool:
        """Waits a little; whether this process or another was asked meanwhile."""
        try:
            asked = self._told.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            asked = False
        if asked:
            letters.say(self._key("asked"), "")
        return asked or letters.heard(self._key("asked")) is not None

    def _said_by(self, other: int) -> str:
        while (said := letters.heard(self._key(other))) is None:
            time.sleep(_ANSWER_SECONDS)
        return said

    def _key(self, which: int | str) -> str:
        return f"stop/{self._occasion}/{which}"


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the current step, of all processes; a second one ends at once."""
    with _stop() as stop:
        told = signals.program()
        if told is None:
            with _handled(stop):
                yield stop
            return
        told.ask = stop.ask
        try:
            yield stop
        finally:
            told.ask = None


@contextmanager
def _stop() -> Iterator[Stop]:
    occasion, count = str(next(_occasions)), jax.process_count()
    if count == 1:
        yield Stop()
        return
    together = Together(jax.process_index(), count, occasion)
    try:
        yield together
    finally:
        together.close()


@contextmanager
def _handled(stop: Stop) -> Iterator[None]:
    """Handlers for a run that is part of someone else's program, which a second signal must not end: it is an interrupt there."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop.ask()

    try:
        before = {n: signal.signal(n, handle) for n in signals.STOPPING if signal.getsignal(n) != signal.SIG_IGN}
    except ValueError:  # not the main thread (a notebook's worker): signals are the caller's business
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: not of Python, which cannot set it again (the preemption service of a program that started jax.distributed).
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
