"""The life of requests: submit, admit, prefill, choose, rounds, completion.

Rows join and leave between rounds, long prompts are prefilled in pieces between them, and a row that
fails or is cancelled leaves the others as they are.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.contracts import AUTO, NONE, Completion, Context, Decision, Request, split_arm
from paceline.engine.checks import check_arm, check_request, max_total
from paceline.engine.prefixes import BLOCK, PrefixStore
from paceline.engine.rows import Row
from paceline.engine.step import Draft, judge, run_round
from paceline.engine.stops import append_until_stop, final_text
from paceline.engine.watching import WATCH, Watcher, overlap
from paceline.errors import (
    ArtefactError,
    ConfigError,
    DecodingError,
    QueueFullError,
    RequestError,
)
from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from paceline.drafting.base import Drafter
    from paceline.engine.stops import Decode
    from paceline.engine.watching import Watch
    from paceline.models.language_model import LanguageModel

    Choose = Callable[[Context], Decision]
    OnComplete = Callable[[Request, Completion, Context | None], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step brought one request: tokens that are now final, and at the end its completion."""

    ticket: int
    new_tokens: list[int]
    completion: Completion | None = None


class Engine:
    """Decodes requests with one target; every row may have its own drafter.

    `choose` is asked once a request with drafter "auto", after the target's prefill; `watch`, where
    there is one, may change its decision and the arm after every round. `decode` turns token ids
    into text, for stop strings and completions. Not thread-safe: one thread submits, steps and
    cancels.
    """

    def __init__(
        self,
        target: LanguageModel,
        drafters: Mapping[str, Drafter],
        decode: Decode,
        choose: Choose | None = None,
        max_rows: int = 8,
        prefill_chunk: int = 512,
        max_waiting: int | None = None,
        max_positions: int | None = None,
        prefix_positions: int = 0,
        max_drafter_mb: float | None = None,
        on_complete: OnComplete | None = None,
        watch: Watch | None = None,
    ) -> None:
        """max_rows: requests in flight. prefill_chunk: prompt tokens a step. max_waiting: requests
        that may wait. max_positions: bound on rows x longest row, what the target's cache holds.
        prefix_positions: bound on shared prompt beginnings. max_drafter_mb: bound on what the
        drafters' rows need, beyond which a row is given no drafter. on_complete: told of every
        request that has ended, with what the policy saw of it if it was asked; must not raise.
        """
        if target.exact and prefill_chunk < BLOCK:
            raise ConfigError(f"exact mode needs prefill_chunk at {BLOCK} or more: {prefill_chunk}")
        self.target = target
        self.drafters = dict(drafters)
        self.choose = choose
        self.on_complete = on_complete
        self.prefixes = PrefixStore(prefix_positions)
        self._decode = decode
        self._max_rows = max_rows
        self._chunk = prefill_chunk
        self._max_waiting = max_waiting
        self._max_positions = max_positions
        self._max_drafter_mb = max_drafter_mb
        self._watcher = (
            None
            if watch is None
            else Watcher(watch, self.drafters, prefill_chunk, self._has_memory)
        )
        self._tickets = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[Row] = []
        self._done: list[Progress] = []  # ended since the last step reported

    # --- one request after the other --------------------------------------------------------------

    def generate(
        self, requests: Iterable[Request], return_errors: bool = False
    ) -> Iterator[Completion]:
        """Completions as they finish. All requests are checked before the first is begun.

        Raises DecodingError at the first request that fails on the way, unless `return_errors`: then
        its completion says so. Drives the engine alone: do not step it meanwhile.
        """
        left = deque(requests)
        for request in left:
            self.check(request)
        mine: set[int] = set()
        try:
            while left or mine:
                while left and not self.is_full:
                    mine.add(self.submit(left.popleft()))
                for progress in self.step():
                    completion = progress.completion
                    if completion is None or progress.ticket not in mine:
                        continue
                    mine.remove(progress.ticket)
                    if completion.error is not None and not return_errors:
                        raise DecodingError(f"request {completion.request_id}: {completion.error}")
                    yield completion
        finally:
            for ticket in mine:
                self.cancel(ticket)
            if mine:
                self._end_rows()

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

    def submit(self, request: Request) -> int:
        """Queue a request; the ticket names it from here on.

        Raises RequestError if it cannot be served, QueueFullError if too many wait already. Weights of
        the target that changed in place are taken anew first; rows in flight, which began with the old
        ones, fail. Raises ModelError if the target must be loaded again.
        """
        self.check(request)
        if self.is_full:
            raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later")
        if self.target.has_changed():
            self._take_new_weights()
        ticket = next(self._tickets)
        self._waiting.append((ticket, request))
        return ticket

    def _take_new_weights(self) -> None:
        for row in self._rows:
            if row.finish_reason is None:
                row.fail("the target's weights changed while it was decoded; send it again")
        with torch.inference_mode():
            self._end_rows()
        self.prefixes.clear()
        self.target.reload()

    def cancel(self, ticket: int) -> None:
        """End a request with what it has so far; its row is free before the next round."""
        for row in self._rows:
            if row.id == ticket and row.finish_reason is None:
                row.finish_reason = "cancelled"
        for place, (waiting, request) in enumerate(self._waiting):
            if waiting == ticket:
                del self._waiting[place]
                row = self._row(ticket, request, slot=-1)
                row.finished_at = row.admitted_at
                row.finish_reason = "cancelled"
                self._report(row)
                break

    def switch(self, ticket: int, arm: str) -> None:
        """Give a row in flight another arm from its next round on, whatever a watch would have."""
        check_arm(arm, self.drafters, RequestError)
        for row in self._rows:
            if row.id == ticket and row.is_prefilled:
                if self._watcher is not None:
                    self._watcher.end(row)
                row.decision = Decision(arm, policy="switched")
                self._switch(row, arm)

    def step(self) -> list[Progress]:
        """Admit what fits, prefill a piece, run one round; what this brought, request by request."""
        with torch.inference_mode():
            try:
                self._end_rows()  # cancelled since the last step
                self._admit()
                self._prefill_step()
                self._prepare_drafters()
                running = [r for r in self._rows if r.prepared and r.finish_reason is None]
                if running:
                    self._round(running)
            except BaseException:
                # what is broken here is not one row's fault: give everything back
                for row in self._rows:
                    row.fail("the engine stopped")
                self._end_rows()
                raise
            self._end_rows()
        progress, self._done = self._done, []
        for row in self._rows:
            new = row.tokens[row.num_prompt + row.num_reported :]
            if new:
                row.num_reported += len(new)
                progress.append(Progress(row.id, new))
        return progress

    def _round(self, rows: list[Row]) -> None:
        """One round, with a watch's eyes on the rows that have one."""
        watcher = self._watcher
        marks = {} if watcher is None else watcher.before_round(rows)
        rows = [row for row in rows if row.finish_reason is None]
        if rows:
            run_round(rows, self.target, self._decode)
        for row in rows if marks else ():
            if row.id not in marks or row.error is not None:
                continue
            assert watcher is not None
            try:
                # of the last round, too: what it cost counts for the requests that follow
                arm = watcher.after_round(row, marks[row.id], len(rows))
                if arm is not None:
                    check_arm(arm, self.drafters, ArtefactError)
            except Exception as error:  # noqa: BLE001 - as a policy, it may come from anywhere
                if row.finish_reason is None:
                    row.fail(WATCH, error)
                continue
            if row.finish_reason is not None or arm is None or arm == row.arm:
                continue
            if self.drafters[split_arm(arm)[0]] not in row.barred:
                self._switch(row, arm)

    def check(self, request: Request) -> None:
        """Raise RequestError if the request cannot be served."""
        check_request(request, self.target, self.drafters, self._max_positions)
        if request.drafter == AUTO and self.choose is None:
            raise RequestError(
                "drafter 'auto' needs a policy and none is loaded; run `paceline learn`, or "
                f"name a drafter: {', '.join(self.drafters)}"
            )

    # --- admission and prefill --------------------------------------------------------------------

    def _row(self, ticket: int, request: Request, slot: int) -> Row:
        return Row(
            id=ticket,
            request=request,
            slot=slot,
            max_total=max_total(request, self.target.context_length),
            admitted_at=perf_counter(),
            tokens=list(request.prompt_tokens),
            drafter=self.drafters[NONE],
        )

    def _admit(self) -> None:
        """Rows for waiting requests, first come first served, as far as rows and cache reach."""
        admitted = False
        while self._waiting and len(self._rows) < self._max_rows:
            ticket, request = self._waiting[0]
            longest = max(
                [
                    max_total(request, self.target.context_length),
                    *(row.max_total for row in self._rows),
                ]
            )
            if (
                self._max_positions is not None
                and (len(self._rows) + 1) * longest > self._max_positions
            ):
                break
            self._waiting.popleft()
            row = self._row(ticket, request, self.target.acquire())
            self._rows.append(row)
            admitted = True
            row.block_sums = self.prefixes.load(request.prompt_tokens, self.target.cache, row.slot)
            if row.block_sums:
                row.num_prefilled = len(row.block_sums) * BLOCK
                row.hidden_sum = row.block_sums[-1]
        if admitted:
            # neighbours in the cache stand side by side, so that they share attention calls
            self._rows.sort(key=lambda row: row.slot)

    def _prefill_step(self) -> None:
        """One forward over pieces of prompts; rows whose prompt ends here get their first token."""
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
        append_until_stop(row, [token], self._decode)

    # --- drafters ---------------------------------------------------------------------------------

    def _assign_drafter(self, row: Row) -> None:
        began = perf_counter()
        try:
            decision = self._decide(row)
            check_arm(decision.arm, self.drafters, ArtefactError)
        except Exception as error:  # noqa: BLE001 - a policy may come from anywhere, too
            row.fail("policy", error)
            return
        finally:
            row.seconds.choose += perf_counter() - began
        self._start_drafter(row, decision)

    def _start_drafter(self, row: Row, decision: Decision) -> None:
        row.decision = decision
        if not self._make_room(row, self.drafters[decision.drafter]):
            row.decision = Decision(NONE, policy=f"no memory for {decision.arm}")
        self._use(row, row.decision.arm)

    def _use(self, row: Row, arm: str) -> None:
        """From the next round on; a drafter that is started already goes on from where it was."""
        row.arm, row.drafter = arm, self.drafters[split_arm(arm)[0]]
        if row.drafter in row.kept:
            row.prepared = row.kept.pop(row.drafter)
            return
        row.prepared = False
        self._guarded(row, lambda: row.drafter.start([row]))

    def _switch(self, row: Row, arm: str) -> None:
        """Another arm for a row in flight; the drafter it leaves stays started while it may."""
        wanted, left = self.drafters[split_arm(arm)[0]], row.drafter
        row.switches.append((len(row.tokens) - row.num_prompt, arm))
        if wanted is left:
            row.arm = arm
            return
        row.drafter = self.drafters[NONE]
        if left is not row.drafter:
            row.kept[left] = row.prepared
        watched = self._watcher is not None and self._watcher.watches(row)
        for drafter in list(row.kept):
            if drafter is not wanted and (not watched or overlap(drafter, wanted)):
                self._let_go(row, drafter)
        if wanted not in row.kept and not self._make_room(row, wanted):
            row.switches[-1] = (row.switches[-1][0], NONE)
            arm = NONE
        self._use(row, arm)

    def _let_go(self, row: Row, drafter: Drafter) -> None:
        """Give back what a drafter beside the one in use holds of the row."""
        row.kept.pop(drafter, None)
        self._guarded(row, lambda: drafter.finish([row]), drafter.name)

    def _make_room(self, row: Row, wanted: Drafter) -> bool:
        """Whether the row may start the drafter; drafters beside those in use are let go for it."""
        for other in (row, *self._rows):
            if self._has_memory(row, wanted):
                return True
            for drafter in list(other.kept):
                self._let_go(other, drafter)
        return self._has_memory(row, wanted)

    def _has_memory(self, row: Row, wanted: Drafter) -> bool:
        """Whether the drafters' rows would stay within their bound with this one for the row, too."""
        if self._max_drafter_mb is None or wanted.name == NONE:
            return True
        lengths: dict[Drafter, list[int]] = {}
        for other in self._rows:
            mine = {other.drafter, *other.kept} | ({wanted} if other is row else set())
            for drafter in mine:
                for holder in drafter.holders():
                    lengths.setdefault(holder, []).append(other.max_total)
        needed = sum(drafter.state_bytes(of_rows) for drafter, of_rows in lengths.items())
        return needed <= self._max_drafter_mb * 1e6

    def _prepare_drafters(self) -> None:
        """A piece of each waiting drafter's own prefill."""
        for row in self._rows:
            if row.is_prefilled and not row.prepared and row.finish_reason is None:
                self._guarded(row, lambda row=row: self._prepare(row))  # type: ignore[misc]

    def _prepare(self, row: Row) -> None:
        row.prepared = row.drafter.prepare(row, self._chunk)

    def _guarded(self, row: Row, act: Callable[[], None], name: str | None = None) -> None:
        """Charge a drafter's work to its row, and its failure too; by default the one in use."""
        began = perf_counter()
        try:
            act()
        except Exception as error:  # noqa: BLE001 - a plug-in must not stop other rows
            row.fail(f"drafter '{name or row.drafter.name}'", error)
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
            text=lambda: self._decode(row.request.prompt_tokens),
            max_new_tokens=row.request.max_new_tokens,
        )
        decision = self.choose(context)
        if self._watcher is not None:
            decision = self._watcher.begin(row, context, decision)
        return decision

    # --- the end ----------------------------------------------------------------------------------

    def _end_rows(self) -> None:
        """Give back the rows that have ended, and keep what is to be reported of them."""
        ended = [row for row in self._rows if row.finish_reason is not None]
        self._rows = [row for row in self._rows if row.finish_reason is None]
        for row in ended:
            row.finished_at = perf_counter()
            self.target.release(row.slot, damaged=row.error is not None)
            if self._watcher is not None:
                self._watcher.end(row)
            for drafter in (row.drafter, *row.kept):
                try:
                    drafter.finish([row])
                except Exception as error:  # noqa: BLE001 - as in `_guarded`, and no longer timed
                    row.fail(f"drafter '{drafter.name}'", error)
            self._report(row)

    def _report(self, row: Row) -> None:
        completion = self._complete(row)
        self._done.append(Progress(row.id, row.output[row.num_reported :], completion))
        if self.on_complete is not None:
            self.on_complete(row.request, completion, row.context)

    def _complete(self, row: Row) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            request_id=row.request.id,
            token_ids=row.output,
            text=final_text(row, self._decode),
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
