"""Runs in one process or in several, each with one thread; the caller stores what is finished.

A student of the comparison is too small to gain from a second thread, so runs share the cores instead.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from paceline.collection.workers import exit_with_parent
from paceline.errors import PacelineError
from paceline.experiments.direct_alignment import materials, training
from paceline.learning.learners.networks import one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from paceline.experiments.direct_alignment.plan import Run
    from paceline.experiments.direct_alignment.training import RunContext

_context: RunContext | None = None  # of a worker process


def train_all(
    runs: Sequence[Run], context: RunContext, saved: Path, workers: int
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Yield each run and its facts when it is finished.

    saved: the file of the materials, which the workers read. Raises ConfigError as `train` does,
    PacelineError if a worker process ends.
    """
    if workers == 1 or len(runs) < 2:
        with one_thread():
            for run in runs:
                yield run, training.train(run, context)
        return
    # forked processes would have threads in unknown states
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(runs)), spawn, _begin, (saved, _without_texts(context))
    )
    try:
        waiting = {pool.submit(_train, run): run for run in runs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool as error:
        raise PacelineError(
            "a worker process ended, perhaps for lack of memory; finished runs are stored: run it "
            "again, with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _without_texts(context: RunContext) -> dict[str, Any]:
    """Return a context's other fields: a worker reads the texts itself."""
    names = ("folder", "round_costs", "validations", "on_cpu", "commit")
    return {name: getattr(context, name) for name in names}


def _begin(saved: Path, fields: dict[str, Any]) -> None:
    """Prepare a worker process."""
    global _context
    exit_with_parent()
    torch.set_num_threads(1)
    _context = training.RunContext(materials=materials.load(saved), **fields)


def _train(run: Run) -> dict[str, Any]:
    assert _context is not None  # set by `_begin`
    return training.train(run, _context)
