"""How the threads of a job share its work: phases of numbered pieces, claimed one by one.

Every phase has a counter of unfinished pieces and, for each thread, a share of pieces to begin with; a
thread whose share is done takes pieces of the others. Whoever sees the last piece finished goes on to
the next phase, so a thread that is late, or asleep, delays nobody who holds no piece of his.

A counter also carries the job's tag. A thread that is still in an older job finds another tag, can claim
nothing, and leaves. Counters live as long as the process, so it may look at any time.
Layout of a counter: tag (23 bits), next piece (20 bits), end of the share (20 bits).
"""

from __future__ import annotations

import ctypes
import platform
from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from paceline.models.compiled.memory import add_atomic, field, get_atomic, put_atomic, swap_atomic
from paceline.models.compiled.tables import SCRATCH, SCRATCH_STRIDE, THREADS, YIELD
from paceline.models.compiled.vectors import I32, compiled, declared

if TYPE_CHECKING:
    from collections.abc import Callable

LINE: Final = 64  # bytes; counters of different threads are on different cache lines
MAX_PIECES: Final = (1 << 20) - 1
TAGS: Final = 1 << 23  # the sign bit stays 0
NONE_LEFT: Final = -1
STALE: Final = -2  # the job is over

_NEXT: Final = 1 << 20
_TAG_SHIFT: Final = 40
_PATIENCE: Final = 512  # looks at a counter before the processor is offered to another thread


@intrinsic
def pause(typingctx):
    """Tell the processor that this thread is waiting for another one."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if platform.machine().lower() in ("x86_64", "amd64", "i686"):
            builder.call(declared(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        elif platform.machine().lower() in ("aarch64", "arm64"):
            hint = declared(builder, "llvm.aarch64.hint", ir.VoidType(), [I32])
            builder.call(hint, [ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(), codegen


def yield_address() -> int:
    """Return the address of the system's function that lets another thread run."""
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


@intrinsic
def offer_processor(typingctx, function):
    """Let another thread run that waits for this processor; see `yield_address`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(I32, [])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@compiled
def phase_bytes(threads: int) -> int:
    """Return the bytes of a phase's counters."""
    return LINE * (1 + threads)


@compiled
def open_phase(phase: int, threads: int, tag: int, pieces: int) -> None:
    """Set a phase's counters at an address, with equal shares."""
    put_atomic(phase, (tag << _TAG_SHIFT) | pieces)
    for thread in range(threads):
        start, stop = thread * pieces // threads, (thread + 1) * pieces // threads
        share = (tag << _TAG_SHIFT) | (start << 20) | stop
        put_atomic(phase + LINE * (1 + thread), share)


@compiled
def claim(phase: int, threads: int, thread: int, tag: int) -> int:
    """Return the number of a piece that this thread does now, NONE_LEFT or STALE."""
    for k in range(threads):
        other = thread + k
        if other >= threads:
            other -= threads
        counter = phase + LINE * (1 + other)
        seen = get_atomic(counter)
        while True:
            if seen >> _TAG_SHIFT != tag:
                return STALE
            piece, stop = (seen >> 20) & MAX_PIECES, seen & MAX_PIECES
            if piece >= stop:
                break
            before = swap_atomic(counter, seen, seen + _NEXT)
            if before == seen:
                return piece
            seen = before
    return NONE_LEFT


@compiled
def finish(phase: int, threads: int, thread: int, tag: int) -> int:
    """Count a claimed piece as finished, and claim another one."""
    add_atomic(phase, -1)
    return claim(phase, threads, thread, tag)


@compiled
def await_all(job: int, phase: int, tag: int) -> bool:
    """Wait until all pieces are finished; return False if the job is over.

    Whoever has claimed a piece finishes it, so a counter with the job's tag comes to 0.
    """
    looks = 0
    while True:
        seen = get_atomic(phase)
        if seen >> _TAG_SHIFT != tag:
            return False
        if seen & MAX_PIECES == 0:
            return True
        looks += 1
        pause()
        if looks % _PATIENCE == 0:
            offer_processor(field(job, YIELD))


def in_pieces(do_piece: Callable[..., Any]) -> Callable[..., Any]:
    """Return phase(job, model, given, counters, thread, tag), one thread's part in a phase.

    It waits until all pieces are finished, and returns False if the job is over. counters: address of
    the phase's. do_piece(job, model, given, private, piece, is_first) does one piece. given: any numbers
    or tuple. private: address of the thread's scratch. is_first: whether it is the thread's first piece.
    """

    @compiled
    def phase(job, model, given, counters, thread, tag):
        threads, is_first = field(job, THREADS), True
        private = field(job, SCRATCH) + thread * field(job, SCRATCH_STRIDE)
        piece = claim(counters, threads, thread, tag)
        while piece >= 0:
            do_piece(job, model, given, private, piece, is_first)
            is_first = False
            piece = finish(counters, threads, thread, tag)
        return piece != STALE and await_all(job, counters, tag)

    return phase
