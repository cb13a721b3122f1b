"""The threads that run jobs: the caller and followers, which wait for the next job without Python.

A follower looks for the next job for about a millisecond and then sleeps in Python until it is woken;
the caller never waits for it to come, since whoever runs shares the pieces. One job runs on the team at
a time; a second caller meanwhile runs its own job alone. A forked child makes its own team.
"""

from __future__ import annotations

import atexit
import os
import threading
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from paceline.models.compiled.amx import tile_config
from paceline.models.compiled.entry import ASLEEP, LINE, MAX_THREADS, STOP, TEAM_BYTES
from paceline.models.compiled.native import control_functions
from paceline.models.compiled.sharing import TAGS, yield_address
from paceline.models.compiled.tables import (
    COPIES,
    COPY_BYTES,
    COUNTERS,
    CURRENT,
    JOB_SIZE,
    THREADS,
    TILE_CONFIG,
    YIELD,
    rounded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE: Final = 20_000  # pauses of 30 to 50 ns before a follower sleeps


def aligned(num_bytes: int) -> np.ndarray:
    """Return zeroed bytes at an address that is a multiple of 64."""
    raw = np.zeros(num_bytes + LINE, np.uint8)
    offset = -raw.ctypes.data % LINE
    return raw[offset : offset + num_bytes]


class Workspace:
    """The job table, counters and buffers of one job at a time; they grow as needed and stay."""

    def __init__(self) -> None:
        self.job = aligned(8 * JOB_SIZE).view(np.int64)
        self.address: int = self.job.ctypes.data
        self._config = aligned(LINE)
        self._config[:] = np.frombuffer(tile_config(), np.uint8)
        self.job[TILE_CONFIG] = self._config.ctypes.data
        self.job[YIELD] = yield_address()
        self._current, self._copies = aligned(LINE), aligned(COPY_BYTES * MAX_THREADS)
        self.job[CURRENT] = self._current.ctypes.data
        self.job[COPIES] = self._copies.ctypes.data
        self._counters = aligned(LINE)
        self._old_counters: list[np.ndarray] = []  # a late thread may still look at them
        self._tag = 0
        self._use(aligned(LINE))

    def _use(self, memory: np.ndarray) -> None:
        self._size = memory.nbytes
        self.integers: np.ndarray = memory.view(np.int64)
        self.base: int = memory.ctypes.data  # address of the buffers

    def next_tag(self) -> int:
        """Return the tag of the next job."""
        self._tag = self._tag % (TAGS - 1) + 1
        return self._tag

    def reserve(self, num_bytes: int, counter_bytes: int) -> None:
        """Make room for the buffers and counters of a job."""
        if num_bytes > self._size:
            self._use(aligned(rounded(num_bytes + num_bytes // 2, LINE)))
        if counter_bytes > self._counters.nbytes:
            self._old_counters.append(self._counters)
            self._counters = aligned(2 * counter_bytes)
            self.job[COUNTERS] = self._counters.ctypes.data


class Team:
    """The process's threads for jobs."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._memory = aligned(TEAM_BYTES).view(np.int64)
        self._address: int = self._memory.ctypes.data
        self._asleep = memoryview(self._memory.data)[ASLEEP // 8 :: LINE // 8]
        self._threads: list[threading.Thread] = []
        self._wake: list[threading.Event] = []
        self.lock = threading.Lock()
        self._lead, self._follow = control_functions()

    def run(self, threads: int) -> None:
        """Run the workspace's job on this thread and `threads` - 1 others. The lock must be held.

        Where the system allows no more threads, it runs on fewer.
        """
        for follower in range(threads - 1):
            if follower == len(self._threads) and not self._add_follower():
                threads = follower + 1
                break
            if self._asleep[follower]:
                self._wake[follower].set()
        self.workspace.job[THREADS] = threads
        self._lead(self._address, self.workspace.address, self.workspace.next_tag())

    def _add_follower(self) -> bool:
        """Start one more thread; return whether the system allows it."""
        event = threading.Event()
        number = len(self._threads) + 1
        thread = threading.Thread(
            target=self._work, args=(number, event), name=f"paceline-{number}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads.append(thread)
        self._wake.append(event)
        return True

    def _work(self, number: int, event: threading.Event) -> None:
        seen = 0
        while not self._memory[STOP // 8]:
            seen = self._follow(self._address, self.workspace.address, number, seen, _PATIENCE)
            event.wait()
            event.clear()

    def stop(self) -> None:
        """End the followers."""
        self._memory[STOP // 8] = 1
        for event in self._wake:
            event.set()
        end = monotonic() + 1
        for thread in self._threads:
            thread.join(max(0.0, end - monotonic()))


class _Solo:
    """A workspace for a caller that finds the team at work."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self._lead, _ = control_functions()

    def run(self, threads: int) -> None:
        """Run the workspace's job on this thread alone."""
        self.workspace.job[THREADS] = 1
        self._lead(0, self.workspace.address, self.workspace.next_tag())


Lent: TypeAlias = Team | _Solo

_team: Team | None = None
_solos: list[_Solo] = []
_making = threading.Lock()


@contextmanager
def borrowed() -> Iterator[Lent]:
    """Lend the team inside the block, or to a caller that finds it at work, a workspace of its own."""
    global _team
    if _team is None:
        with _making:
            if _team is None:
                _team = Team()
    team = _team
    if team.lock.acquire(blocking=False):
        try:
            yield team
        finally:
            team.lock.release()
        return
    with _making:
        solo = _solos.pop() if _solos else _Solo()
    try:
        yield solo
    finally:
        _solos.append(solo)


def _forget() -> None:
    """Leave the parent's team, whose threads do not exist in a forked child."""
    global _team, _making
    _team, _making = None, threading.Lock()
    _solos.clear()


def _stop() -> None:
    if _team is not None:
        _team.stop()


os.register_at_fork(after_in_child=_forget)
atexit.register(_stop)
