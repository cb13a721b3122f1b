"""The one owner of an engine's steps, and the ways to wait for what they bring.

Any number of threads, generators and asyncio tasks may submit; one thread of the driver's own steps
the engine while somebody waits for what it brings, and blocks otherwise. Every request has a mailbox,
so that no caller can take another's progress. Knows no text and no policy.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

import torch

from paceline.errors import DecodingError, QueueFullError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

    from paceline.contracts import Completion, Request
    from paceline.engine.loop import Engine, Progress

    Deliver = Callable[[Progress], None]
    Mail = SimpleQueue[Progress | None]  # None: look whether there is room for more requests
    # a ticket to cancel, mail that somebody waits for, or one of the two below
    Orders = SimpleQueue[int | Mail | None]

_WAKE: Final = None  # an order: look whether there is work
_STOP: Final = -1  # an order: end the thread; tickets count from 0
# A finaliser may run in a thread that holds what the round waits for, so nobody waits for ever.
_LONGEST_ROUND: Final = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class _Mailbox:
    to: Deliver | Mail  # mail is waited for by and by, a function takes all that comes
    tokens: bool  # whether tokens are delivered as they come, or the completion alone


class Driver:
    """Steps one engine for any number of callers. Thread-safe.

    A request of an iterator is decoded while some caller waits, for this one or for another; between
    two reads, while nobody waits, the models are the caller's own. A request of `submit` or of an
    asyncio task is decoded to its end.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._mail: dict[int, _Mailbox] = {}
        self._always: set[int] = set()  # tickets that somebody waits for all the time
        self._waiting: set[Mail] = set()  # that somebody waits for; the thread's own
        self._room: deque[Mail] = deque()  # to be told when the queue has room
        self._num_threads = torch.get_num_threads()
        self._forked_in_flight = False
        self._reset()
        _drivers.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()  # held to submit: tickets, fullness, the thread's start
        self._orders: Orders = SimpleQueue()
        self._thread: threading.Thread | None = None

    # --- for whoever waits ------------------------------------------------------------------------

    def generate(
        self, requests: Iterable[Request], return_errors: bool = False
    ) -> Iterator[Completion]:
        """Yield completions as they finish. All requests are checked before the first is begun.

        Raises DecodingError at the first request that fails on the way, unless `return_errors`: then
        its completion says so. Closing the iterator cancels the requests that are left.
        """
        for _, progress in self.progress(requests, tokens=False):
            completion = progress.completion
            assert completion is not None
            if not return_errors:
                raise_failure(progress)
            yield completion

    def progress(
        self, requests: Iterable[Request], tokens: bool = True
    ) -> Iterator[tuple[int, Progress]]:
        """Yield each request's progress with the request's place among them, until all have ended.

        tokens: whether new tokens are told as they come; else each request is heard of once, at its
        end. Requests beyond what may wait are submitted as soon as there is room. Closing the iterator
        cancels what is left, and returns when its rows are free.
        """
        left = deque(enumerate([self.engine.check(request) for request in requests]))
        mail: Mail = SimpleQueue()
        places: dict[int, int] = {}
        asked_for_room = False
        try:
            while left or places:
                try:
                    while left:
                        ticket = self._queue(left[0][1], mail, tokens)
                        places[ticket] = left.popleft()[0]
                except QueueFullError:
                    if not asked_for_room:
                        self._room.append(mail)
                    asked_for_room = True
                if mail.empty():
                    self._wake(mail)  # after all of them, so that they share their prefill
                progress = mail.get()
                if progress is None:
                    asked_for_room = False
                    continue
                place = places[progress.ticket]
                if progress.completion is not None:
                    del places[progress.ticket]
                yield place, progress
        finally:
            self._give_up(places, mail)

    def _give_up(self, tickets: Iterable[int], mail: Mail) -> None:
        """Cancel requests and wait until their rows are free."""
        left = set(tickets)
        for ticket in left:
            self.cancel(ticket)
        thread = self._thread
        if thread is None or not thread.is_alive():
            return  # at the end of the process, or in a forked child
        if threading.current_thread() is thread:
            return  # a generator that was collected in the middle of a step
        with suppress(Exception):  # Empty: see _LONGEST_ROUND
            while left:
                progress = mail.get(timeout=_LONGEST_ROUND)
                if progress is not None and progress.completion is not None:
                    left.discard(progress.ticket)

    async def aprogress(self, request: Request) -> AsyncGenerator[Progress, None]:
        """Yield one request's progress to an asyncio task. Raises QueueFullError if too many wait.

        Closing the iterator, or cancelling the task, cancels the request.
        """
        loop = asyncio.get_running_loop()
        mail: asyncio.Queue[Progress] = asyncio.Queue()

        def deliver(progress: Progress) -> None:
            loop.call_soon_threadsafe(mail.put_nowait, progress)

        ticket = self.submit(request, deliver)
        ended = False
        try:
            while not ended:
                progress = await mail.get()
                ended = progress.completion is not None
                yield progress
        finally:
            if not ended:
                self.cancel(ticket)

    async def acomplete(self, request: Request) -> Completion:
        """Return one request's completion to an asyncio task. Raises as `generate` does.

        Cancelling the task cancels the request.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Progress] = loop.create_future()

        def answer(progress: Progress) -> None:
            if not found.done():  # cancelled meanwhile
                found.set_result(progress)

        def deliver(progress: Progress) -> None:
            loop.call_soon_threadsafe(answer, progress)

        ticket = self.submit(request, deliver, tokens=False)
        try:
            progress = await found
        except BaseException:  # cancelled, or thrown away with its event loop
            self.cancel(ticket)
            raise
        raise_failure(progress)
        assert progress.completion is not None
        return progress.completion

    # --- the engine's door ------------------------------------------------------------------------

    def submit(self, request: Request, deliver: Deliver, tokens: bool = True) -> int:
        """Queue a request and return its ticket; `deliver` is handed its progress as it comes.

        deliver: called in the driver's thread between two steps, so it must be quick; one that raises
        ends the request. tokens: as in `progress`. Raises RequestError if the request cannot be
        served, QueueFullError if too many wait already.
        """
        ticket = self._queue(request, deliver, tokens)
        self._wake()
        return ticket

    def _queue(self, request: Request, to: Deliver | Mail, tokens: bool) -> int:
        """`submit` without waking the thread."""
        self._check_caller()
        request = self.engine.check(request)
        with self._lock:
            ticket = self.engine.new_ticket()
            self._mail[ticket] = _Mailbox(to, tokens)
            try:
                self.engine.submit(request, ticket)
            except BaseException:
                del self._mail[ticket]
                raise
            if not isinstance(to, SimpleQueue):
                self._always.add(ticket)
        return ticket

    def _check_caller(self) -> None:
        """Raise DecodingError to who would wait for ever."""
        if threading.current_thread() is self._thread:
            raise DecodingError(
                "a policy, drafter, logits processor or log asked the engine that it works for; "
                "give it an engine of its own"
            )
        if self._forked_in_flight:
            raise DecodingError(
                "this process was forked while requests were in flight; load the models in it again"
            )

    def _wake(self, mail: Mail | None = None) -> None:
        """Have the thread look for work, and work until there is mail, where some is waited for."""
        self._check_caller()
        with self._lock:
            self._num_threads = torch.get_num_threads()
            if self._thread is None or not self._thread.is_alive():
                self._start()
        self._orders.put(_WAKE if mail is None else mail)

    def cancel(self, ticket: int) -> None:
        """End a request with what it has so far; its row is free before the next round.

        Safe in any thread and in a finaliser. A request that has ended is left alone.
        """
        self._orders.put(ticket)

    # --- the thread -------------------------------------------------------------------------------

    def _start(self) -> None:
        # not held by the thread while it is idle, so that a driver nobody has any more can go
        work = (weakref.ref(self), self._orders)
        thread = threading.Thread(target=_work, args=work, name="paceline driver", daemon=True)
        thread.start()
        self._thread = thread  # not before: the system may have no thread left to give
        weakref.finalize(self, _stop, self._orders, thread)

    def _work_off(self, order: int | Mail | None) -> bool:
        """Step while somebody waits for it; whether the thread should go on."""
        if torch.get_num_threads() != self._num_threads:  # each thread has its own number
            torch.set_num_threads(self._num_threads)
        while True:
            orders = [order]
            while not self._orders.empty():
                orders.append(self._orders.get())
            if _STOP in orders:
                return False
            cancelled = [one for one in orders if isinstance(one, int)]
            # mail that has come meanwhile is waited for no more
            self._waiting |= {m for m in orders if isinstance(m, SimpleQueue) and m.empty()}
            # before the thread may go idle: the queue may have emptied since somebody found it full
            while self._room and not self.engine.is_full:
                self._put(None, self._room.popleft())
            if not cancelled and not (self.engine.has_work and (self._waiting or self._always)):
                return True
            self._step(cancelled)
            order = _WAKE

    def _step(self, cancelled: Iterable[int]) -> None:
        try:
            for ticket in cancelled:
                self.engine.cancel(ticket)
            found = self.engine.step()
        except BaseException:  # noqa: BLE001 - the requests that ended with it say so
            found = self.engine.take_progress()
        for progress in found:
            mailbox = self._mail.get(progress.ticket)
            if mailbox is None:
                continue
            if progress.completion is not None:
                del self._mail[progress.ticket]
                self._always.discard(progress.ticket)
            elif not mailbox.tokens:
                continue
            if isinstance(mailbox.to, SimpleQueue):
                self._put(progress, mailbox.to)
                continue
            try:
                mailbox.to(progress)
            except BaseException:  # noqa: BLE001 - nobody can read it, as after an event loop's end
                self._mail.pop(progress.ticket, None)
                self._always.discard(progress.ticket)
                self.cancel(progress.ticket)

    def _put(self, progress: Progress | None, mail: Mail) -> None:
        self._waiting.discard(mail)  # first: whoever reads it may use the models at once
        mail.put(progress)

    def after_fork(self) -> None:
        """Begin anew in a forked child, where the thread is not: its requests are the parent's."""
        self._forked_in_flight = self.engine.has_work
        for held in (self._mail, self._always, self._waiting, self._room):
            held.clear()
        self._reset()


def raise_failure(progress: Progress) -> None:
    """Raise DecodingError if the request has ended with an error."""
    completion = progress.completion
    if completion is not None and completion.error is not None:
        raise DecodingError(
            f"request {completion.request_id}: {completion.error}"
        ) from progress.cause


def _work(driver_of: weakref.ref[Driver], orders: Orders) -> None:
    """The thread: blocks while there is nothing to do."""
    going_on = True
    while going_on:
        order = orders.get()
        driver = driver_of()
        going_on = driver is not None and driver._work_off(order)
        del driver


def _stop(orders: Orders, thread: threading.Thread) -> None:
    """End a thread whose driver is gone, or at the end of the process after the step it is at."""
    orders.put(_STOP)
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join(_LONGEST_ROUND)


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _after_fork() -> None:
    for driver in list(_drivers):
        driver.after_fork()


os.register_at_fork(after_in_child=_after_fork)
