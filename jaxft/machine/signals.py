"""Being told to end: Ctrl-C, SIGTERM and SIGHUP mean the same to a program, wherever it is at work.

Python calls handlers in the main thread, and only between two of its own steps: not while a compiler or a device is at work there. So the
C handler writes each signal to a pipe, too, and a thread that reads it ends the process when the main thread does not come to it, or
when a second signal says that the first one's end takes too long. That is as safe as ``kill -9``: what is stored is sealed, or does
not count.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Protocol

STOPPED = 130
"""Exit code of a program that was told to end."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 10.0
"""How long a program that was told to end, and has nothing to store, may take."""
TOGETHER_SECONDS = 1.0
"""Signals within this time are one: a terminal that closes, and whoever passes a Ctrl-C on, send it twice."""
_AGAIN_SECONDS = 0.05
Ask = Callable[[], None]


class Leaving(Protocol):
    """Who wants to know that this process ends."""

    def __call__(self, code: int, *, at_once: bool) -> None:
        """Takes the exit code, and whether the process does not even come to the end of Python's shutdown."""
        ...


leaving: list[Leaving] = []
"""Called before this process ends: the other processes of a run."""


def say_leaving(code: int, *, at_once: bool = False) -> None:
    """Tells whoever wants to know that this process ends."""
    for one in leaving:
        one(code, at_once=at_once)


class Told(KeyboardInterrupt):
    """A signal has told the program to end; its name is the argument."""


class Program:
    """A process that is a program of its own, and what it was told. There is one at most, :func:`program`."""

    def __init__(self, name: str) -> None:
        self._name, self._first, self._ending, self._own = name, 0.0, False, 0
        self.ask: Ask | None = None
        """Called by the first signal, instead of the end: whoever asked sees to it that the program ends in order."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread: passes the first signal on; the thread that watches sees to the second."""
        if self.ask is not None:
            self.ask()
        elif self._ending:
            return
        elif _importing(frame):
            threading.Thread(target=self._again, args=(number,), daemon=True).start()
        else:
            self._ending = True
            raise Told(signal.Signals(number).name)

    def _again(self, number: int) -> None:
        """Calls the handler once more, a little later."""
        time.sleep(_AGAIN_SECONDS)
        self._own += 1
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # which wakes it, too, where it waits

    def watch(self, pipe: int) -> None:
        """In a thread: ends the process at a second signal, and where the first one does not come through."""
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if self._own:
                    self._own -= 1  # not from outside: the handler's second try
                elif number in STOPPING:
                    self._heard(signal.Signals(number).name)

    def _heard(self, name: str) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            if self.ask is None:
                self._end_after(GRACE_SECONDS, f"{name}: ended, whatever was under way")
        elif now - self._first >= TOGETHER_SECONDS:
            self.end(
                f"ended at once by a second signal ({name}); what was stored before is whole, the same command goes on"
            )

    def _end_after(self, seconds: float, line: str) -> None:
        timer = threading.Timer(seconds, self.end, (line,))
        timer.daemon = True
        timer.start()

    def end(self, line: str, code: int = STOPPED) -> NoReturn:
        """Says a line, unless it is empty, and ends the process, from any thread, with no more ado."""
        # Not print: the main thread may hold the stream.
        with suppress(OSError):
            if line:
                os.write(2, f"jaxft {self._name}: {line}\n".encode())
        say_leaving(code, at_once=True)
        os._exit(code)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: an exception while jax's native ones are set up ends in a segmentation fault."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


_program: Program | None = None


def program() -> Program | None:
    """The program that this process is; None where jaxft is part of someone else's."""
    return _program


@contextmanager
def handled(handle: Callable[[int, FrameType | None], None], wakeup: int = -1) -> Iterator[None]:
    """Has the signals that tell a program to end handled, for as long as the block lasts; in the main thread.

    A signal that is ignored stays so (``nohup``), but for SIGINT, which shells ignore for what they start in the background.

    Args:
      handle: takes the signal's number and the frame that it came in.
      wakeup: the file that each signal's number is written to as well; -1: none.
    """
    woken = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    before = {n: signal.getsignal(n) for n in STOPPING if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)


@contextmanager
def told_by_signals(name: str) -> Iterator[Program]:
    """Makes this process a program that signals end; in its main thread."""
    global _program
    _program = told = Program(name)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=told.watch, args=(reading,), name="jaxft-signals", daemon=True).start()
    try:
        with handled(told.handle, writing):
            yield told
    finally:
        os.close(writing)  # the thread comes to its end
        _program = None


def end_now(code: int) -> NoReturn:
    """Ends the process without Python's shutdown, which waits for threads that may never end, or crashes around a compiler."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    say_leaving(code, at_once=True)
    os._exit(code)
