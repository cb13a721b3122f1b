"""A pool that runs the tasks of a collection in this process or in several.

A small model leaves cores idle when one process drives them all, so tasks may go to processes that load
the models themselves. Results come back in the order of the tasks, and only this process writes. Knows
a task only by its length and its `run`.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from paceline.assembly import Pace, build
from paceline.errors import ConfigError, PacelineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from paceline.config import Config
    from paceline.contracts import Progress

    OnDone = Callable[[int], None]  # called with the number of prompts done since the last call

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Task(Protocol[R_co]):
    """Work on `len(task)` prompts; the task and its result can be pickled."""

    def __len__(self) -> int: ...
    def run(self, pace: Pace, on_done: OnDone) -> R_co: ...


class WorkerPool:
    """Runs tasks and returns results in order. Opened by `open_pool`."""

    def __init__(self, pace: Pace, executor: ProcessPoolExecutor | None, workers: int) -> None:
        self._pace, self._executor, self._workers = pace, executor, workers

    def run_tasks(self, tasks: Sequence[Task[R]], stage: str, on_progress: Progress) -> Iterator[R]:
        """Yield the result of each task; on_progress(stage, done, total) counts prompts."""
        total, done = sum(len(task) for task in tasks), 0

        def on_done(count: int) -> None:
            nonlocal done
            done += count
            on_progress(stage, done, total)

        if self._executor is None:
            for task in tasks:
                yield task.run(self._pace, on_done)
            return
        for task, result in self._run_in_order(self._executor, tasks):
            on_done(len(task))
            yield result

    def _run_in_order(
        self, executor: ProcessPoolExecutor, tasks: Sequence[Task[R]]
    ) -> Iterator[tuple[Task[R], R]]:
        """Yield (task, result); only a few tasks run ahead, so that results do not accumulate."""
        config = self._pace.parts.config
        threads = max(1, torch.get_num_threads() // self._workers)
        config = config.model_copy(update={"threads": threads})
        waiting = iter(tasks)
        submitted: deque[tuple[Task[R], Future[R]]] = deque()
        try:
            while True:
                room = 2 * self._workers - len(submitted)
                submitted.extend(
                    (task, executor.submit(_run_in_worker, config, task))
                    for task in islice(waiting, room)
                )
                if not submitted:
                    return
                task, future = submitted.popleft()
                yield task, future.result()
        except BrokenProcessPool as error:
            raise PacelineError(
                "a worker process ended, perhaps for lack of memory; finished rows are stored: run it "
                "again, with fewer workers"
            ) from error


@contextmanager
def open_pool(pace: Pace, workers: int) -> Iterator[WorkerPool]:
    """Yield a pool of this process alone, or of `workers` processes that share its threads.

    Workers build their models from the configuration, so models in memory allow only one worker.
    Raises ConfigError on fewer than one.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        yield WorkerPool(pace, None, 1)
        return
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=exit_with_parent)
    try:
        yield WorkerPool(pace, executor, workers)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def exit_with_parent() -> None:
    """End this worker when its parent ends; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


_built: list[Pace] = []  # of this worker, built at its first task


def _run_in_worker(config: Config, task: Task[R]) -> R:
    if not _built:
        _built.append(Pace(build(config)))
    return task.run(_built[0], lambda count: None)
