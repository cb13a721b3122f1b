"""What the engine asks while a request is decoded: which arm to go on with, what to score beside it.

Joins the policy's choice, exploration, adaptation within the request and the guard. It sees rounds
that are over and text that is final, never a token that is still to be verified, so nothing it
decides can change what is written. A *ticket* names a request. Across requests it keeps the guard's
records, how far the predictions were off of late for each arm, and how long answers are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from math import ceil, exp, sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE, DraftOutcome
from paceline.selection.adaptation import Arm, Arms, Hedge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from paceline.contracts import Context, Decision, RoundReport
    from paceline.selection.guard import Guard, Ledger
    from paceline.selection.round_prices import RoundPrices

SHADOW_SHARE: Final = 0.01
"""Share of plain decoding's time that scoring one drafter beside the arm in use may take."""

DOUBT: Final = 0.2
"""How far off a prediction may be, as a logarithm, before anything is seen; more where predictions
were further off of late."""

_CLEARLY: Final = 0.95  # of the chosen arm's predicted price is clearly less
_UNKNOWN_GAIN: Final = 0.9  # of the chosen arm, where a policy predicts no seconds
_FEWEST_TOKENS: Final = 8.0  # that a request is expected to go on for
_LENGTH_MEMORY: Final = 0.9  # of the outputs' mean length
_USUAL: Final = 0.2  # error of a prediction, as a logarithm, that teaches nothing
_LEARNS: Final = 0.2  # of a prediction's error in a request, for the requests after it
_FORGETS: Final = 0.99  # what is left of a correction a request later
_CORRECTION: Final = 1.0  # the largest, as a logarithm


@dataclass(slots=True)
class _ControlledRequest:
    """One request in flight."""

    arm: str
    context: int
    rows: int
    rest: float  # tokens it is expected to go on for
    prior: NDArray[np.float64]  # [N]
    hedge: Hedge | None = None
    losses: NDArray[np.float64] | None = None  # [N], as of the last round
    score_every: dict[str, int] = field(default_factory=dict)  # drafter -> rounds
    read: dict[str, int] = field(default_factory=dict)  # drafter -> tokens it has read
    ledger: Ledger | None = None
    barred: set[str] = field(default_factory=set)  # arms it goes on without
    resume: str | None = None  # the arm that a plain round stands in for
    emitted: int = 0
    num_rounds: int = 0


class AdaptiveController:
    """Watches requests with an arm of a policy's choice, for the engine or for a simulation.

    adapt: go on with whatever arm the text so far speaks for. guard: fall back to plain decoding
    where an arm does not pay. explore: the probability that a request's arm is drawn evenly from all
    that the guard admits.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        prices: RoundPrices,
        adapt: bool = False,
        guard: Guard | None = None,
        explore: float = 0.0,
        expected_tokens: float = 64.0,
    ) -> None:
        """arms: all there are, `none` among them. expected_tokens: of an answer, before any is seen."""
        self.arms = Arms(arms)
        self.prices = prices
        self.adapt = adapt
        self.guard = guard
        self.explore = explore
        self._expected = expected_tokens
        self._correction = np.zeros(len(self.arms))  # [N] logarithms
        self._surprise = 0.0  # how far off the predictions were of late, a logarithm
        self._requests: dict[int, _ControlledRequest] = {}
        if adapt:
            # compile now, or read what was compiled before, instead of in the first request
            hedge = Hedge(self.arms, np.ones(len(self.arms)), prices, context=1, rows=1)
            hedge.observe([DraftOutcome.of(self.arms.all[0].drafter, 0, 0, 0, 0)], emitted=1)
            hedge.losses(context=1, rows=1)

    # --- a request's begin and end ----------------------------------------------------------------

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        """The decision as it is carried out. room: tokens that may still be emitted."""
        if decision.arm not in self.arms:
            return decision
        whole = self._prior(decision, decision.seconds_per_token)
        in_rounds = decision.seconds_in_rounds or decision.seconds_per_token
        prior = self._prior(decision, in_rounds)
        guard, names = self.guard, self.arms.place
        refused = set() if guard is None else {name for name in names if not guard.admits(name)}
        decision = self._explored(context, self._admitted(decision, whole, refused), refused)
        # an arm that is to be probed is tried by requests that begin with it, and by no others
        barred = set() if guard is None else {name for name in names if guard.is_benched(name)}
        barred.discard(decision.arm)
        num_prompt, rows = len(context.prompt_tokens), context.rows_in_flight
        rest = self._rest(0, room)
        state = _ControlledRequest(decision.arm, num_prompt, rows, rest, prior, barred=barred)
        if self.adapt:
            state.hedge = Hedge(self.arms, prior, self.prices, num_prompt, rows)
            state.losses = state.hedge.losses(num_prompt, rows)
            state.score_every = self._schedule(num_prompt, rows)
        if self.guard is not None:
            state.ledger = self.guard.begin(decision.arm, rest)
        self._requests[ticket] = state
        return decision

    def _prior(self, decision: Decision, predicted: Mapping[str, float]) -> NDArray[np.float64]:
        """[N] predicted seconds per token over plain decoding's, corrected by how it went of late."""
        names = [arm.name for arm in self.arms.all]
        if NONE in predicted:
            plain = predicted[NONE]
            prior = np.array([predicted.get(name, plain) / plain for name in names])
        else:
            prior = np.where([name == decision.arm != NONE for name in names], _UNKNOWN_GAIN, 1.0)
        corrected: NDArray[np.float64] = prior * np.exp(self._correction)
        return corrected

    def _admitted(
        self, decision: Decision, prior: NDArray[np.float64], refused: set[str]
    ) -> Decision:
        """The chosen arm, or the one predicted to be fastest where that is refused or, as corrected,
        clearly no longer the best.
        """
        place = self.arms.place
        chosen = decision.arm if decision.arm not in refused else NONE
        if decision.arm in refused or self.adapt:
            allowed = [name for name in place if name not in refused]
            best = min(allowed, key=lambda name: prior[place[name]])
            if prior[place[best]] < _CLEARLY * prior[place[chosen]]:
                chosen = best
        if chosen == decision.arm:
            return decision
        # given what was seen before, this is certain
        return replace(decision, arm=chosen, propensity=1.0, policy=f"{decision.policy}, adjusted")

    def _explored(self, context: Context, decision: Decision, refused: set[str]) -> Decision:
        """The decision, drawn anew with probability `explore`; its propensity is that of the arm, given
        what would have been chosen without.
        """
        if not self.explore:
            return decision
        names = [arm.name for arm in self.arms.all if arm.name not in refused]
        share = self.explore / len(names)
        tokens = np.asarray(context.prompt_tokens, dtype="<i8").tobytes()
        digest = hashlib.sha256(context.request_id.encode() + b"\0" + tokens).digest()
        u = int.from_bytes(digest[:8], "big") / 2.0**64
        if u < self.explore:
            arm = names[int(u / share)]
            propensity = share + (1.0 - self.explore) * (arm == decision.arm)
            return replace(
                decision, arm=arm, propensity=propensity, policy=f"{decision.policy}, explored"
            )
        return replace(decision, propensity=share + 1.0 - self.explore)

    def _rest(self, emitted: int, room: int) -> float:
        """Tokens the request is expected to go on for."""
        return min(float(room), max(self._expected - emitted, _FEWEST_TOKENS))

    def observes_round(self, ticket: int) -> bool:
        """Whether the coming round can teach or change anything; plain decoding to the end cannot."""
        state = self._requests.get(ticket)
        if state is None:
            return False
        if state.arm != NONE or state.resume is not None:
            return True
        if state.hedge is not None:
            return len(state.barred) < len(self.arms.all) - 1
        return self.guard is not None and self.guard.clock.is_due

    def end(self, ticket: int, emitted: int | None = None) -> None:
        """The request is over, after so many tokens of its rounds, by default those that were seen;
        unknown tickets are none of ours.
        """
        state = self._requests.pop(ticket, None)
        if state is None:
            return
        emitted = state.emitted if emitted is None else emitted
        if self.guard is not None and state.ledger is not None:
            self.guard.passed(emitted - state.emitted)
            self.guard.end(state.ledger)
        state.emitted = emitted
        if not emitted:
            return
        self._expected = _LENGTH_MEMORY * self._expected + (1 - _LENGTH_MEMORY) * state.emitted
        if state.hedge is not None:
            # at the same place and load, so that nothing but acceptance makes a difference
            losses = state.hedge.losses(state.context, state.rows)
            self._learn(np.log(losses / state.hedge.expected()))

    def _learn(self, error: NDArray[np.float64]) -> None:
        """error: [N] of a request's predictions, as logarithms; 0 where nothing was seen of an arm."""
        if error.any():
            worst = float(np.abs(error).max())
            self._surprise += _LEARNS * (worst - self._surprise)
        error = error - np.clip(error, -_USUAL, _USUAL)
        learned = self._correction * _FORGETS + _LEARNS * error
        self._correction = np.clip(learned, -_CORRECTION, _CORRECTION)

    def report(self) -> list[str]:
        """What the guard has to say, a line each."""
        return [] if self.guard is None else self.guard.report()

    # --- drafts beside the arm in use -------------------------------------------------------------

    def _schedule(self, context: int, rows: int) -> dict[str, int]:
        """drafter -> every how many rounds a draft of it takes no more than its share of the time."""
        plain = self.prices.rounds(NONE, context, rows)[0]
        return {
            drafter: max(
                1, ceil(self.prices.drafting(drafter, length, context) / (SHADOW_SHARE * plain))
            )
            for drafter, length in self.arms.lengths.items()
            if length
        }

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        """Drafters that should make a draft beside the arm in use in the coming round."""
        state = self._requests.get(ticket)
        if state is None or state.hedge is None:
            return ()
        in_use = self.arms[state.arm].drafter
        return [
            drafter
            for drafter, every in state.score_every.items()
            if state.num_rounds % every == every - 1
            and drafter != in_use
            and self._is_worth_scoring(drafter, state, state.hedge, every)
        ]

    def _is_worth_scoring(
        self, drafter: str, state: _ControlledRequest, hedge: Hedge, every: int
    ) -> bool:
        """Whether the drafter, if it were as good as may be hoped, would gain the request more than
        shadow drafts to its end would take.
        """
        assert state.losses is not None
        places = [i for i in self.arms.of(drafter) if self.arms.all[i].name not in state.barred]
        hoped = min((float(state.losses[i]) for i in places), default=float("inf"))
        hoped *= exp(-max(DOUBT, self._surprise) / sqrt(1.0 + hedge.num_drafts(drafter)))
        plain = float(self.prices.rounds(NONE, state.context, state.rows)[0])
        draft = self.prices.drafting(drafter, self.arms.lengths[drafter], state.context)
        catching_up = self.prices.catching_up(drafter, self._behind(state, drafter))
        gain = state.rest * (float(state.losses[self.arms.place[state.arm]]) - hoped)
        return bool(gain > (catching_up + draft * state.rest / every) / plain)

    @staticmethod
    def _behind(state: _ControlledRequest, drafter: str) -> int:
        return state.context - state.read.get(drafter, 0)

    # --- its rounds -------------------------------------------------------------------------------

    def after_round(self, ticket: int, seen: RoundReport) -> str | None:
        """The arm to go on with, or None for the one in use."""
        state = self._requests.get(ticket)
        if state is None:
            return None
        if seen.arm != state.arm:  # the engine could not give the row what was wanted
            state.barred.add(state.arm)
            state.arm, state.resume = seen.arm, None
        state.num_rounds += 1
        state.emitted += seen.emitted
        state.context, state.rows = seen.context + seen.emitted, seen.rows
        state.rest = self._rest(state.emitted, seen.room)
        for one in seen.outcomes:
            if one.known == 0:
                state.read[one.drafter] = seen.context
        if state.hedge is not None:
            state.hedge.observe(seen.outcomes, seen.emitted)
        if self.guard is not None and state.ledger is not None:
            self._charge(self.guard, state.ledger, state, seen)
        state.arm = self._wanted(state, seen)
        return None if state.arm == seen.arm else state.arm

    def _charge(
        self, guard: Guard, ledger: Ledger, state: _ControlledRequest, seen: RoundReport
    ) -> None:
        """Tell the guard what a round took, and bar what it has had enough of.

        A forward that rows share says nothing of one of them by the clock: there its price does.
        """
        plain = float(self.prices.rounds(NONE, seen.context, seen.rows)[0])
        alone = seen.rows == 1
        if seen.arm == NONE:
            if alone:
                guard.clock.plain(seen.draft_seconds + seen.other_seconds, plain)
            lost = seen.start_seconds + seen.shadow_seconds
            guard.after_plain(ledger, lost / (guard.clock.factor * plain))
            return
        # the request loses it, but no arm is benched for what looking at others took
        ledger.loss += seen.shadow_seconds / (guard.clock.factor * plain)
        arm = self.arms[seen.arm]
        spent = (seen.draft_seconds + seen.other_seconds) / guard.clock.factor
        if not alone:
            drafted = seen.stats.drafted
            spent = float(self.prices.rounds(arm.drafter, seen.context, seen.rows)[drafted])
        started = seen.start_seconds / guard.clock.factor
        # a drafted round is a plain one with a draft and more tokens: where it reads as less, plain
        # rounds were clocked in slower times, and a drafter that is never right would seem to gain
        draft = self.prices.drafting(arm.drafter, seen.stats.drafted, seen.context)
        spent = max(spent, plain + draft)
        if guard.after_round(ledger, arm.name, spent / plain, started / plain, seen.emitted):
            state.barred.add(arm.name)

    def _wanted(self, state: _ControlledRequest, seen: RoundReport) -> str:
        current = state.arm
        if state.resume is not None:  # a plain round for the clock is over
            current, state.resume = state.resume, None
        if current in state.barred:
            current = NONE
        if state.hedge is not None:
            current = self._adapted(state, state.hedge, current)
        if current != NONE and seen.rows == 1 and self.guard is not None:
            self.guard.clock.passed()
            if self.guard.clock.is_due:
                state.resume, current = current, NONE
        return current

    def _adapted(self, state: _ControlledRequest, hedge: Hedge, current: str) -> str:
        """Hedge's arm, if what it saves over the rest of the request pays for its catching up."""
        losses = state.losses = hedge.losses(state.context, state.rows)
        best = hedge.best(current, losses, state.barred)
        drafter = self.arms[best].drafter
        if drafter == self.arms[current].drafter:
            return best
        place = self.arms.place
        saved = state.rest * (losses[place[current]] - losses[place[best]])
        plain = self.prices.rounds(NONE, state.context, state.rows)[0]
        catching_up = self.prices.catching_up(drafter, self._behind(state, drafter)) / plain
        return best if saved > catching_up else current
