"""Long work of compilers in threads, which a Ctrl-C does not have to wait for."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

K = TypeVar("K")
T = TypeVar("T")
_NAME = "jaxft-worker"
_LOOK_SECONDS = 0.1
"""How often one who waits looks whether to give up."""


class Ahead(Generic[K, T]):
    """Results of long work that threads begin in a given order, each to be had as soon as it is there.

    Unlike those of ``concurrent.futures``, which a program waits for at its end, whatever happens, these threads are left
    behind: an interrupt leaves at once, and :func:`still_working` says what is still going on. A program of someone else's that ends
    in the usual way waits for what has been begun: a compiler does not survive the end of the interpreter around it.

    Args:
      function: what makes a result.
      names: what it is called with, in the order in which the results will be needed.
      count: threads.
      first_alone: whether the others begin only when the first result is there, which then comes sooner where cores are few.
    """

    def __init__(
        self, function: Callable[[K], T], names: Sequence[K], count: int, *, first_alone: bool = False
    ) -> None:
        self._function, self._count = function, len(names)
        self._todo = list(names)
        self._results: dict[K, T] = {}
        self._dropped: list[K] = []
        self._error: BaseException | None = None
        self._told = 0
        self._changed = threading.Condition()
        threads = min(count, len(names))
        self._later = threads - 1 if first_alone else 0
        _open.add(self)
        self._start(threads - self._later)

    def __len__(self) -> int:
        """The number of results that there will be."""
        return self._count

    def ready(self, name: K) -> bool:
        """Whether a result is there."""
        return name in self._results

    def wait(self, name: K, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Waits for a result, which is begun next if it has not been; False if ``given_up`` has said so meanwhile.

        Raises:
          Exception: the first that the work on any result has raised.
        """
        with self._changed:
            if name in self._todo:
                self._todo.remove(name)
                self._todo.insert(0, name)
            while name not in self._results:
                if name in self._dropped:
                    raise ValueError(f"{name} was never begun: stop() came before")
                if self._error is not None:
                    raise self._error
                if given_up():
                    return False
                self._changed.wait(_LOOK_SECONDS)
            return True

    def result(self, name: K) -> T:
        """A result, as soon as it is there. Raises as :meth:`wait` does."""
        self.wait(name)
        return self._results[name]

    def news(self) -> list[tuple[K, T]]:
        """Names and results that have come since the last call. Raises as :meth:`wait` does."""
        with self._changed:
            if self._error is not None:
                raise self._error
            found = list(self._results.items())[self._told :]
            self._told += len(found)
            return found

    def stop(self) -> None:
        """Begins nothing more; what has been begun goes on in its thread."""
        with self._changed:
            self._dropped += self._todo
            self._todo.clear()

    def _start(self, count: int) -> None:
        for _ in range(count):
            threading.Thread(target=self._work, name=_NAME, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._todo or self._error is not None:
                    return
                name = self._todo.pop(0)
            try:
                result = self._function(name)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                self._results[name] = result
                self._changed.notify_all()
                later, self._later = self._later, 0
            self._start(later)


class _Stopped(Protocol):
    def stop(self) -> None: ...


_open: weakref.WeakSet[_Stopped] = weakref.WeakSet()


@atexit.register
def _wait_for_begun() -> None:
    for one in list(_open):
        one.stop()
    for thread in threading.enumerate():
        if thread.name == _NAME:
            thread.join()


def still_working() -> bool:
    """Whether such a thread is at work. Nothing can stop a compiler, and it does not survive an interpreter that shuts down
    around it: such a process is best ended at once (``os._exit``)."""
    return any(thread.name == _NAME for thread in threading.enumerate())
