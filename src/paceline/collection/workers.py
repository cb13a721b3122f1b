"""Who does the parts of a collection: this process, or several beside it.

A small model leaves cores idle when one process drives them all, so parts may go to processes that
load the models themselves. Results come back in the order of the parts whoever did them, and only this
process writes. Knows what a part is only by its `run`.
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

    Tick = Callable[[int], None]
    Progress = Callable[[str, int, int], None]

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Task(Protocol[R_co]):
    """A part of the work, of `len(task)` prompts; it and its result can be pickled."""

    def __len__(self) -> int: ...
    def run(self, pace: Pace, tick: Tick) -> R_co:
        """tick(n): n more prompts are done."""


class WorkerPool:
    """Does tasks, in order. Made by `gather`."""

    def __init__(self, pace: Pace, pool: ProcessPoolExecutor | None, workers: int) -> None:
        self._pace, self._pool, self._workers = pace, pool, workers

    def do(self, tasks: Sequence[Task[R]], stage: str, on_progress: Progress) -> Iterator[R]:
        """The result of each task; on_progress(stage, done, total) counts prompts."""
        total, done = sum(len(task) for task in tasks), 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            on_progress(stage, done, total)

        if self._pool is None:
            for task in tasks:
                yield task.run(self._pace, tick)
            return
        for task, result in self._in_order(self._pool, tasks):
            tick(len(task))
            yield result

    def _in_order(
        self, pool: ProcessPoolExecutor, tasks: Sequence[Task[R]]
    ) -> Iterator[tuple[Task[R], R]]:
        """Only a few tasks ahead of what was taken, so that results do not pile up."""
        config = self._pace.parts.config
        threads = max(1, torch.get_num_threads() // self._workers)
        config = config.model_copy(update={"threads": threads})
        waiting = iter(tasks)
        under_way: deque[tuple[Task[R], Future[R]]] = deque()
        try:
            while True:
                room = 2 * self._workers - len(under_way)
                under_way.extend((t, pool.submit(_run, config, t)) for t in islice(waiting, room))
                if not under_way:
                    return
                task, future = under_way.popleft()
                yield task, future.result()
        except BrokenProcessPool as error:
            raise PacelineError(
                "a worker process ended, perhaps for lack of memory; what was finished is kept: "
                "run it again, with fewer workers"
            ) from error


@contextmanager
def gather(pace: Pace, workers: int) -> Iterator[WorkerPool]:
    """A pool of this process alone, or of `workers` that share its threads.

    Workers build their models from the configuration, so models in memory cannot have any.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    if workers == 1:
        yield WorkerPool(pace, None, 1)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent)
    try:
        yield WorkerPool(pace, pool, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_built: list[Pace] = []  # a worker's own, built at its first task


def _run(config: Config, task: Task[R]) -> R:
    if not _built:
        _built.append(Pace(build(config)))
    return task.run(_built[0], lambda count: None)
