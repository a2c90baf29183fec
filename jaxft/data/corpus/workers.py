"""Worker processes that are given one task after the other, and whose deaths are noticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

from jaxft.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def results(
    begin: Callable[..., Callable[[Task], Result]], arguments: tuple[object, ...], tasks: Sequence[Task], count: int
) -> Iterator[tuple[Task, Result]]:
    """The results of tasks as they come, each with its task.

    Args:
      begin: called once in each process with ``arguments``, it gives the function that does the tasks; one of a module.
      tasks: in the order that they are begun in.
      count: of processes; 1: this one.

    Raises:
      UserError: a task raised it, or a process died.
    """
    if count == 1 or len(tasks) <= 1:
        run = begin(*arguments)
        for task in tasks:
            yield task, run(task)
        return
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for _ in range(min(count, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, begin, arguments), daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        yield from _dealt(workers, tasks)
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _dealt(workers: list[_Worker], tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
    remaining, busy = iter(tasks), dict[Connection, tuple[_Worker, Task]]()

    def give(worker: _Worker) -> None:
        task = next(remaining, None)
        if task is not None:
            worker.pipe.send(task)
            busy[worker.pipe] = (worker, task)

    for worker in workers:
        give(worker)
    while busy:
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            worker, task = busy.pop(pipe)
            try:
                kind, value = pipe.recv()
            except (EOFError, ConnectionResetError) as error:
                worker.process.join()
                code = worker.process.exitcode or 0
                how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
                raise UserError(
                    f"a worker process ended {how}; out of memory? take fewer --workers; what is done is kept, the same "
                    "command goes on"
                ) from error
            if kind == "refused":
                raise UserError(value)
            if kind == "failed":
                raise RuntimeError(value)
            yield task, value
            give(worker)


def _work(pipe: Connection, begin: Callable[..., Callable[[object], object]], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run = None
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the other end is gone
            return
        try:
            run = begin(*arguments) if run is None else run
            answer: tuple[str, object] = ("done", run(task))
        except UserError as error:
            answer = ("refused", str(error))
        except Exception:  # noqa: BLE001 - a fault, told where the command is
            answer = ("failed", traceback.format_exc())
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return
