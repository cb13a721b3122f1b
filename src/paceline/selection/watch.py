"""What the engine asks while a request is decoded: which arm to go on with, what to score beside it.

Joins the policy's choice, exploration, adaptation within the request and the guard. It sees rounds
that are over and text that is final, never a token that is still to be verified, so nothing it
decides can change what is written. All arms here are names; a *ticket* names a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import NONE
from paceline.selection.adaptation import Arm, Hedge
from paceline.selection.guard import Guard, Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Context, Decision, RoundSeen
    from paceline.selection.round_prices import RoundPrices

WATCH_SHARE: Final = 0.02
"""Share of plain decoding's time that scoring one drafter beside the arm in use may take."""

DOUBT: Final = 0.3
"""How much better than believed an arm may be that nothing is known of, as a share of its price."""

_UNKNOWN_GAIN: Final = 0.9  # of the chosen arm, where a policy predicts no seconds
_FEWEST_TOKENS: Final = 8.0  # that a request is expected to go on for
_LENGTH_MEMORY: Final = 0.9  # of the outputs' mean length


@dataclass(slots=True)
class _Watched:
    """One request in flight."""

    arm: str
    room: int
    hedge: Hedge | None
    ledger: Ledger | None
    seen_until: dict[str, int] = field(default_factory=dict)  # drafter -> tokens it has read
    emitted: int = 0
    num_rounds: int = 0
    resume: str | None = None  # the arm that a plain round stands in for
    rest: float = 0.0
    losses: np.ndarray | None = None  # [N], as of the last round
    context: int = 0
    rows: int = 1


class Watch:
    """Watches requests with an arm of the policy's choice, for the engine or for a simulation.

    adapt: go on with whatever arm the text so far speaks for. guard: fall back to plain decoding
    where an arm does not pay. explore: probability of an arm drawn evenly instead of the chosen one.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        prices: RoundPrices,
        adapt: bool = False,
        guard: Guard | None = None,
        expected_tokens: float = 64.0,
    ) -> None:
        """arms: all there are, `none` among them. expected_tokens: of an answer, before any is seen."""
        self.arms = {arm.name: arm for arm in arms}
        self.prices = prices
        self.adapt = adapt
        self.guard = guard
        self._expected = expected_tokens
        self._watched: dict[int, _Watched] = {}
        lengths: dict[str, int] = {}
        for arm in arms:
            lengths[arm.drafter] = max(arm.num_draft_tokens, lengths.get(arm.drafter, 0))
        self._lengths = {name: length for name, length in lengths.items() if length}

    # --- a request --------------------------------------------------------------------------------

    def begin(self, ticket: int, context: Context, decision: Decision, room: int) -> Decision:
        """The decision as it is carried out. room: tokens that may still be emitted."""
        prior = self._prior(context, decision)
        arm = decision.arm
        if self.guard is not None and not self.guard.admits(arm):
            arm = self._second(prior, self.guard)
            decision = replace(decision, arm=arm, policy=f"{decision.policy}, guarded")
        rest = self._rest(0, room)
        num_prompt, rows = len(context.prompt_tokens), context.rows_in_flight
        hedge = None
        if self.adapt:
            hedge = Hedge(list(self.arms.values()), prior, self.prices, num_prompt, rows)
        ledger = None if self.guard is None else self.guard.begin(arm, rest)
        state = _Watched(arm, room, hedge, ledger, rest=rest, context=num_prompt, rows=rows)
        if hedge is not None:
            state.losses = hedge.losses(num_prompt, rows)
        self._watched[ticket] = state
        return decision

    def _prior(self, context: Context, decision: Decision) -> dict[str, float]:
        """arm -> predicted seconds per token over plain decoding's."""
        predicted = decision.seconds_per_token
        if NONE in predicted:
            plain = predicted[NONE]
            return {name: predicted.get(name, plain) / plain for name in self.arms}
        prior = dict.fromkeys(self.arms, 1.0)
        if decision.arm != NONE:
            prior[decision.arm] = _UNKNOWN_GAIN
        return prior

    def _second(self, prior: dict[str, float], guard: Guard) -> str:
        """The arm that is predicted to be fastest of those the guard admits."""
        admitted = [name for name in self.arms if name != NONE and guard.admits(name)]
        best = min(admitted, key=prior.__getitem__, default=NONE)
        return best if prior[best] < 1.0 else NONE

    def _rest(self, emitted: int, room: int) -> float:
        """Tokens the request is expected to go on for."""
        return min(float(room), max(self._expected - emitted, _FEWEST_TOKENS))

    def end(self, ticket: int) -> None:
        """The request is over; unknown tickets are none of ours."""
        state = self._watched.pop(ticket, None)
        if state is None:
            return
        self._expected = _LENGTH_MEMORY * self._expected + (1 - _LENGTH_MEMORY) * state.emitted
        if self.guard is not None and state.ledger is not None:
            self.guard.end(state.ledger)

    # --- its rounds -------------------------------------------------------------------------------

    def to_score(self, ticket: int) -> list[str]:
        """Drafters that should make a draft beside the arm in use in the coming round."""
        state = self._watched.get(ticket)
        if state is None or state.hedge is None or state.losses is None:
            return []
        in_use = self.arms[state.arm].drafter
        return [
            drafter
            for drafter in self._lengths
            if drafter != in_use and self._is_worth_scoring(drafter, state, state.hedge)
        ]

    def _is_worth_scoring(self, drafter: str, state: _Watched, hedge: Hedge) -> bool:
        """Every m-th round, m so that it takes its share of the time; never where that is more than
        what the drafter could gain the request if it were as good as may be hoped.
        """
        plain = self.prices.rounds(NONE, state.context, state.rows)[0]
        draft = self.prices.drafting(drafter, self._lengths[drafter], state.context) / plain
        every = max(1, ceil(draft / WATCH_SHARE))
        if state.num_rounds % every != every - 1:
            return False
        assert state.losses is not None
        hoped = min(
            state.losses[hedge.index(name)]
            for name, arm in self.arms.items()
            if arm.drafter == drafter
        )
        hoped *= 1.0 - DOUBT / (1.0 + hedge.num_drafts(drafter)) ** 0.5
        gain = state.rest * (state.losses[hedge.index(state.arm)] - hoped)
        behind = state.context - state.seen_until.get(drafter, 0)
        catching_up = self.prices.catching_up(drafter, behind) / plain
        return bool(gain > catching_up + draft * state.rest / every)

    def after_round(self, ticket: int, seen: RoundSeen) -> str | None:
        """The arm to go on with, or None for the one in use."""
        state = self._watched.get(ticket)
        if state is None:
            return None
        state.num_rounds += 1
        state.emitted += seen.emitted
        state.context, state.rows, state.room = seen.context + seen.emitted, seen.rows, seen.room
        state.rest = self._rest(state.emitted, seen.room)
        for one in seen.scored:
            if one.known == 0:
                state.seen_until[one.drafter] = seen.context
        blocked = self._count(state, seen)
        wanted = self._wanted(state, seen, blocked)
        if wanted == state.arm:
            return None
        state.arm = wanted
        return wanted

    def _count(self, state: _Watched, seen: RoundSeen) -> frozenset[str]:
        """Tell guard and Hedge; the arms that the request goes on without."""
        if state.hedge is not None:
            state.hedge.observe(seen.scored, seen.emitted)
        guard, ledger = self.guard, state.ledger
        if guard is None or ledger is None:
            return frozenset()
        arm = self.arms[seen.arm]
        curve = self.prices.rounds(arm.drafter, seen.context, seen.rows)
        plain = float(self.prices.rounds(NONE, seen.context, seen.rows)[0])
        clock = guard.clock
        drafting = self.prices.drafting(arm.drafter, seen.stats.drafted, seen.context)
        # the clock of a shared forward says nothing of one row: there its price does
        rest = clock.factor * (float(curve[seen.stats.drafted]) - drafting)
        if seen.rows == 1:
            rest = seen.other_seconds
        if seen.arm == NONE:
            if seen.rows == 1:
                clock.plain(rest, plain)
            return frozenset(ledger.fallen)
        clock.other()
        unit = clock.factor * plain
        guard.after_round(
            ledger,
            seen.arm,
            (seen.draft_seconds + rest) / unit,
            seen.start_seconds / unit,
            seen.emitted,
        )
        return frozenset(ledger.fallen)

    def _wanted(self, state: _Watched, seen: RoundSeen, blocked: frozenset[str]) -> str:
        current = state.arm
        if state.resume is not None:  # a plain round for the clock is over
            current, state.resume = state.resume, None
        if current in blocked:
            current = NONE
        if state.hedge is not None:
            current = self._adapted(state, state.hedge, current, blocked)
        clock_is_due = self.guard is not None and self.guard.clock.is_due and seen.rows == 1
        if current != NONE and clock_is_due:
            state.resume, current = current, NONE
        return current

    def _adapted(
        self, state: _Watched, hedge: Hedge, current: str, blocked: frozenset[str]
    ) -> str:
        """Hedge's arm, if what it saves over the rest of the request pays for its catching up."""
        losses = state.losses = hedge.losses(state.context, state.rows)
        best = hedge.best(current, losses, blocked)
        if best == current:
            return current
        drafter = self.arms[best].drafter
        saved = state.rest * (losses[hedge.index(current)] - losses[hedge.index(best)])
        if drafter != self.arms[current].drafter:
            plain = float(self.prices.rounds(NONE, state.context, state.rows)[0])
            behind = state.context - state.seen_until.get(drafter, 0)
            saved -= self.prices.catching_up(drafter, behind) / plain
        return best if saved > 0 else current
