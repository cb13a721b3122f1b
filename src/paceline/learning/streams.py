"""Simulated streams of requests, in which methods choose an arm per round; priced, without a model.

The replay tells the tokens that each drafter would get accepted at every position of a prompt's output
(`ahead`), so any sequence of arms can be simulated: fixed arms, a policy's choice, bandits that learn
from rounds, and the engine's `AdaptiveController`. Seconds come from the cost table. They include the
time in which a drafter reads text that it has not read, and the time of shadow drafts (drafts in
addition to the arm in use, which nobody verifies). Symbols: T output tokens, N arms, t rounds so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.contracts import (
    NONE,
    Context,
    Decision,
    DraftOutcome,
    RoundReport,
    RoundStats,
    SamplingParams,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.selection.adaptation import Arm
    from paceline.selection.controller import AdaptiveController
    from paceline.selection.round_prices import RoundPrices

_NO_STATE: Final = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class StreamPrompt:
    """A prompt, the length of its output, and each drafter's outcome at every position of the output."""

    domain: str
    num_prompt: int
    num_output: int  # T
    ahead: Mapping[str, np.ndarray]  # drafter -> [T-1, 2] drafted, accepted at full length
    decision: Decision = field(default_factory=lambda: Decision(NONE))  # of the policy


@dataclass(slots=True)
class StreamOutcome:
    """The simulation of one request: seconds after its prefill, and rounds by arm."""

    seconds: float = 0.0
    plain_seconds: float = 0.0
    rounds: dict[str, int] = field(default_factory=dict)
    switches: int = 0


class StreamMethod(ABC):
    """A way to choose arms, round by round."""

    name: str

    @abstractmethod
    def begin(self, number: int, prompt: StreamPrompt) -> str:
        """Return the arm of a request's first round. number: of the request."""

    def shadow_drafters(self, number: int) -> Sequence[str]:
        """Return the drafters that make a shadow draft in the next round."""
        return ()

    def after_round(self, number: int, seen: RoundReport) -> str | None:
        """Return the arm of the next round, None for the same arm."""
        return None

    def end(self, number: int) -> None:  # noqa: B027 - most methods hold no state per request
        """Forget a request, which has ended."""


class Fixed(StreamMethod):
    """One arm for all requests."""

    def __init__(self, arm: str) -> None:
        self.name = f"fixed {arm}"
        self._arm = arm

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        return self._arm


class Offline(StreamMethod):
    """The policy's choice before the first round, for the whole request."""

    name = "policy"

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        return prompt.decision.arm


class Controlled(StreamMethod):
    """The engine's controller. with_policy: its prior is the policy's prediction, else nothing."""

    def __init__(self, name: str, controller: AdaptiveController, with_policy: bool = True) -> None:
        self.name = name
        self._controller = controller
        self._with_policy = with_policy

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        context = Context(
            range(prompt.num_prompt), _NO_STATE, _NO_STATE, SamplingParams(), rows_in_flight=1
        )
        decision = prompt.decision if self._with_policy else Decision(NONE)
        return self._controller.begin(number, context, decision, prompt.num_output - 1).arm

    def shadow_drafters(self, number: int) -> Sequence[str]:
        return self._controller.shadow_drafters(number)

    def after_round(self, number: int, seen: RoundReport) -> str | None:
        return self._controller.after_round(number, seen)

    def end(self, number: int) -> None:
        self._controller.end(number)


class _Bandit(StreamMethod):
    """Learns the speed-up of arms over `none` from rounds.

    forgets: begins anew with every request, as the published bandits over drafters do.
    """

    def __init__(
        self, name: str, arms: Sequence[str], prices: RoundPrices, seed: int, forgets: bool
    ) -> None:
        self.name = name
        self._arms = list(arms)
        self._prices = prices
        self._random = np.random.default_rng(seed)
        self._forgets = forgets
        self._reset()

    @abstractmethod
    def _reset(self) -> None:
        """Forget all rewards."""

    @abstractmethod
    def _pick(self) -> int:
        """Return the place of the next arm."""

    @abstractmethod
    def _learn(self, arm: int, reward: float) -> None:
        """Add a reward in [0, 1]: the arm's speed-up over one that no arm reaches."""

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        if self._forgets:
            self._reset()
        return self._arms[self._pick()]

    def after_round(self, number: int, seen: RoundReport) -> str | None:
        plain = self._prices.rounds(NONE, seen.context, seen.rows)[0]
        speed = seen.emitted * plain / (seen.draft_seconds + seen.other_seconds)
        self._learn(self._arms.index(seen.arm), min(1.0, speed / _FASTEST))
        return self._arms[self._pick()]


_FASTEST: Final = 8.0  # speed-up that no arm reaches


class UCB(_Bandit):
    """UCB1 (Auer et al. 2002): the largest mean reward plus sqrt(2 ln t / n), n rounds of the arm.

    Every arm is tried once at first.
    """

    def _reset(self) -> None:
        self._sums = np.zeros(len(self._arms))
        self._counts = np.zeros(len(self._arms))

    def _pick(self) -> int:
        if (self._counts == 0).any():
            return int(self._counts.argmin())
        bonus = np.sqrt(2 * log(self._counts.sum()) / self._counts) / _FASTEST
        return int((self._sums / self._counts + bonus).argmax())

    def _learn(self, arm: int, reward: float) -> None:
        self._sums[arm] += reward
        self._counts[arm] += 1


class EXP3(_Bandit):
    """EXP3 (Auer et al. 2002) on importance-weighted losses, with the rate sqrt(ln N / (t N))."""

    def _reset(self) -> None:
        self._losses = np.zeros(len(self._arms))
        self._num_rounds = 1

    def _distribution(self) -> np.ndarray:
        rate = sqrt(log(max(2, len(self._arms))) / (self._num_rounds * len(self._arms)))
        weights = np.exp(-rate * (self._losses - self._losses.min()))
        return np.asarray(weights / weights.sum())

    def _pick(self) -> int:
        self._drawn_from = self._distribution()
        return int(self._random.choice(len(self._arms), p=self._drawn_from))

    def _learn(self, arm: int, reward: float) -> None:
        self._losses[arm] += (1.0 - reward) / self._drawn_from[arm]
        self._num_rounds += 1


@dataclass(slots=True)
class _ShadowDraft:
    """A draft that nobody verified, and the depth up to which the text has confirmed it so far."""

    drafter: str
    position: int
    drafted: int
    allowed: int
    accepted: int
    known: int = 0

    def outcome_at(self, position: int) -> DraftOutcome:
        """Return the outcome as far as the text up to a position tells it."""
        visible = position - self.position
        right = min(self.accepted, visible)
        outcome = DraftOutcome.of(
            self.drafter, self.drafted, self.allowed, right, visible, self.known
        )
        self.known = right
        return outcome


class Stream:
    """Prompts to simulate under one method after the other.

    noise: standard deviation of the logarithm of a round's seconds, to simulate an unsteady clock.
    """

    def __init__(
        self,
        prompts: Sequence[StreamPrompt],
        arms: Sequence[Arm],
        prices: RoundPrices,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.prompts = list(prompts)
        self.arms = {arm.name: arm for arm in arms}
        self.prices = prices
        self._noise = noise
        self._seed = seed
        self._lengths: dict[str, int] = {}
        for arm in arms:
            longest = max(arm.num_draft_tokens, self._lengths.get(arm.drafter, 0))
            self._lengths[arm.drafter] = longest

    def play(self, method: StreamMethod) -> list[StreamOutcome]:
        """Simulate every request, one after the other."""
        clock = np.random.default_rng(self._seed)
        return [self._request(method, i, prompt, clock) for i, prompt in enumerate(self.prompts)]

    def _request(
        self, method: StreamMethod, number: int, prompt: StreamPrompt, clock: np.random.Generator
    ) -> StreamOutcome:
        result = StreamOutcome()
        arm = self.arms[method.begin(number, prompt)]
        read: dict[str, int] = {}  # drafter -> output positions it has read, the prompt included
        shadows: list[_ShadowDraft] = []
        position = 1
        while position < prompt.num_output:
            context = prompt.num_prompt + position - 1
            start = self._catch_up(arm.drafter, prompt, position, read)
            shadow_seconds = 0.0
            for drafter in method.shadow_drafters(number):
                start += self._catch_up(drafter, prompt, position, read)
                draft = self._shadow_draft(drafter, prompt, position)
                if draft is not None:
                    shadows.append(draft)
                    shadow_seconds += self.prices.drafting(drafter, draft.drafted, context)
            allowed = min(arm.num_draft_tokens, prompt.num_output - position - 1)
            drafted, accepted = self._round(arm, prompt, position)
            emitted = min(accepted + 1, prompt.num_output - position)
            own = self.prices.drafting(arm.drafter, drafted, context)
            other = float(self.prices.rounds(arm.drafter, context, 1)[drafted]) - own
            other *= exp(self._noise * clock.standard_normal()) if self._noise else 1.0
            for place in range(emitted):
                result.plain_seconds += float(self.prices.rounds(NONE, context + place, 1)[0])
            position += emitted
            result.seconds += start + shadow_seconds + own + other
            result.rounds[arm.name] = result.rounds.get(arm.name, 0) + 1
            told = [(draft, draft.outcome_at(position)) for draft in shadows]
            shadows = [draft for draft, outcome in told if not outcome.is_final]
            outcomes = [outcome for _, outcome in told]
            if allowed:
                outcomes.append(
                    DraftOutcome.of(arm.drafter, drafted, allowed, accepted, accepted + 1)
                )
            seen = RoundReport(
                arm.name, RoundStats(drafted, accepted), emitted, context, 1,
                prompt.num_output - position, outcomes, start, shadow_seconds + own, other,
            )  # fmt: skip
            wanted = method.after_round(number, seen)
            if wanted is not None and wanted != arm.name:
                arm = self.arms[wanted]
                result.switches += 1
        method.end(number)
        return result

    def _round(self, arm: Arm, prompt: StreamPrompt, position: int) -> tuple[int, int]:
        """Return (drafted, accepted) of an arm at a position."""
        if not arm.num_draft_tokens:
            return 0, 0
        drafted, accepted = prompt.ahead[arm.drafter][position - 1]
        k = arm.num_draft_tokens
        return min(k, int(drafted)), min(k, int(accepted))

    def _shadow_draft(
        self, drafter: str, prompt: StreamPrompt, position: int
    ) -> _ShadowDraft | None:
        allowed = min(self._lengths[drafter], prompt.num_output - position - 1)
        if not allowed:
            return None
        drafted, accepted = prompt.ahead[drafter][position - 1]
        return _ShadowDraft(drafter, position, int(drafted), allowed, int(accepted))

    def _catch_up(
        self, drafter: str, prompt: StreamPrompt, position: int, read: dict[str, int]
    ) -> float:
        """Return the seconds in which a drafter reads the text that it has not read.

        The few tokens of the last round are included in the round's own price.
        """
        behind = position - read.get(drafter, -prompt.num_prompt)
        read[drafter] = position
        if behind <= self._lengths[drafter] + 1:
            return 0.0
        return self.prices.catching_up(drafter, behind)
