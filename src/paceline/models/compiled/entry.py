"""The functions that start a job and follow one, as machine code behind plain C signatures."""

from __future__ import annotations

from typing import Final

from paceline.models.compiled.memory import call_run, field, get_atomic, put_atomic, put_field
from paceline.models.compiled.phases import plan
from paceline.models.compiled.sharing import offer_processor, pause
from paceline.models.compiled.tables import (
    COPIES,
    COPY_BYTES,
    CURRENT,
    JOB_SIZE,
    RUN,
    THREADS,
    YIELD,
)
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
def take_part(job, thread, tag):
    """Run this thread's part of the job tagged `tag`; nothing if its table may have changed.

    A thread may be late by any time, and find a later job's table half written. So it copies the table
    first, and runs only if the tag is still current then; its copy names its own job's counters only.
    """
    mine = field(job, COPIES) + COPY_BYTES * thread
    for place in range(JOB_SIZE):
        put_field(mine, place, get_atomic(job + 8 * place))
    if get_atomic(field(job, CURRENT)) == tag and thread < field(mine, THREADS):
        call_run(field(mine, RUN), mine, thread, tag)


@compiled
def lead(team, job, tag):
    """Plan a job, publish it to the team's other threads (team 0: there are none), and run it."""
    put_atomic(field(job, CURRENT), tag)
    plan(job, tag)
    if team != 0:
        put_atomic(team + TAG, tag)
    take_part(job, 0, tag)
    put_atomic(field(job, CURRENT), 0)


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
            take_part(job, thread, tag)
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
