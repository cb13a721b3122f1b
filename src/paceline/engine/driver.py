"""The one owner of an engine's steps, and the ways to wait for a request's updates.

Any number of threads, generators and asyncio tasks may submit. One thread of the driver steps the
engine while a caller waits, and blocks otherwise. Every request has a mailbox, so that no caller can
take another's updates. This module knows no text and no policy.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from paceline.engine.openmp import release_pool
from paceline.errors import DecodingError, QueueFullError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

    from paceline.contracts import Completion, Request
    from paceline.engine.loop import Engine
    from paceline.engine.rows import RequestUpdate

    Deliver = Callable[[RequestUpdate], object]
    Mail = SimpleQueue[RequestUpdate | None]  # None: the queue may have room again
    # a ticket to cancel, mail that a caller waits for, _WAKE or _STOP
    Orders = SimpleQueue[int | Mail | None]

_WAKE: Final = None  # an order: look whether there is work
_STOP: Final = -1  # an order: end the thread; tickets count from 0
# A finaliser may run in a thread that holds a lock which the round needs, so waits are bounded.
_LONGEST_ROUND: Final = 30.0  # seconds
_LINGER: Final = 0.02  # seconds that the thread keeps its OpenMP workers while a stream is not read


class _Mailbox(NamedTuple):
    to: Deliver | Mail  # a function is called at once, mail is read by its caller later
    tokens: bool  # whether new tokens are delivered, or the completion alone


class Driver:
    """The steps of one engine, for any number of callers. Thread-safe.

    A request of an iterator advances while any caller waits. When no caller waits, callers may use the
    models themselves. A request of `submit` or of an asyncio task needs no waiting caller.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._mail: dict[int, _Mailbox] = {}
        self._always: set[int] = set()  # tickets that need no waiting caller
        self._waiting: set[Mail] = set()  # a caller waits for it; used by the thread alone
        self._room: deque[Mail] = deque()  # to notify when the queue has room
        self._num_threads = torch.get_num_threads()
        self._forked_in_flight = False
        self._reset()
        release_pool()  # of this thread, which has loaded the models
        _drivers.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()  # guards tickets, fullness and the thread's start
        self._orders: Orders = SimpleQueue()
        self._thread: threading.Thread | None = None

    # --- ways to wait -----------------------------------------------------------------------------

    def generate(
        self, requests: Iterable[Request], return_errors: bool = False
    ) -> Iterator[Completion]:
        """Yield completions as they finish. All requests are checked before the first one starts.

        Raises DecodingError at the first request that fails, unless `return_errors`: then its
        completion holds the error. Closing the iterator cancels the unfinished requests.
        """
        for _, update in self.progress(requests, tokens=False):
            completion = update.completion
            assert completion is not None
            if not return_errors:
                raise_failure(update)
            yield completion

    def progress(
        self, requests: Iterable[Request], tokens: bool = True
    ) -> Iterator[tuple[int, RequestUpdate]]:
        """Yield (index of a request, its update) until all requests have ended.

        tokens: whether to report new tokens as they come, or each request once, at its end. Requests
        for which the queue has no room are submitted later. Closing the iterator cancels the
        unfinished requests and returns when their rows are free.
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
                    self._wake(mail)  # after all are queued, so that they share their prefill
                update = mail.get()
                if update is None:
                    asked_for_room = False
                    continue
                place = places[update.ticket]
                if update.completion is not None:
                    del places[update.ticket]
                yield place, update
        finally:
            self._cancel_all(places, mail)

    def _cancel_all(self, tickets: Iterable[int], mail: Mail) -> None:
        left = set(tickets)
        for ticket in left:
            self.cancel(ticket)
        thread = self._thread
        if thread is None or not thread.is_alive() or threading.current_thread() is thread:
            return  # ended process, forked child, or a generator that was collected during a step
        with suppress(Exception):  # Empty: see _LONGEST_ROUND
            while left:
                update = mail.get(timeout=_LONGEST_ROUND)
                if update is not None and update.completion is not None:
                    left.discard(update.ticket)

    async def aprogress(self, request: Request) -> AsyncGenerator[RequestUpdate, None]:
        """Yield one request's updates to an asyncio task. Raises QueueFullError if too many wait.

        Closing the iterator, or cancelling the task, cancels the request.
        """
        loop = asyncio.get_running_loop()
        mail: asyncio.Queue[RequestUpdate] = asyncio.Queue()
        ticket = self.submit(
            request, lambda update: loop.call_soon_threadsafe(mail.put_nowait, update)
        )
        ended = False
        try:
            while not ended:
                update = await mail.get()
                ended = update.completion is not None
                yield update
        finally:
            if not ended:
                self.cancel(ticket)

    async def acomplete(self, request: Request) -> Completion:
        """Return one request's completion to an asyncio task. Raises as `generate` does.

        Cancelling the task cancels the request.
        """
        loop = asyncio.get_running_loop()
        end: asyncio.Future[RequestUpdate] = loop.create_future()

        def set_end(update: RequestUpdate) -> None:
            if not end.done():  # cancelled meanwhile
                end.set_result(update)

        ticket = self.submit(
            request, lambda update: loop.call_soon_threadsafe(set_end, update), tokens=False
        )
        try:
            update = await end
        except BaseException:  # cancelled, or dropped with its event loop
            self.cancel(ticket)
            raise
        raise_failure(update)
        assert update.completion is not None
        return update.completion

    def submit(self, request: Request, deliver: Deliver, tokens: bool = True) -> int:
        """Queue a request and return its ticket; `deliver` is called with its updates.

        deliver: called in the driver's thread between two steps, so it must be quick; if it raises,
        the request is cancelled. tokens: as in `progress`. Raises RequestError if the request cannot be
        served, QueueFullError if too many wait already.
        """
        ticket = self._queue(request, deliver, tokens)
        self._wake()
        return ticket

    def _queue(self, request: Request, to: Deliver | Mail, tokens: bool) -> int:
        """Queue a request as `submit` does, without waking the thread."""
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
        """Make the thread look for work. mail: set if the caller waits for it."""
        self._check_caller()
        release_pool()
        with self._lock:
            self._num_threads = torch.get_num_threads()
            if self._thread is None or not self._thread.is_alive():
                self._start()
        self._orders.put(_WAKE if mail is None else mail)

    def cancel(self, ticket: int) -> None:
        """End a request with its tokens so far; its row is free before the next round.

        Safe in any thread and in a finaliser. Does nothing to a request that has ended.
        """
        self._orders.put(ticket)

    # --- the thread -------------------------------------------------------------------------------

    def _start(self) -> None:
        # a weak reference, so that an idle thread does not keep an unused driver alive
        work = (weakref.ref(self), self._orders)
        thread = threading.Thread(target=_work, args=work, name="paceline driver", daemon=True)
        thread.start()
        self._thread = thread  # after start, which may fail
        weakref.finalize(self, _stop, self._orders, thread)

    def _execute(self, order: int | Mail | None) -> bool:
        """Step while a caller waits; return whether the thread should continue."""
        if torch.get_num_threads() != self._num_threads:  # torch keeps it per thread
            torch.set_num_threads(self._num_threads)
        orders = [order]
        while True:
            while not self._orders.empty():
                orders.append(self._orders.get())
            if _STOP in orders:
                return False
            cancelled = [ticket for ticket in orders if isinstance(ticket, int)]
            for mail in orders:
                # a caller whose mail has arrived waits no longer
                if isinstance(mail, SimpleQueue) and mail.empty():
                    self._waiting.add(mail)
            orders.clear()
            # before the thread may go idle: the queue may have room since a caller found it full
            while self._room and not self.engine.is_full:
                self._put(None, self._room.popleft())
            if not cancelled and not (self.engine.has_work and (self._waiting or self._always)):
                return True
            self._step(cancelled)

    def _step(self, cancelled: Iterable[int]) -> None:
        try:
            for ticket in cancelled:
                self.engine.cancel(ticket)
            updates = self.engine.step()
        except BaseException:  # noqa: BLE001 - their completions hold the error
            updates = self.engine.take_updates()
        if not self.engine.has_work:
            release_pool()  # first: a caller may compute as soon as it has its update
        for update in updates:
            mailbox = self._mail.get(update.ticket)
            if mailbox is None:
                continue
            if update.completion is not None:
                self._close(update.ticket)
            elif not mailbox.tokens:
                continue
            if isinstance(mailbox.to, SimpleQueue):
                self._put(update, mailbox.to)
                continue
            try:
                mailbox.to(update)
            except BaseException:  # noqa: BLE001 - its reader is gone, such as after an event loop's end
                self._close(update.ticket)
                self.cancel(update.ticket)

    def _close(self, ticket: int) -> None:
        self._mail.pop(ticket, None)
        self._always.discard(ticket)

    def _put(self, update: RequestUpdate | None, mail: Mail) -> None:
        self._waiting.discard(mail)  # first: its reader may use the models at once
        mail.put(update)

    def after_fork(self) -> None:
        """Reset in a forked child, which has no driver thread: the requests are the parent's."""
        self._forked_in_flight = self.engine.has_work
        for held in (self._mail, self._always, self._waiting, self._room):
            held.clear()
        self._reset()


def raise_failure(update: RequestUpdate) -> None:
    """Raise DecodingError if the request has ended with an error."""
    completion = update.completion
    if completion is not None and completion.error is not None:
        raise DecodingError(
            f"request {completion.request_id}: {completion.error}"
        ) from update.cause


def _work(driver_of: weakref.ref[Driver], orders: Orders) -> None:
    is_running = True
    while is_running:
        try:
            order = orders.get(timeout=_LINGER)
        except Empty:
            release_pool()
            order = orders.get()
        driver = driver_of()
        is_running = driver is not None and driver._execute(order)
        del driver


def _stop(orders: Orders, thread: threading.Thread) -> None:
    """End the thread after its current step, when its driver is gone or the process exits."""
    orders.put(_STOP)
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join(_LONGEST_ROUND)


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _after_fork() -> None:
    for driver in list(_drivers):
        driver.after_fork()


os.register_at_fork(after_in_child=_after_fork)
