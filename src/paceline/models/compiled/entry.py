"""The functions that start a job and follow one, as machine code behind plain C signatures."""

from __future__ import annotations

from typing import Final

from paceline.models.compiled.memory import call_run, field, get_atomic, put_atomic
from paceline.models.compiled.phases import plan
from paceline.models.compiled.sharing import offer_processor, pause
from paceline.models.compiled.tables import CURRENT, RUN, THREADS, YIELD
from paceline.models.compiled.vectors import compiled

# a team's memory: int64 on lines of their own
TAG: Final = 0  # of the newest job
STOP: Final = 64  # not 0: threads return
ASLEEP: Final = 128  # of the first follower, then of the others: 1 while it waits in Python
LINE: Final = 64
MAX_THREADS: Final = 256
TEAM_BYTES: Final = ASLEEP + LINE * MAX_THREADS

_YIELD_EVERY: Final = 64  # pauses


@compiled
def lead(team, job, tag):
    """Plan a job, publish it to the team's other threads (team 0: there are none), and run it."""
    put_atomic(job + 8 * CURRENT, tag)
    plan(job, tag)
    if team != 0:
        put_atomic(team + TAG, tag)
    call_run(field(job, RUN), job, 0, tag)


@compiled
def follow(team, job, thread, seen, patience):
    """Run this thread's part of every job after the one tagged `seen`; return the last one's tag.

    Returns when told to stop, or after `patience` pauses without a job, marked as asleep.
    """
    idle = 0
    put_atomic(team + ASLEEP + LINE * (thread - 1), 0)
    while get_atomic(team + STOP) == 0:
        tag = get_atomic(team + TAG)
        if tag != seen:
            seen, idle = tag, 0
            if thread < field(job, THREADS):
                call_run(field(job, RUN), job, thread, tag)
            continue
        idle += 1
        pause()
        if idle % _YIELD_EVERY == 0:
            offer_processor(field(job, YIELD))
        if idle > patience:
            put_atomic(team + ASLEEP + LINE * (thread - 1), 1)
            if get_atomic(team + TAG) == seen:
                return seen
            put_atomic(team + ASLEEP + LINE * (thread - 1), 0)
            idle = 0
    return seen
