"""Grouping of a stream: never waits for more than there is, never loses or reorders anything."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from jaxft.inference.chunks import chunks


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_chunks_keep_all_items_in_order(count: int) -> None:
    got = list(chunks(range(count), 8))
    assert [item for chunk in got for item in chunk] == list(range(count))
    assert all(1 <= len(chunk) <= 8 for chunk in got)


def test_a_slow_producer_is_not_waited_for() -> None:
    source: queue.Queue[int | None] = queue.Queue()

    def items() -> Iterator[int]:
        while (item := source.get(timeout=30)) is not None:
            yield item

    stream = chunks(items(), 8)
    for number in range(3):
        source.put(number)
        assert next(stream) == [number]
    source.put(None)
    assert list(stream) == []


def test_an_error_comes_after_what_was_read_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("broken")

    got: list[int] = []

    def consume() -> None:
        for chunk in chunks(items(), 2):
            got.extend(chunk)

    with pytest.raises(ValueError, match="broken"):
        consume()
    assert got == [0, 1, 2]
