"""A row: one request in flight, with its tokens, its slot in the target's cache and its counts.

A row has three lengths, which only this module derives from one another. `tokens` are its prompt and
output, whoever reads the prompt. If the target has an encoder, the `num_prompt` tokens are its source,
and the decoder's text is `num_start` tokens of its own and the output. `num_cached` are the positions of
the target's cache that hold the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paceline.contracts import (
    AUTO,
    NONE,
    Completion,
    Context,
    Decision,
    RoundStats,
    Seconds,
    split_arm,
)
from paceline.engine.acceptance import Acceptance
from paceline.engine.endings import StopFinder
from paceline.engine.prefixes import PromptHidden
from paceline.errors import describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import FinishReason, Request, SamplingParams
    from paceline.drafting.base import Drafter
    from paceline.models.detokenizer import Detokenizer


class RequestUpdate(NamedTuple):
    """The result of a step for one request: its new final tokens, and at its end the completion."""

    ticket: int
    new_tokens: list[int]
    completion: Completion | None = None
    cause: BaseException | None = None  # the exception that led to the completion's error


@dataclass(slots=True)
class StartedDrafter:
    """The progress of a drafter's own prefill for one row."""

    is_prepared: bool = False
    num_pieces: int = 0  # calls of `prepare`
    acceptance: Acceptance = field(default_factory=Acceptance)  # of its drafts in this row


@dataclass(slots=True, eq=False)
class Row:
    """One request in flight.

    Its tokens are prompt and output. Between rounds the target's cache holds all of its text but the
    last. `max_total` is the maximum number of tokens, by max_new_tokens and by the context.
    """

    id: int
    request: Request
    slot: int
    max_total: int
    admitted_at: float
    tokens: list[int]
    drafter: Drafter
    arm: str = NONE  # in use; the decision has the chosen one
    num_cached: int = 0  # leading positions of the slot that hold this row
    num_draft_tokens: int = 0  # of its drafter, read in the last round; fewer by the budget
    is_asked: bool = False  # whether its drafter is called in this round
    in_use: StartedDrafter = field(default_factory=StartedDrafter)  # the arm's drafter
    started: dict[str, StartedDrafter] = field(default_factory=dict)  # the one in use and others
    excluded: set[str] = field(default_factory=set)  # drafters that failed or found no memory
    failures: dict[str, str] = field(default_factory=dict)  # drafter -> its first error here
    switches: list[tuple[int, str]] = field(default_factory=list)  # (tokens emitted, arm)
    decision: Decision = field(default_factory=lambda: Decision(arm=NONE))
    context: Context | None = None  # the policy's input, if a policy chose
    rounds: list[RoundStats] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    finish_reason: FinishReason | None = None
    error: str | None = None
    cause: BaseException | None = None  # the exception that led to the error
    finished_at: float = 0.0
    num_reported: int = 0  # output tokens that were reported
    prompt_hidden: PromptHidden = field(default_factory=PromptHidden)
    logprobs: list[float] = field(default_factory=list)
    stop_finder: StopFinder | None = None  # if it has stop strings
    start: Sequence[int] | None = None  # what the target's text begins with, if not the prompt
    num_prompt: int = field(init=False)  # tokens of the prompt
    reads_logits: bool = field(init=False)  # of the target, not its most likely tokens alone

    def __post_init__(self) -> None:
        request = self.request
        self.num_prompt = len(request.prompt_tokens)
        is_greedy = request.sampling.method == "greedy" and request.rules is None
        self.reads_logits = request.logprobs or not is_greedy

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def features(self) -> Tensor | None:
        return self.request.features

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_start(self) -> int:
        """Tokens of the target's text before the output."""
        return self.num_prompt if self.start is None else len(self.start)

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= self.num_start

    @property
    def num_read(self) -> int:
        """Tokens that the next forward reads from caches, a source's included; see `costs.table`."""
        return len(self.tokens) - 1

    def start_of_text(self, first: int, stop: int) -> Sequence[int]:
        """Return the target's tokens at positions first to stop - 1, before the output."""
        return (self.tokens if self.start is None else self.start)[first:stop]

    @property
    def text(self) -> tuple[list[int], int]:
        """The target's text so far, and how many tokens of it come before the output."""
        if self.start is None:
            return self.tokens, self.num_prompt
        return [*self.start, *self.output], len(self.start)

    def positions_of(self, num_tokens: int) -> int:
        """Return the positions of the target's cache that hold all but the last of the row's tokens."""
        return num_tokens - 1 - self.num_prompt + self.num_start

    @property
    def draft_limit(self) -> int:
        """Maximum depth of a draft, since a round emits one token more than it accepts."""
        return self.limit_at(len(self.tokens))

    def limit_at(self, num_tokens: int, any_length: bool = False) -> int:
        """Return `draft_limit` at a number of tokens. any_length: ignore the arm's own limit."""
        # order of the rules for a draft's length: drafting.draft_length
        room = self.max_total - num_tokens - 1
        most = None if any_length else split_arm(self.arm)[1]
        return room if most is None else min(room, most)

    @property
    def drafter_name(self) -> str:
        """Name of the drafter in use in the engine, which may differ from the drafter's own `name`."""
        return split_arm(self.arm)[0]

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """End this row with an error. The first error counts; other rows continue."""
        if self.error is None:
            self.error = reason if error is None else f"{reason}: {describe(error)}"
            self.cause = error
        self.finish_reason = "error"

    def fail_by(self, drafter: str, error: BaseException) -> None:
        """End this row with a drafter's error."""
        self.note_failure(drafter, error)
        self.fail(f"drafter '{drafter}'", error)

    def note_failure(self, drafter: str, error: BaseException) -> None:
        """Record a drafter's failure and exclude the drafter. The row continues."""
        self.excluded.add(drafter)
        self.failures.setdefault(drafter, describe(error))

    def append_until_stop(self, emitted: Sequence[int], detokenizer: Detokenizer) -> int:
        """Append emitted tokens, up to and with the one that ends the answer; return their number."""
        tokens, request = self.tokens, self.request
        before = len(tokens)
        if (
            before + len(emitted) < self.max_total
            and not request.stop_strings
            and request.stop_token_ids.isdisjoint(emitted)
        ):
            tokens += emitted  # none of them ends the answer
            self.num_cached = self.positions_of(len(tokens))
            return len(emitted)
        for token in emitted:
            tokens.append(token)
            if token in request.stop_token_ids or (
                request.stop_strings and self._completes_stop_string(token, detokenizer)
            ):
                self.finish_reason = "stop"
                break
            if len(tokens) >= self.max_total:
                self.finish_reason = "length"
                break
        self.num_cached = self.positions_of(len(tokens))
        return len(tokens) - before

    def _completes_stop_string(self, token: int, detokenizer: Detokenizer) -> bool:
        if self.stop_finder is None:
            self.stop_finder = StopFinder(detokenizer, self.request.stop_strings)
        return self.stop_finder.push(token)

    @property
    def text_state(self) -> tuple[int, list[int], int]:
        """The number of tokens, the last token and the cached positions, for `restore_text`."""
        tokens = self.tokens
        return len(tokens), tokens[-1:], self.num_cached

    def restore_text(self, num_tokens: int, last: list[int], num_cached: int) -> bool:
        """Restore lengths and the last token; return whether a drafter left them unchanged."""
        tokens = self.tokens
        is_moved = self.num_cached != num_cached
        self.num_cached = num_cached
        if len(tokens) == num_tokens and tokens[-1:] == last:
            return not is_moved
        del tokens[num_tokens:]
        if len(tokens) == num_tokens:
            tokens[-1:] = last
        return False

    def make_context(
        self,
        rows_in_flight: int,
        drafters_in_flight: Mapping[str, int],
        detokenizer: Detokenizer,
    ) -> Context:
        """Return the policy's input for a prefilled row."""
        hidden = self.prompt_hidden
        assert hidden.total is not None and hidden.last is not None
        return Context(
            prompt_tokens=self.request.prompt_tokens,
            mean_hidden=hidden.total / np.float32(hidden.num_positions),
            last_hidden=hidden.last,
            sampling=self.sampling,
            rows_in_flight=rows_in_flight,
            request_id=self.request.id,
            text=lambda: detokenizer.decode(self.request.prompt_tokens),
            max_new_tokens=self.request.max_new_tokens,
            drafters_in_flight=drafters_in_flight,
        )

    def completion(self, text: str, weights: str) -> Completion:
        """Return the completion of a row that has ended. text: its answer. weights: the target's."""
        assert self.finish_reason is not None
        return Completion(
            request_id=self.request.id,
            token_ids=self.output,
            text=text,
            finish_reason=self.finish_reason,
            drafter=self.decision.drafter,
            decision=self.decision,
            rounds=self.rounds,
            seconds=self.seconds,
            seconds_total=self.finished_at - self.admitted_at,
            num_prompt_tokens=self.num_prompt,
            seed=self.sampling.seed,
            error=self.error,
            logprobs=self.logprobs if self.request.logprobs else None,
            switches=self.switches,
            weights=weights,
        )


def count_drafters(rows: Iterable[Row]) -> dict[str, int]:
    """Return the number of rows per drafter, `none` included, of the rows whose drafter is known."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.finish_reason is not None:
            continue
        # before its choice, a row that names a drafter is known to get it
        arm = row.arm if row.started else row.request.drafter
        if arm != AUTO:
            name = split_arm(arm)[0]
            counts[name] = counts.get(name, 0) + 1
    return counts
