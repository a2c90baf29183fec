"""Long work of compilers in threads, which a Ctrl-C does not have to wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
_NAME = "jaxft-worker"


def as_completed(function: Callable[[Any], T], items: Sequence[Any], count: int) -> Iterator[tuple[int, T]]:
    """(index, result) of ``function`` on each item, in the order in which they are done.

    Unlike ``concurrent.futures``, whose threads a program waits for at its end, whatever happens: an interrupt leaves at
    once, and :func:`still_working` says what it leaves behind.

    Args:
      count: threads.

    Raises:
      Exception: the first that ``function`` raises, once the other threads are done with the items they had begun.
    """
    todo: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    for entry in enumerate(items):
        todo.put(entry)

    def work() -> None:
        while (entry := _taken(todo)) is not None:
            index, item = entry
            try:
                done.put((index, function(item), None))
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the result
                done.put((index, None, error))

    threads = [threading.Thread(target=work, name=_NAME, daemon=True) for _ in range(min(count, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            index, result, error = done.get()
            if error is not None:
                _empty(todo)
                for thread in threads:
                    thread.join()
                raise error
            yield index, result
    finally:
        _empty(todo)


def still_working() -> bool:
    """Whether such a thread is at work. Nothing can stop a compiler, and it does not survive an interpreter that shuts down
    around it: such a process is best ended at once (``os._exit``)."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def _taken(todo: queue.SimpleQueue[tuple[int, Any]]) -> tuple[int, Any] | None:
    try:
        return todo.get_nowait()
    except queue.Empty:
        return None


def _empty(todo: queue.SimpleQueue[tuple[int, Any]]) -> None:
    while _taken(todo) is not None:
        continue
