"""The life of requests: admit, prefill, choose, rounds, completion.

Rows join and leave between rounds.
"""

from __future__ import annotations

import itertools
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.contracts import AUTO, NONE, Completion, Context, Decision, Request
from paceline.engine.rows import Row
from paceline.engine.step import Round, judge, run_round
from paceline.engine.stops import append_until_stop, final_text
from paceline.errors import ArtefactError, RequestError
from paceline.models.packing import Span
from paceline.warping import check_sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from paceline.drafting.base import Drafter
    from paceline.engine.stops import Decode
    from paceline.models.language_model import LanguageModel

    Choose = Callable[[Context], Decision]


class Engine:
    """Decodes requests with one target; every row may have its own drafter.

    `choose` is asked once a request with drafter "auto", after the target's prefill. `decode` turns
    token ids into text, for stop strings and completions.
    """

    def __init__(
        self,
        target: LanguageModel,
        drafters: Mapping[str, Drafter],
        decode: Decode,
        choose: Choose | None = None,
        max_rows: int = 8,
        prefill_chunk: int = 512,
    ) -> None:
        self.target = target
        self.drafters = dict(drafters)
        self.choose = choose
        self._decode = decode
        self._max_rows = max_rows
        self._chunk = prefill_chunk
        self._ids = itertools.count()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. All requests are checked before the first is begun."""
        waiting = deque(requests)
        for request in waiting:
            self.check(request)
        rows: list[Row] = []
        try:
            while waiting or rows:
                with torch.inference_mode():
                    self._admit(waiting, rows)
                    running = [row for row in rows if row.finish_reason is None]
                    if running:
                        run_round(running, self.target, self._decode)
                ended = [row for row in rows if row.finish_reason is not None]
                rows = [row for row in rows if row.finish_reason is None]
                for row in ended:
                    row.finished_at = perf_counter()
                    self._release(row)
                for row in ended:
                    yield self._complete(row)
        finally:
            for row in rows:
                self._release(row)

    def check(self, request: Request) -> None:
        """Raise RequestError if the request cannot be served."""
        num_prompt, context = len(request.prompt_tokens), self.target.context_length
        if num_prompt == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if num_prompt > context:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, the target's context holds {context}; "
                "shorten the prompt"
            )
        unknown = [t for t in request.prompt_tokens if not 0 <= t < self.target.num_logits]
        if unknown:
            raise RequestError(
                f"the prompt has the token id {unknown[0]}; the target's ids are 0 to "
                f"{self.target.num_logits - 1}"
            )
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if any(not s for s in request.stop_strings):
            raise RequestError("a stop string is empty")
        check_sampling(request.sampling)
        if request.drafter == AUTO:
            if self.choose is None:
                raise RequestError(
                    "drafter 'auto' needs a policy and none is loaded; run `paceline learn`, or "
                    f"name a drafter: {', '.join(self.drafters)}"
                )
        elif request.drafter not in self.drafters:
            raise RequestError(
                f"unknown drafter '{request.drafter}'; there are: auto, {', '.join(self.drafters)}"
            )

    def _admit(self, waiting: deque[Request], rows: list[Row]) -> None:
        """Fill free rows: prefill, first token, choice of drafter, the drafter's start.

        `rows` grows before any of that, so that an error on the way leaves no slot behind.
        """
        new: list[Row] = []
        while waiting and len(rows) < self._max_rows:
            request = waiting.popleft()
            num_prompt = len(request.prompt_tokens)
            # the last emitted token is never fed, so it needs no position
            room = self.target.context_length + 1 - num_prompt
            row = Row(
                id=next(self._ids),
                request=request,
                slot=self.target.acquire(),
                max_total=num_prompt + min(request.max_new_tokens, room),
                admitted_at=perf_counter(),
                tokens=list(request.prompt_tokens),
                drafter=self.drafters[NONE],
            )
            new.append(row)
            rows.append(row)
        # neighbours in the cache stand side by side, so that they share attention calls
        rows.sort(key=lambda row: row.slot)
        for pieces in _pack(new, self._chunk):
            self._prefill(pieces)
        for row in new:
            if row.finish_reason is None:
                self._assign_drafter(row, len(rows))

    def _prefill(self, pieces: Sequence[tuple[Row, int, int]]) -> None:
        """Run pieces of prompts; rows whose prompt ends here get their first token."""
        began = perf_counter()
        tokens = [t for row, start, stop in pieces for t in row.tokens[start:stop]]
        spans = [Span(row.slot, start, stop - start) for row, start, stop in pieces]
        hidden = self.target.forward(torch.tensor(tokens), spans)
        parts = torch.split(hidden, [span.width for span in spans])
        ending = []
        for (row, start, stop), part in zip(pieces, parts, strict=True):
            total = part.float().sum(dim=0).cpu().numpy()
            row.hidden_sum = total if start == 0 else row.hidden_sum + total
            if stop == row.num_prompt:
                row.hidden_last = part[-1].float().cpu().numpy()
                ending.append((row, part[-1]))
        if ending:
            rows = [row for row, _ in ending]
            logits = self.target.unembed(torch.stack([last for _, last in ending]))
            empty = Round([[] for _ in rows], [None for _ in rows])
            _, first_tokens = judge(rows, empty, logits)
            for row, token in zip(rows, first_tokens, strict=True):
                append_until_stop(row, [token], self._decode)
        spent = perf_counter() - began
        for row, start, stop in pieces:
            row.seconds.prefill += spent * (stop - start) / len(tokens)

    def _assign_drafter(self, row: Row, rows_in_flight: int) -> None:
        began = perf_counter()
        decision = self._decide(row, rows_in_flight)
        if decision.arm not in self.drafters:
            raise ArtefactError(
                f"policy '{decision.policy}' chose the arm '{decision.arm}', which is not loaded; "
                f"there are: {', '.join(self.drafters)}"
            )
        row.decision, row.drafter = decision, self.drafters[decision.arm]
        chosen = perf_counter()
        row.drafter.start([row])
        row.seconds.choose += chosen - began
        row.seconds.draft += perf_counter() - chosen

    def _decide(self, row: Row, rows_in_flight: int) -> Decision:
        if row.request.drafter != AUTO or self.choose is None:
            return Decision(arm=row.request.drafter)
        assert row.hidden_sum is not None and row.hidden_last is not None
        return self.choose(
            Context(
                prompt_tokens=row.request.prompt_tokens,
                mean_hidden=row.hidden_sum / np.float32(row.num_prompt),
                last_hidden=row.hidden_last,
                sampling=row.sampling,
                rows_in_flight=rows_in_flight,
                request_id=row.request.id,
            )
        )

    def _release(self, row: Row) -> None:
        row.drafter.finish([row])
        self.target.release(row.slot)

    def _complete(self, row: Row) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            request_id=row.request.id,
            token_ids=row.output,
            text=final_text(row, self._decode),
            finish_reason=row.finish_reason,
            drafter=row.decision.arm,
            decision=row.decision,
            rounds=row.rounds,
            seconds=row.seconds,
            seconds_total=row.finished_at - row.admitted_at,
            num_prompt_tokens=row.num_prompt,
            seed=row.sampling.seed,
        )


def _pack(rows: Sequence[Row], chunk: int) -> Iterator[list[tuple[Row, int, int]]]:
    """Cut prompts into pieces (row, start, stop) and fill forwards of at most `chunk` tokens."""
    batch: list[tuple[Row, int, int]] = []
    room = chunk
    for row in rows:
        start = 0
        while start < row.num_prompt:
            stop = min(row.num_prompt, start + room)
            batch.append((row, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], chunk
    if batch:
        yield batch
