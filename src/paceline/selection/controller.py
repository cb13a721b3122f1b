"""The engine's controller: which arm continues a request, and which drafters make shadow drafts.

It joins the policy's choice, exploration, adaptation within the request and the guard. It sees
finished rounds and final text, never a token that is still to be verified, so its decisions cannot
change the text. A *ticket* names a request. Across requests the controller keeps the guard's records,
the recent error of the predictions for each arm, and the mean length of answers.
Symbol: N arms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, exp, sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE, DraftOutcome
from paceline.selection.adaptation import Arm, ArmTable, Hedge
from paceline.selection.policies import uniform_draw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from paceline.contracts import Context, Decision, RoundReport
    from paceline.selection.guard import Guard, RequestLosses
    from paceline.selection.round_prices import RoundPrices

SHADOW_SHARE: Final = 0.01
"""Share of plain decoding's time that the shadow drafts of one drafter may take."""

DOUBT: Final = 0.2
"""Error of a prediction, as a logarithm, that is possible before any draft is judged; the recent
error is used where it is larger."""

_CLEARLY: Final = 0.95  # a price clearly below another is less than this multiple of it
_UNKNOWN_GAIN: Final = 0.9  # loss of the chosen arm where a policy predicts no seconds
_MIN_REMAINING: Final = 8.0  # expected tokens of a request that is longer than usual
_LENGTH_MEMORY: Final = 0.9  # weight of the mean length at the next request
_TOLERATED_ERROR: Final = 0.2  # of a prediction, as a logarithm; it corrects nothing
_LEARNING_RATE: Final = 0.2  # share of a request's error that corrects the requests after it
_CORRECTION_MEMORY: Final = 0.99  # what remains of a correction after a request
_MAX_CORRECTION: Final = 1.0  # as a logarithm


@dataclass(slots=True)
class _ControlledRequest:
    arm: str
    context: int
    rows: int
    remaining: float  # expected tokens to its end
    hedge: Hedge | None = None
    losses: NDArray[np.float64] | None = None  # [N], after the last round
    shadow_every: dict[str, int] = field(default_factory=dict)  # drafter -> rounds
    num_read: dict[str, int] = field(default_factory=dict)  # drafter -> tokens that it has read
    guard_losses: RequestLosses | None = None
    excluded: set[str] = field(default_factory=set)  # arms
    paused_arm: str | None = None  # the arm to return to after a plain round for the clock
    emitted: int = 0
    num_rounds: int = 0


class AdaptiveController:
    """A controller for the engine or for a simulation.

    adapt: switch to the arm that fits the text so far. guard: return to plain decoding where an
    arm does not pay. explore: probability that a request's arm is drawn uniformly from all arms that
    the guard admits.
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
        """arms: all arms, with `none`. expected_tokens: the length of an answer before any is seen."""
        self.arms = ArmTable(arms)
        self.prices = prices
        self.adapt = adapt
        self.guard = guard
        self.explore = explore
        self._expected_tokens = expected_tokens
        self._correction = np.zeros(len(self.arms))  # [N] logarithms
        self._recent_error = 0.0  # of the worst prediction, as a logarithm
        self._requests: dict[int, _ControlledRequest] = {}
        if adapt:
            # compile the kernels, or read them from numba's cache, before the first request
            hedge = Hedge(self.arms, np.ones(len(self.arms)), prices, context=1, rows=1)
            hedge.observe([DraftOutcome.of(self.arms.arms[0].drafter, 0, 0, 0, 0)], emitted=1)
            hedge.losses(context=1, rows=1)

    # --- begin and end of a request ---------------------------------------------------------------

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        """Return the decision as it is carried out. room: tokens that may still be emitted."""
        if decision.arm not in self.arms:
            return decision
        whole = self._prior(decision, decision.seconds_per_token)
        in_rounds = decision.seconds_in_rounds or decision.seconds_per_token
        prior = self._prior(decision, in_rounds)
        guard, names = self.guard, self.arms.index
        refused = set() if guard is None else {name for name in names if not guard.admits(name)}
        decision = self._explore(context, self._adjust(decision, whole, refused), refused)
        # only requests that begin with a suspended arm may probe it
        excluded = set() if guard is None else {name for name in names if guard.is_suspended(name)}
        excluded.discard(decision.arm)
        num_prompt, rows = len(context.prompt_tokens), context.rows_in_flight
        remaining = self._expect_remaining(0, room)
        state = _ControlledRequest(decision.arm, num_prompt, rows, remaining, excluded=excluded)
        if self.adapt:
            state.hedge = Hedge(self.arms, prior, self.prices, num_prompt, rows)
            state.losses = state.hedge.losses(num_prompt, rows)
            state.shadow_every = self._schedule(num_prompt, rows)
        if self.guard is not None:
            state.guard_losses = self.guard.begin(decision.arm, remaining)
        self._requests[ticket] = state
        return decision

    def _prior(self, decision: Decision, predicted: Mapping[str, float]) -> NDArray[np.float64]:
        """Return predicted seconds per token [N] over plain decoding's, with recent corrections."""
        names = [arm.name for arm in self.arms.arms]
        if NONE in predicted:
            plain = predicted[NONE]
            prior = np.array([predicted.get(name, plain) / plain for name in names])
        else:
            prior = np.where([name == decision.arm != NONE for name in names], _UNKNOWN_GAIN, 1.0)
        corrected: NDArray[np.float64] = prior * np.exp(self._correction)
        return corrected

    def _adjust(
        self, decision: Decision, prior: NDArray[np.float64], refused: set[str]
    ) -> Decision:
        """Replace the chosen arm by the fastest predicted one where the guard refuses it or another
        arm's corrected prediction is clearly better.
        """
        index = self.arms.index
        chosen = decision.arm if decision.arm not in refused else NONE
        if decision.arm in refused or self.adapt:
            allowed = [name for name in index if name not in refused]
            best = min(allowed, key=lambda name: prior[index[name]])
            if prior[index[best]] < _CLEARLY * prior[index[chosen]]:
                chosen = best
        if chosen == decision.arm:
            return decision
        # given the earlier requests, this is certain
        return replace(decision, arm=chosen, propensity=1.0, policy=f"{decision.policy}, adjusted")

    def _explore(self, context: Context, decision: Decision, refused: set[str]) -> Decision:
        """Draw the decision's arm anew with probability `explore`.

        The propensity is that of the arm, given the arm that would have been chosen without.
        """
        if not self.explore:
            return decision
        names = [arm.name for arm in self.arms.arms if arm.name not in refused]
        share = self.explore / len(names)
        u = uniform_draw(context)
        if u < self.explore:
            arm = names[int(u / share)]
            propensity = share + (1.0 - self.explore) * (arm == decision.arm)
            return replace(
                decision, arm=arm, propensity=propensity, policy=f"{decision.policy}, explored"
            )
        return replace(decision, propensity=share + 1.0 - self.explore)

    def _expect_remaining(self, emitted: int, room: int) -> float:
        """Return the number of tokens that a request is expected to emit from here on."""
        return min(float(room), max(self._expected_tokens - emitted, _MIN_REMAINING))

    def observes_round(self, ticket: int) -> bool:
        """Return whether the coming round can teach or change anything; if not, it is not reported."""
        state = self._requests.get(ticket)
        if state is None:
            return False
        if state.arm != NONE or state.paused_arm is not None:
            return True
        if state.hedge is not None:
            return len(state.excluded) < len(self.arms) - 1
        return self.guard is not None and self.guard.clock.is_due

    def end(self, ticket: int, emitted: int | None = None) -> None:
        """End a request; an unknown ticket is ignored.

        emitted: tokens of its rounds, by default those of the reported rounds.
        """
        state = self._requests.pop(ticket, None)
        if state is None:
            return
        emitted = state.emitted if emitted is None else emitted
        if self.guard is not None and state.guard_losses is not None:
            self.guard.add_unobserved(emitted - state.emitted)
            self.guard.end(state.guard_losses)
        if not emitted:
            return
        mean = _LENGTH_MEMORY * self._expected_tokens
        self._expected_tokens = mean + (1 - _LENGTH_MEMORY) * emitted
        if state.hedge is not None:
            # at the same context and load, so that only acceptance makes a difference
            losses = state.hedge.losses(state.context, state.rows)
            self._learn(np.log(losses / state.hedge.prior_losses()))

    def _learn(self, error: NDArray[np.float64]) -> None:
        """Correct later predictions. error: [N] logarithms, 0 for an arm without judged drafts."""
        if error.any():
            worst = float(np.abs(error).max())
            self._recent_error += _LEARNING_RATE * (worst - self._recent_error)
        error = error - np.clip(error, -_TOLERATED_ERROR, _TOLERATED_ERROR)
        learned = self._correction * _CORRECTION_MEMORY + _LEARNING_RATE * error
        self._correction = np.clip(learned, -_MAX_CORRECTION, _MAX_CORRECTION)

    def report(self) -> list[str]:
        """Return the guard's report, one line per arm."""
        return [] if self.guard is None else self.guard.report()

    # --- shadow drafts ----------------------------------------------------------------------------

    def _schedule(self, context: int, rows: int) -> dict[str, int]:
        """Return for each drafter the number of rounds per shadow draft that keeps to SHADOW_SHARE."""
        plain = self.prices.rounds(NONE, context, rows)[0]
        return {
            drafter: max(
                1, ceil(self.prices.drafting(drafter, length, context) / (SHADOW_SHARE * plain))
            )
            for drafter, length in self.arms.lengths.items()
            if length
        }

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        """Return the drafters that should make a shadow draft in the coming round."""
        state = self._requests.get(ticket)
        if state is None or state.hedge is None:
            return ()
        in_use = self.arms[state.arm].drafter
        return [
            drafter
            for drafter, every in state.shadow_every.items()
            if state.num_rounds % every == every - 1
            and drafter != in_use
            and self._is_worth_drafting(drafter, state, state.hedge, every)
        ]

    def _is_worth_drafting(
        self, drafter: str, state: _ControlledRequest, hedge: Hedge, every: int
    ) -> bool:
        """Return whether a drafter's best possible gain exceeds its shadow drafts to the end."""
        assert state.losses is not None
        names = (self.arms.arms[i].name for i in self.arms.indices_of(drafter))
        indices = [self.arms.index[name] for name in names if name not in state.excluded]
        hoped = min((float(state.losses[i]) for i in indices), default=float("inf"))
        hoped *= exp(-max(DOUBT, self._recent_error) / sqrt(1.0 + hedge.num_drafts(drafter)))
        plain = float(self.prices.rounds(NONE, state.context, state.rows)[0])
        draft = self.prices.drafting(drafter, self.arms.lengths[drafter], state.context)
        catching_up = self.prices.catching_up(drafter, self._num_unread(state, drafter))
        gain = state.remaining * (float(state.losses[self.arms.index[state.arm]]) - hoped)
        return bool(gain > (catching_up + draft * state.remaining / every) / plain)

    @staticmethod
    def _num_unread(state: _ControlledRequest, drafter: str) -> int:
        return state.context - state.num_read.get(drafter, 0)

    # --- rounds -----------------------------------------------------------------------------------

    def after_round(self, ticket: int, report: RoundReport) -> str | None:
        """Return the arm of the next round, or None to keep the arm in use."""
        state = self._requests.get(ticket)
        if state is None:
            return None
        if report.arm != state.arm:  # the engine could not give the row this arm
            state.excluded.add(state.arm)
            state.arm, state.paused_arm = report.arm, None
        state.num_rounds += 1
        state.emitted += report.emitted
        state.context, state.rows = report.context + report.emitted, report.rows
        state.remaining = self._expect_remaining(state.emitted, report.room)
        for outcome in report.outcomes:
            if outcome.known == 0:
                state.num_read[outcome.drafter] = report.context
        if state.hedge is not None:
            state.hedge.observe(report.outcomes, report.emitted)
        if self.guard is not None and state.guard_losses is not None:
            self._charge(self.guard, state.guard_losses, state, report)
        state.arm = self._next_arm(state, report)
        return None if state.arm == report.arm else state.arm

    def _charge(
        self, guard: Guard, losses: RequestLosses, state: _ControlledRequest, report: RoundReport
    ) -> None:
        """Report a round's seconds to the guard, and exclude the arm if the guard says so.

        Where rows share a forward, the clock cannot tell one row's part, so the price is used.
        """
        plain = float(self.prices.rounds(NONE, report.context, report.rows)[0])
        is_alone = report.rows == 1
        if report.arm == NONE:
            if is_alone:
                guard.clock.add_plain_round(report.draft_seconds + report.other_seconds, plain)
            lost = report.start_seconds + report.shadow_seconds
            guard.after_plain(losses, lost / (guard.clock.factor * plain))
            return
        # shadow drafts are the request's loss, but no arm is suspended for those of others
        losses.loss += report.shadow_seconds / (guard.clock.factor * plain)
        arm = self.arms[report.arm]
        spent = (report.draft_seconds + report.other_seconds) / guard.clock.factor
        if not is_alone:
            drafted = report.stats.drafted
            spent = float(self.prices.rounds(arm.drafter, report.context, report.rows)[drafted])
        started = report.start_seconds / guard.clock.factor
        # a drafted round is a plain one with a draft and more tokens. If it reads as less, the machine
        # was slower when plain rounds were clocked, and a drafter that is never right would seem to gain
        draft = self.prices.drafting(arm.drafter, report.stats.drafted, report.context)
        spent = max(spent, plain + draft)
        if guard.after_round(losses, arm.name, spent / plain, started / plain, report.emitted):
            state.excluded.add(arm.name)

    def _next_arm(self, state: _ControlledRequest, report: RoundReport) -> str:
        arm = state.arm
        if state.paused_arm is not None:
            arm, state.paused_arm = state.paused_arm, None
        if arm in state.excluded:
            arm = NONE
        if state.hedge is not None:
            arm = self._adapt(state, state.hedge, arm)
        if arm != NONE and report.rows == 1 and self.guard is not None:
            self.guard.clock.add_drafted_round()
            if self.guard.clock.is_due:
                state.paused_arm, arm = arm, NONE
        return arm

    def _adapt(self, state: _ControlledRequest, hedge: Hedge, current: str) -> str:
        """Return Hedge's arm if its gain to the end of the request pays for its catching up."""
        losses = state.losses = hedge.losses(state.context, state.rows)
        best = hedge.best(current, losses, state.excluded)
        drafter = self.arms[best].drafter
        if drafter == self.arms[current].drafter:
            return best
        index = self.arms.index
        gain = state.remaining * (losses[index[current]] - losses[index[best]])
        plain = self.prices.rounds(NONE, state.context, state.rows)[0]
        catching_up = self.prices.catching_up(drafter, self._num_unread(state, drafter)) / plain
        return best if gain > catching_up else current
