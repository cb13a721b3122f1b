"""The life of requests: submit, admit, prefill, choose, rounds, completion.

Rows join and leave between rounds, long prompts are prefilled in pieces between them, and a row that
fails or is cancelled leaves the others as they are.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from paceline.contracts import (
    AUTO,
    NONE,
    Completion,
    Context,
    Decision,
    Request,
    Seconds,
    split_arm,
)
from paceline.drafting.contract import Draft, prepare_piece
from paceline.engine.checks import check_arm, check_request, max_total, num_positions
from paceline.engine.containment import DisabledDrafters, asking, contained, warn
from paceline.engine.controlled_rows import CONTROLLER, ControlledRows
from paceline.engine.decisions import check_decision
from paceline.engine.endings import append_until_stop, final_text
from paceline.engine.memory import DrafterMemory
from paceline.engine.prefixes import PrefixStore
from paceline.engine.rows import Row
from paceline.engine.step import judge, run_round
from paceline.errors import (
    ArtefactError,
    ConfigError,
    QueueFullError,
    RequestError,
    describe,
)
from paceline.models.detokenizer import Detokenizer
from paceline.models.packing import PREFILL_BLOCK as BLOCK
from paceline.models.packing import Span
from paceline.requests import read_request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.drafting.base import Drafter
    from paceline.engine.controlled_rows import ArmController
    from paceline.models.language_model import LanguageModel

    Choose = Callable[[Context], Decision]
    OnComplete = Callable[[Request, Completion, Context | None], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """The result of a step for one request: tokens that are now final, and at its end the completion."""

    ticket: int
    new_tokens: list[int]
    completion: Completion | None = None
    cause: BaseException | None = None  # the exception behind the completion's error


class _Waiting(NamedTuple):
    ticket: int
    request: Request
    since: float  # perf_counter when it was submitted


class Engine:
    """Decodes requests with one target; every row may have its own drafter.

    `choose` is called once per request with drafter "auto", after the target's prefill; `controller`, if
    given, may change its decision, and the arm after every round. `decode` turns token ids
    into text, for stop strings and completions. Not thread-safe: one thread submits, steps and
    cancels.
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
    ) -> None:
        """max_rows: requests in flight. prefill_chunk: prompt tokens per step. max_waiting: requests
        that may wait. max_positions: bound on rows x longest row, what the target's cache holds.
        prefix_positions: bound on shared prompt beginnings. max_drafter_mb: bound on what the
        drafters' rows need, beyond which a row gets no drafter. on_complete: called with every
        request that has ended, its completion, and the policy's context if a policy chose; the
        first exception it raises becomes a warning, the rest are ignored.
        """
        if target.exact and prefill_chunk < BLOCK:
            raise ConfigError(f"exact mode needs prefill_chunk at {BLOCK} or more: {prefill_chunk}")
        self.target = target
        self.drafters = dict(drafters)
        target.cache.bound(max_positions)
        for drafter in self.drafters.values():
            drafter.bound_cache(max_positions, exact_fit=max_drafter_mb is not None)
        self.choose = choose
        self.why_no_policy = "none is loaded; give `load` one"
        self.on_complete = on_complete
        self.prefixes = PrefixStore(prefix_positions)
        self._words = Detokenizer.wrap(decode)
        self._max_rows = max_rows
        self._chunk = prefill_chunk
        self._max_waiting = max_waiting
        self._max_positions = max_positions
        self._memory = DrafterMemory(self.drafters, max_drafter_mb)
        self._disabled = DisabledDrafters()
        self._controlled = (
            None
            if controller is None
            else ControlledRows(
                controller,
                self.drafters,
                prefill_chunk,
                self._memory,
                self._has_memory,
                self._disabled,
            )
        )
        self._failed_to_report = False
        self._door = object()  # marks the requests that were checked here
        self._tickets = itertools.count()
        self._waiting: deque[_Waiting] = deque()
        self._rows: list[Row] = []
        self._done: list[Progress] = []  # ended since the last step reported

    # --- step by step -----------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether another request would be refused for now."""
        return self._max_waiting is not None and len(self._waiting) >= self._max_waiting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to step or to report."""
        return bool(self._rows or self._waiting or self._done)

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
        """End a request with what it has so far; its row is free before the next round."""
        for row in self._rows:
            if row.id == ticket and row.finish_reason is None:
                row.finish_reason = "cancelled"
        waiting = next((one for one in list(self._waiting) if one.ticket == ticket), None)
        if waiting is not None:
            row = self._row(waiting, slot=-1)
            row.finish_reason = "cancelled"
            self._drop(waiting, row)

    def _drop(self, waiting: _Waiting, row: Row) -> None:
        """Report a request that ended before it was admitted."""
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
                self._switch(row, arm)

    def step(self) -> list[Progress]:
        """Admit what fits, prefill a piece, run one round; return the progress of each request."""
        with torch.inference_mode():
            try:
                self._end_rows()  # cancelled since the last step
                self._admit()
                self._prefill_step()
                self._prepare_drafters()
                running = [r for r in self._rows if r.prepared and r.finish_reason is None]
                if running:
                    self._round(running)
                self._end_rows()
            except BaseException as error:
                self._fail(error)
                raise
        return self.take_progress()

    def take_progress(self) -> list[Progress]:
        """Return the progress that no step has returned yet."""
        progress, self._done = self._done, []
        for row in self._rows:
            new = row.tokens[row.num_prompt + row.num_reported :]
            if new:
                row.num_reported += len(new)
                progress.append(Progress(row.id, new))
        return progress

    def _fail(self, error: BaseException) -> None:
        """End what a failed step may have broken: all rows, or the request that it could not admit."""
        for row in self._rows:
            if row.finish_reason is None:
                row.fail("the engine stopped", error)
        if not self._rows and self._waiting:
            row = self._row(self._waiting[0], slot=-1)
            row.fail("the engine stopped", error)
            self._drop(self._waiting[0], row)
        self._end_rows()

    def _round(self, rows: list[Row]) -> None:
        """Run one round, and report each controlled row's round to the controller."""
        controlled = self._controlled
        marks = {} if controlled is None else controlled.before_round(rows)
        rows = [row for row in rows if row.finish_reason is None]
        if rows:
            run_round(rows, self.target, self._words)
        for row in rows if marks else ():
            if row.id not in marks or row.error is not None:
                continue
            assert controlled is not None
            arm = None
            # a controller may be anybody's code
            with contained(lambda error, row=row: self._controller_failed(row, error)):  # type: ignore[misc]
                # also after the last round: its costs count for later requests
                arm = controlled.after_round(row, marks[row.id], len(rows))
                if arm is not None:
                    check_arm(arm, self.drafters, ArtefactError)
            if row.finish_reason is not None or arm is None or arm == row.arm:
                continue
            name = split_arm(arm)[0]
            if name not in row.barred and name not in self._disabled:
                self._switch(row, arm)

    @staticmethod
    def _controller_failed(row: Row, error: BaseException) -> None:
        if row.finish_reason is None:
            row.fail(CONTROLLER, error)

    def check(self, request: Request) -> Request:
        """Return the request as the schema reads it. Raises RequestError if it cannot be served.

        A request that this engine has checked before is returned unchanged.
        """
        if getattr(request, "checked_by", None) is self._door:
            return request
        return self.accept(read_request(request))

    def accept(self, request: Request) -> Request:
        """Check a request that is known to fit the schema, and mark it as checked."""
        check_request(
            request, self.target, self.drafters, self._max_positions, self._controlled is not None
        )
        if request.drafter == AUTO and self.choose is None:
            raise RequestError(
                f"drafter 'auto' needs a policy: {self.why_no_policy}, or name a drafter: "
                f"{', '.join(self.drafters)}"
            )
        object.__setattr__(request, "checked_by", self._door)
        return request

    # --- admission and prefill --------------------------------------------------------------------

    def _row(self, waiting: _Waiting, slot: int) -> Row:
        request, now = waiting.request, perf_counter()
        return Row(
            id=waiting.ticket,
            request=request,
            slot=slot,
            max_total=max_total(request, self.target.context_length),
            admitted_at=now,
            tokens=list(request.prompt_tokens),
            drafter=self.drafters[NONE],
            seconds=Seconds(queue=now - waiting.since),
        )

    def _admit(self) -> None:
        """Make rows of waiting requests, in order of submission, while rows and cache have room."""
        admitted = False
        while self._waiting and len(self._rows) < self._max_rows:
            waiting = self._waiting[0]
            request = waiting.request
            if not self._fits(request):
                break
            if not admitted and self.target.has_changed():
                self._take_new_weights()
            row = self._row(waiting, self.target.acquire())
            self._rows.append(row)
            self._waiting.popleft()
            admitted = True
            row.block_sums = self.prefixes.load(request.prompt_tokens, self.target.cache, row.slot)
            if row.block_sums:
                row.num_prefilled = len(row.block_sums) * BLOCK
                row.hidden_sum = row.block_sums[-1]
        if admitted:
            # neighbours in the cache stand side by side, so that they share attention calls
            self._rows.sort(key=lambda row: row.slot)

    def _fits(self, request: Request) -> bool:
        """Return whether the target's cache has room for another row, with all rows at their longest."""
        if self._max_positions is None or not self._rows:
            return True  # `check_request` has compared one row alone with the bound
        requests = [request, *(row.request for row in self._rows)]
        longest = max(
            num_positions(
                one, self.target.context_length, self.drafters, self._controlled is not None
            )
            for one in requests
        )
        cache = self.target.cache
        return cache.num_slots_with_one_more * cache.rounded(longest) <= self._max_positions

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

    def _prefill_step(self) -> None:
        """Run one forward over pieces of prompts; rows whose prompt ends here get their first token."""
        pieces: list[tuple[Row, int, int]] = []
        room = self._chunk
        for row in sorted(self._rows, key=lambda row: row.id):
            if room and not row.is_prefilled and row.finish_reason is None:
                stop = min(row.num_prompt, row.num_prefilled + room)
                if self.target.exact and stop < row.num_prompt:
                    stop = max(row.num_prefilled, stop // BLOCK * BLOCK)
                if stop > row.num_prefilled:
                    pieces.append((row, row.num_prefilled, stop))
                room -= stop - row.num_prefilled
        if not pieces:
            return
        began = perf_counter()
        pieces.sort(key=lambda piece: piece[0].slot)
        tokens = [t for row, start, stop in pieces for t in row.tokens[start:stop]]
        spans = [Span(row.slot, start, stop - start, prefill=True) for row, start, stop in pieces]
        hidden = self.target.forward(torch.tensor(tokens), spans)
        ending = []
        for (row, _, stop), part in zip(
            pieces, torch.split(hidden, [span.width for span in spans]), strict=True
        ):
            _add_hidden(row, part)
            row.num_prefilled = stop
            if row.is_prefilled:
                row.hidden = part[-1].clone()  # a view would keep the whole piece alive
                row.hidden_last = part[-1].float().cpu().numpy()
                ending.append(row)
        if ending:
            last = torch.stack([row.hidden for row in ending if row.hidden is not None])
            logits = self.target.unembed(last)
            verdicts = judge(ending, [Draft([]) for _ in ending], logits)
            for i, (row, verdict) in enumerate(zip(ending, verdicts, strict=True)):
                self._first_token(row, verdict.next_token, logits[i])
        spent = perf_counter() - began
        for row, start, stop in pieces:
            row.seconds.prefill += spent * (stop - start) / len(tokens)
        for row in ending:
            if row.finish_reason is None:
                self._assign_drafter(row)

    def _first_token(self, row: Row, token: int, logits: torch.Tensor) -> None:
        if row.finish_reason is not None:
            return
        self.prefixes.keep(row.request.prompt_tokens, self.target.cache, row.slot, row.block_sums)
        if row.request.logprobs:
            row.logprobs.append(float(logits.float().log_softmax(dim=-1)[token]))
        append_until_stop(row, [token], self._words)

    # --- drafters ---------------------------------------------------------------------------------

    def _assign_drafter(self, row: Row) -> None:
        began = perf_counter()
        # a policy may be anybody's code
        with contained(lambda error: row.fail("policy", error)):
            decision = self._decide(row)
            check_arm(decision.arm, self.drafters, ArtefactError)
        row.seconds.choose += perf_counter() - began
        if row.finish_reason is None:  # so there is a decision
            self._start_drafter(row, decision)

    def _start_drafter(self, row: Row, decision: Decision) -> None:
        row.decision = decision
        with asking(row, decision.drafter):
            if not self._make_room(row, decision.drafter):
                row.decision = Decision(NONE, policy=f"no memory for {decision.arm}")
        if row.finish_reason is None:
            self._use(row, row.decision.arm)

    def _use(self, row: Row, arm: str) -> None:
        """Set the arm for the next round; a drafter that was kept continues where it stopped."""
        name = split_arm(arm)[0]
        row.arm, row.drafter, row.num_draft_tokens = arm, self.drafters[name], 0
        if name in row.kept:
            row.prepared = row.kept.pop(name)
            return
        row.prepared = False
        row.pieces[name] = 0
        self._guarded(row, lambda: self._start(row))

    def _start(self, row: Row) -> None:
        self._memory.holders(row.drafter_name)
        row.drafter.start([row])

    def _switch(self, row: Row, arm: str) -> None:
        """Change the arm of a row in flight; the drafter it leaves stays started if it can."""
        wanted, left = split_arm(arm)[0], row.drafter_name
        row.switches.append((len(row.tokens) - row.num_prompt, arm))
        if wanted == left:
            row.arm = arm
            return
        if left != NONE:
            row.kept[left] = row.prepared
        row.arm, row.drafter = NONE, self.drafters[NONE]
        controlled = self._controlled is not None and self._controlled.controls(row)
        with asking(row, wanted):
            for name in list(row.kept):
                if name != wanted and (not controlled or self._memory.overlap(name, wanted)):
                    self._let_go(row, name)
            if wanted not in row.kept and not self._make_room(row, wanted):
                row.switches[-1] = (row.switches[-1][0], NONE)
                arm = NONE
        if row.finish_reason is None:
            self._use(row, arm)

    def _let_go(self, row: Row, name: str) -> None:
        """Finish a kept drafter for the row; if it fails, the row goes on, since it is not in use."""
        row.kept.pop(name, None)
        began = perf_counter()
        with asking(row, name, row.note_failure):
            self.drafters[name].finish([row])
        row.seconds.draft += perf_counter() - began

    def _make_room(self, row: Row, wanted: str) -> bool:
        """Return whether the row may start the drafter, after finishing kept drafters if need be."""
        for other in (row, *self._rows):
            if self._has_memory(row, wanted):
                return True
            for name in list(other.kept):
                self._let_go(other, name)
        return self._has_memory(row, wanted)

    def _has_memory(self, row: Row, wanted: str) -> bool:
        return self._memory.has_room(row, wanted, self._rows)

    def _prepare_drafters(self) -> None:
        """Prepare one piece of each unprepared drafter's own prefill."""
        for row in self._rows:
            if row.is_prefilled and not row.prepared and row.finish_reason is None:
                self._guarded(row, lambda row=row: self._prepare(row))  # type: ignore[misc]

    def _prepare(self, row: Row) -> None:
        name = row.drafter_name
        row.prepared = prepare_piece(row.drafter, row, self._chunk, row.pieces[name])
        row.pieces[name] += 1

    def _guarded(self, row: Row, act: Callable[[], None]) -> None:
        """Run work of the drafter in use; charge its seconds and its failure to the row."""
        began = perf_counter()
        with asking(row, row.drafter_name):
            act()
        row.seconds.draft += perf_counter() - began

    def _decide(self, row: Row) -> Decision:
        if row.request.drafter != AUTO or self.choose is None:
            return Decision(arm=row.request.drafter)
        assert row.hidden_sum is not None and row.hidden_last is not None
        row.context = context = Context(
            prompt_tokens=row.request.prompt_tokens,
            mean_hidden=row.hidden_sum / np.float32(row.num_prompt),
            last_hidden=row.hidden_last,
            sampling=row.sampling,
            rows_in_flight=len(self._rows),
            request_id=row.request.id,
            text=lambda: self._words.decode(row.request.prompt_tokens),
            max_new_tokens=row.request.max_new_tokens,
        )
        decision = self._usable(self.choose(context))
        if self._controlled is not None:
            decision = self._usable(self._controlled.begin(row, context, decision))
        return decision

    def _usable(self, decision: Decision) -> Decision:
        """Return the checked decision, with the arm `none` if its drafter is set aside."""
        decision = check_decision(decision)
        name = decision.drafter
        if name not in self._disabled:
            return decision
        policy = f"{decision.policy}, set aside: {name}"
        return replace(decision, arm=NONE, propensity=1.0, policy=policy)

    # --- the end ----------------------------------------------------------------------------------

    def _end_rows(self) -> None:
        """Give back the rows that have ended, and keep what is to be reported of them.

        Raises what giving one back has raised, when all of them are reported.
        """
        failure: BaseException | None = None
        for row in [row for row in self._rows if row.finish_reason is not None]:
            self._rows.remove(row)
            row.finished_at = perf_counter()
            try:
                self._give_back(row)
            except BaseException as error:  # noqa: BLE001 - raised below
                row.fail("the engine stopped", error)
                failure = failure or error
            self._report(row)
        if failure is not None:
            raise failure

    def _give_back(self, row: Row) -> None:
        self.target.release(row.slot, damaged=row.error is not None)
        if self._controlled is not None:
            self._controlled.end(row)
        tokens = list(row.tokens)  # whatever becomes of the row's own
        for name in dict.fromkeys((row.drafter_name, *row.kept)):
            in_use = name == row.drafter_name
            tell = partial(row.fail_by if in_use else row.note_failure, name)
            with contained(tell):
                self.drafters[name].finish([row])
        row.tokens = tokens
        self._disabled.learn(row)

    def _report(self, row: Row) -> None:
        text = ""
        with contained(lambda error: row.fail("tokenizer", error)):
            text = final_text(row, self._words)
        completion = self._complete(row, text)
        new = row.output[row.num_reported :]
        self._done.append(Progress(row.id, new, completion, row.cause))
        if self.on_complete is not None:
            with contained(lambda error: self._not_told(row.request, error)):
                self.on_complete(row.request, completion, row.context)

    def _not_told(self, request: Request, error: BaseException) -> None:
        """Warn once that `on_complete` fails. Requests go on."""
        if not self._failed_to_report:
            self._failed_to_report = True
            warn(
                f"on_complete failed for request '{request.id}' ({describe(error)}), so its record of "
                "completed requests is incomplete; requests go on, and later failures are not reported"
            )

    @staticmethod
    def _complete(row: Row, text: str) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            request_id=row.request.id,
            token_ids=row.output,
            text=text,
            finish_reason=row.finish_reason,
            drafter=row.decision.drafter,
            decision=row.decision,
            rounds=row.rounds,
            seconds=row.seconds,
            seconds_total=row.finished_at - row.admitted_at,
            num_prompt_tokens=row.num_prompt,
            seed=row.sampling.seed,
            error=row.error,
            logprobs=row.logprobs if row.request.logprobs else None,
            switches=row.switches,
        )


def _add_hidden(row: Row, hidden: torch.Tensor) -> None:
    """Sum a prefilled piece's hidden states [w, D], block by block, so that sharing changes no bit."""
    at = row.num_prefilled
    while len(hidden):
        width = min(len(hidden), BLOCK - at % BLOCK)
        total = hidden[:width].float().sum(dim=0).cpu().numpy()
        row.hidden_sum = total if row.hidden_sum is None else row.hidden_sum + total
        at += width
        if at % BLOCK == 0:
            row.block_sums.append(row.hidden_sum)
        hidden = hidden[width:]
