"""Rows as they come, many at a time, without waiting for those that do not come yet."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to ``size`` items, in order; a slow producer (a pipe, a person) is not waited for: what is there is given."""
    todo: queue.Queue[T | _End] = queue.Queue(maxsize=4 * size)

    def produce() -> None:
        try:
            for item in items:
                todo.put(item)
            todo.put(_End())
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            todo.put(_End(error))

    threading.Thread(target=produce, daemon=True).start()
    while True:
        chunk: list[T] = []
        item = todo.get()
        while not isinstance(item, _End):
            chunk.append(item)
            if len(chunk) == size:
                break
            try:
                item = todo.get_nowait()
            except queue.Empty:
                break
        if chunk:
            yield chunk
        if isinstance(item, _End):
            if item.error is not None:
                raise item.error
            return


@dataclass(frozen=True)
class _End:
    """What follows the last item: nothing, or why there is no other one."""

    error: BaseException | None = None
