"""The life of requests: submit, admit, prefill, choose, rounds, completion.

Rows join and leave between rounds, and a row that fails or is cancelled does not affect the others.
"""

from __future__ import annotations

import itertools
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from paceline.contracts import AUTO, NONE, Decision, Request, Seconds
from paceline.engine.budget import Budget
from paceline.engine.checks import check_arm, check_request, fits, max_total
from paceline.engine.containment import CompletionFailures, contained
from paceline.engine.control import ControlledRows
from paceline.engine.endings import final_text
from paceline.engine.prefill import Prefill
from paceline.engine.prefixes import PrefixStore
from paceline.engine.rows import RequestUpdate, Row, count_drafters
from paceline.engine.seats import Seats
from paceline.engine.step import run_round
from paceline.errors import ArtefactError, QueueFullError, RequestError
from paceline.models.detokenizer import Detokenizer
from paceline.requests import read_request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.contracts import Completion, Context
    from paceline.costs.round_seconds import RoundSeconds
    from paceline.drafting.base import Drafter
    from paceline.engine.control import ArmController
    from paceline.models.language_model import LanguageModel

    Choose = Callable[[Context], Decision]
    OnComplete = Callable[[Request, Completion, Context | None], None]


class _Waiting(NamedTuple):
    ticket: int
    request: Request
    since: float  # perf_counter when it was submitted


class Engine:
    """A decoder of requests with one target; every row may have its own drafter.

    Not thread-safe: one thread submits, steps and cancels.
    """

    def __init__(
        self,
        target: LanguageModel,
        drafters: Mapping[str, Drafter],
        decode: Callable[[Sequence[int]], str],
        choose: Choose | None = None,
        max_rows: int = 8,
        prefill_chunk: int = 512,
        max_waiting: int | None = None,
        max_positions: int | None = None,
        prefix_positions: int = 0,
        max_drafter_mb: float | None = None,
        on_complete: OnComplete | None = None,
        controller: ArmController | None = None,
        round_seconds: RoundSeconds | None = None,
    ) -> None:
        """Bound the models' caches.

        decode: turns token ids into text, for stop strings and completions. choose: called once per
        request with drafter "auto", after the target's prefill. max_rows: requests in flight.
        prefill_chunk: prompt tokens per step. max_waiting: requests that may wait. max_positions: bound
        on rows x longest row, what the target's cache holds. prefix_positions: bound on shared prompt
        beginnings. max_drafter_mb: bound on the memory of the drafters' rows, beyond which a row gets
        no drafter. on_complete: called with every request that has ended, its completion, and the
        policy's context if a policy chose; its first exception becomes a warning, later ones are
        ignored. controller: may change the decision of `choose`, and the arm after every round.
        round_seconds: prices of this machine, by which drafts of several rows are cut and drafters that
        do not pay are not called.
        """
        self.target = target
        self.drafters = dict(drafters)
        self.choose = choose
        self.on_complete = on_complete
        self.prefixes = PrefixStore(prefix_positions)
        self._detokenizer = Detokenizer.wrap(decode)
        self._prefill = Prefill(target, self._detokenizer, self.prefixes, prefill_chunk)
        target.cache.bound(max_positions)
        for drafter in self.drafters.values():
            drafter.bound_cache(max_positions, exact_fit=max_drafter_mb is not None)
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._max_positions = max_positions
        self._tickets = itertools.count()
        self._waiting: deque[_Waiting] = deque()
        self._rows: list[Row] = []
        self._ended: list[RequestUpdate] = []  # since the last step reported
        self._seats = Seats(self.drafters, self._rows, prefill_chunk, max_drafter_mb)
        self._controlled = None if controller is None else ControlledRows(controller, self._seats)
        self._budget = None if round_seconds is None else Budget(round_seconds)
        self._completion_failures = CompletionFailures()
        self._check_mark = object()  # marks the requests that were checked here

    # --- step by step -----------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """True if the queue has no room for another request."""
        return self._max_waiting is not None and len(self._waiting) >= self._max_waiting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def has_work(self) -> bool:
        """True if there is a request to step or an update to report."""
        return bool(self._rows or self._waiting or self._ended)

    def new_ticket(self) -> int:
        """Return a ticket for a request that is about to be submitted."""
        return next(self._tickets)

    def submit(self, request: Request, ticket: int | None = None) -> int:
        """Queue a request and return its ticket. May be called while a step runs.

        Raises RequestError if it cannot be served, QueueFullError if too many wait already.
        """
        request = self.check(request)
        if self.is_full:
            raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later")
        ticket = self.new_ticket() if ticket is None else ticket
        self._waiting.append(_Waiting(ticket, request, perf_counter()))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request with its tokens so far; its row is free before the next round."""
        for row in self._rows:
            if row.id == ticket and row.finish_reason is None:
                row.finish_reason = "cancelled"
        waiting = next((w for w in list(self._waiting) if w.ticket == ticket), None)
        if waiting is not None:
            row = self._row(waiting, slot=-1)
            row.finish_reason = "cancelled"
            self._drop(waiting, row)

    def _drop(self, waiting: _Waiting, row: Row) -> None:
        self._waiting.remove(waiting)
        row.finished_at = row.admitted_at
        self._report(row)

    def switch(self, ticket: int, arm: str) -> None:
        """Give a row in flight another arm from its next round on, and end its controller."""
        check_arm(arm, self.drafters, RequestError)
        for row in self._rows:
            if row.id == ticket and row.is_prefilled:
                if self._controlled is not None:
                    self._controlled.end(row)
                row.decision = Decision(arm, policy="switched")
                self._seats.switch(row, arm, keeps_others=False)

    def step(self) -> list[RequestUpdate]:
        """Admit requests, prefill a piece, run one round; return the update of each request."""
        with torch.inference_mode():
            try:
                self._end_rows()  # cancelled since the last step
                self._admit()
                for row in self._prefill.step(self._rows):
                    self._choose_drafter(row)
                self._seats.prepare()
                running = [r for r in self._rows if r.in_use.is_prepared and not r.finish_reason]
                if running:
                    self._round(running)
                self._end_rows()
            except BaseException as error:
                self._fail(error)
                raise
        return self.take_updates()

    def take_updates(self) -> list[RequestUpdate]:
        """Return the updates that no step has returned yet."""
        updates, self._ended = self._ended, []
        for row in self._rows:
            new = row.tokens[row.num_prompt + row.num_reported :]
            if new:
                row.num_reported += len(new)
                updates.append(RequestUpdate(row.id, new))
        return updates

    def _fail(self, error: BaseException) -> None:
        for row in self._rows:
            if row.finish_reason is None:
                row.fail("the engine stopped", error)
        if not self._rows and self._waiting:
            row = self._row(self._waiting[0], slot=-1)
            row.fail("the engine stopped", error)
            self._drop(self._waiting[0], row)
        self._end_rows()

    def _round(self, rows: list[Row]) -> None:
        starts = {} if self._controlled is None else self._controlled.before_round(rows)
        rows = [row for row in rows if row.finish_reason is None]
        if rows:
            run_round(rows, self.target, self._detokenizer, self._budget)
        if starts and self._controlled is not None:
            self._controlled.after_round(rows, starts)

    def check(self, request: Request, is_read: bool = False) -> Request:
        """Return the checked request. Raises RequestError if it cannot be served.

        A request that this engine has checked before is returned unchanged. is_read: whether the
        request is known to fit the schema.
        """
        if getattr(request, "checked_by", None) is self._check_mark:
            return request
        request = request if is_read else read_request(request)
        check_request(request, self.target, self.drafters, self._max_positions)
        if request.drafter == AUTO and self.choose is None:
            raise RequestError(
                "drafter 'auto' needs a choice and none was loaded; name a drafter: "
                f"{', '.join(self.drafters)}"
            )
        object.__setattr__(request, "checked_by", self._check_mark)
        return request

    # --- admission --------------------------------------------------------------------------------

    def _row(self, waiting: _Waiting, slot: int) -> Row:
        request, now = waiting.request, perf_counter()
        return Row(
            id=waiting.ticket,
            request=request,
            slot=slot,
            max_total=max_total(request, self.target),
            admitted_at=now,
            tokens=list(request.prompt_tokens),
            drafter=self.drafters[NONE],
            seconds=Seconds(queue=now - waiting.since),
            start=self.target.start_of(request.prompt_tokens),
        )

    def _admit(self) -> None:
        admitted = False
        while self._waiting and len(self._rows) < self._max_rows:
            waiting = self._waiting[0]
            if not self._fits(waiting.request):
                break
            if not admitted and self.target.has_changed():
                self._take_new_weights()
            row = self._row(waiting, self.target.acquire())
            self._rows.append(row)
            self._waiting.popleft()
            admitted = True
            self._prefill.load_prefix(row)
        if admitted:
            # rows next to each other in the cache share attention calls
            self._rows.sort(key=lambda row: row.slot)

    def _fits(self, request: Request) -> bool:
        requests = [request, *(row.request for row in self._rows)]
        return fits(requests, self.target, self.drafters, self._max_positions)

    def _take_new_weights(self) -> None:
        """Reload the target's weights after they changed in place, and fail the rows in flight.

        Raises ModelError if the target must be loaded again.
        """
        for row in self._rows:
            if row.finish_reason is None:
                row.fail("the target's weights changed while it was decoded; send it again")
        self._end_rows()
        self.prefixes.clear()
        self.target.reload()

    # --- the choice of a drafter ------------------------------------------------------------------

    def _choose_drafter(self, row: Row) -> None:
        began = perf_counter()
        # a policy may be the user's own code
        with contained(lambda error: row.fail("policy", error)):
            decision = self._decide(row)
            check_arm(decision.arm, self.drafters, ArtefactError)
        row.seconds.choose += perf_counter() - began
        if row.finish_reason is None:  # so there is a decision
            self._seats.assign(row, decision)

    def _decide(self, row: Row) -> Decision:
        if row.request.drafter != AUTO or self.choose is None:
            return Decision(arm=row.request.drafter)
        others = count_drafters(other for other in self._rows if other is not row)
        row.context = row.make_context(self._num_together(), others, self._detokenizer)
        decision = self._seats.check(self.choose(row.context))
        if self._controlled is not None:
            decision = self._seats.check(self._controlled.begin(row, row.context, decision))
        return decision

    def _num_together(self) -> int:
        """Return the number of rows that will decode together: those in flight and those that the next
        step admits.
        """
        num_rows = sum(row.finish_reason is None for row in self._rows)
        if self._waiting and self._fits(self._waiting[0].request):
            num_rows = min(num_rows + len(self._waiting), self._max_rows)
        return num_rows

    # --- the end ----------------------------------------------------------------------------------

    def _end_rows(self) -> None:
        """Release the rows that have ended, and report each one.

        Raises the first exception of a release, after all of them are reported.
        """
        failure: BaseException | None = None
        for row in [row for row in self._rows if row.finish_reason is not None]:
            self._rows.remove(row)
            row.finished_at = perf_counter()
            try:
                self.target.release(row.slot, damaged=row.error is not None)
                if self._controlled is not None:
                    self._controlled.end(row)
                self._seats.finish_all(row)
            except BaseException as error:  # noqa: BLE001 - raised below
                row.fail("the engine stopped", error)
                failure = failure or error
            self._report(row)
        if failure is not None:
            raise failure

    def _report(self, row: Row) -> None:
        text = ""
        with contained(lambda error: row.fail("tokenizer", error)):
            text = final_text(row.output, row.request, self._detokenizer)
        completion = row.completion(text, self.target.weights)
        new = row.output[row.num_reported :]
        self._ended.append(RequestUpdate(row.id, new, completion, row.cause))
        if self.on_complete is not None:
            with contained(lambda error: self._completion_failures.warn(row.request, error)):
                self.on_complete(row.request, completion, row.context)
