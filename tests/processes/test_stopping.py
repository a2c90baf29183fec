"""Stopping together: threads in the place of processes, with jax's own service between them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from jaxlib import _jax
from processes.test_runs import port

from jaxft.machine.processes import letters, stopping
from jaxft.machine.processes.stopping import Together


@pytest.fixture(scope="module")
def _service() -> Iterator[object]:
    address = f"127.0.0.1:{port()}"
    service = _jax.get_distributed_runtime_service(address, 1)
    client = _jax.get_distributed_runtime_client(address, 0, use_compression=True, init_timeout=10)
    client.connect()
    yield client
    client.shutdown()
    service.shutdown()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, _service: object) -> None:
    monkeypatch.setattr(letters, "_service", lambda: _service)
    monkeypatch.setattr(stopping, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(stopping, "_ANSWER_SECONDS", 0.01)


def run(count: int, occasion: str, steps: int, asks: Callable[[int, int, Together], None]) -> list[int]:
    """The step after which each process ends. Steps wait for each other, as those of one program on all devices do."""
    together = threading.Barrier(count)
    ended = [0] * count

    def process(index: int) -> None:
        stop = Together(index, count, occasion)
        for step in range(1, steps + 1):
            together.wait(20)
            asks(index, step, stop)
            time.sleep(0.002)
            ended[index] = step
            if stop.after(step):
                break
        stop.close()

    threads = [threading.Thread(target=process, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return ended


@pytest.mark.parametrize("seed", range(12))
def test_all_stop_after_the_same_step(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 6)
    asked = {draw.randrange(count): draw.randint(1, 60) for _ in range(draw.randint(1, 3))}
    ended = run(count, f"same {seed}", 2000, lambda i, step, stop: stop.ask() if asked.get(i) == step else None)
    first = min(asked.values())
    assert len(set(ended)) == 1, ended
    # A few steps pass until the thread of whoever was asked has the turn, on a busy machine.
    assert first <= ended[0] <= first + 60, (first, ended)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_asked_at_the_end_nobody_waits_for_one_that_has_ended(last: int) -> None:
    ended = run(3, f"end {last}", 5, lambda i, step, stop: stop.ask() if (i, step) == (1, 5 - last) else None)
    assert len(set(ended)) == 1


def test_never_asked_all_do_all_steps() -> None:
    assert run(4, "never", 30, lambda i, step, stop: None) == [30] * 4


def test_a_process_that_has_ended_does_not_hold_up_the_others() -> None:
    one, two = (Together(index, 2, "gone") for index in range(2))
    one.close()
    two.ask()
    start = time.monotonic()
    assert not any(two.after(step) for step in range(3))
    two.close()
    assert time.monotonic() - start < 4
