"""Streams of requests decoded on paper: ways to choose arms, round by round, priced and replayed.

What each drafter would have had accepted at every position of a prompt's output is known (`ahead`),
so any schedule of arms can be played through: fixed arms, a policy's choice, bandits that learn from
the rounds they see, and the `AdaptiveController` of the engine. Seconds are the cost table's; a
drafter that has not read the text is charged for reading it, and so are drafts made beside the arm
in use. Knows no model. Symbols: T output tokens, N arms, t rounds so far.
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
    """A prompt with its output's length and what every drafter would do at each place of it."""

    domain: str
    num_prompt: int
    num_output: int  # T
    ahead: Mapping[str, np.ndarray]  # drafter -> [T-1, 2] drafted, accepted at full length
    decision: Decision = field(default_factory=lambda: Decision(NONE))  # the policy's


@dataclass(slots=True)
class StreamOutcome:
    """One request as it went: seconds after its prefill, and rounds by arm."""

    seconds: float = 0.0
    plain_seconds: float = 0.0
    rounds: dict[str, int] = field(default_factory=dict)
    switches: int = 0


class StreamMethod(ABC):
    """A way to choose arms. `seen` is None before a request's first round."""

    name: str

    @abstractmethod
    def begin(self, number: int, prompt: StreamPrompt) -> str:
        """The arm of a request's first round."""

    def shadow_drafters(self, number: int) -> Sequence[str]:
        """Drafters that make a draft beside the arm in use in the next round."""
        return ()

    def after_round(self, number: int, seen: RoundReport) -> str | None:
        """The arm to go on with, None for the same."""
        return None

    def end(self, number: int) -> None:  # noqa: B027 - most keep nothing of a request
        """The request is over."""


class Fixed(StreamMethod):
    """One arm for all."""

    def __init__(self, arm: str) -> None:
        self.name = f"fixed {arm}"
        self._arm = arm

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        return self._arm


class Offline(StreamMethod):
    """The policy's choice before the first round, kept to the end."""

    name = "policy"

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        return prompt.decision.arm


class Controlled(StreamMethod):
    """The engine's controller; `with_policy` gives it the policy's prediction as prior, else nothing."""

    def __init__(self, name: str, controller: AdaptiveController, with_policy: bool = True) -> None:
        self.name = name
        self._watch = controller
        self._with_policy = with_policy

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        context = Context(
            range(prompt.num_prompt), _NO_STATE, _NO_STATE, SamplingParams(), rows_in_flight=1
        )
        decision = prompt.decision if self._with_policy else Decision(NONE)
        return self._watch.begin(number, context, decision, prompt.num_output - 1).arm

    def shadow_drafters(self, number: int) -> Sequence[str]:
        return self._watch.shadow_drafters(number)

    def after_round(self, number: int, seen: RoundReport) -> str | None:
        return self._watch.after_round(number, seen)

    def end(self, number: int) -> None:
        self._watch.end(number)


class _Bandit(StreamMethod):
    """Learns the speed of arms, emitted tokens a plain round's time, from the rounds they are given.

    `forgets` begins anew with every request, as the published bandits over drafters do.
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
    def _reset(self) -> None: ...

    @abstractmethod
    def _pick(self) -> int: ...

    @abstractmethod
    def _learn(self, arm: int, reward: float) -> None:
        """reward: in [0, 1], the arm's speed over a speed that no arm reaches."""

    def begin(self, number: int, prompt: StreamPrompt) -> str:
        if self._forgets:
            self._reset()
        return self._arms[self._pick()]

    def after_round(self, number: int, seen: RoundReport) -> str | None:
        plain = self._prices.rounds(NONE, seen.context, seen.rows)[0]
        speed = seen.emitted * plain / (seen.draft_seconds + seen.other_seconds)
        self._learn(self._arms.index(seen.arm), min(1.0, speed / _FASTEST))
        return self._arms[self._pick()]


_FASTEST: Final = 8.0  # times plain decoding


class UCB(_Bandit):
    """UCB1: the arm whose mean reward plus sqrt(2 ln t / n) is largest; every arm once at first."""

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
    """EXP3 with importance-weighted losses at the anytime rate sqrt(ln N / (t N))."""

    def _reset(self) -> None:
        self._losses = np.zeros(len(self._arms))
        self._num_rounds = 1

    def _law(self) -> np.ndarray:
        rate = sqrt(log(max(2, len(self._arms))) / (self._num_rounds * len(self._arms)))
        weights = np.exp(-rate * (self._losses - self._losses.min()))
        return np.asarray(weights / weights.sum())

    def _pick(self) -> int:
        self._drawn_from = self._law()
        return int(self._random.choice(len(self._arms), p=self._drawn_from))

    def _learn(self, arm: int, reward: float) -> None:
        self._losses[arm] += (1.0 - reward) / self._drawn_from[arm]
        self._num_rounds += 1


# --- playing them through -------------------------------------------------------------------------


@dataclass(slots=True)
class _ShadowDraft:
    """A draft made beside the arm in use, whose worth the text has yet to tell."""

    drafter: str
    position: int
    drafted: int
    allowed: int
    accepted: int
    known: int = 0

    def tell(self, position: int) -> DraftOutcome:
        visible = position - self.position
        right = min(self.accepted, visible)
        outcomes = DraftOutcome.of(
            self.drafter, self.drafted, self.allowed, right, visible, self.known
        )
        self.known = right
        return outcomes


class Stream:
    """Prompts played through under one way to choose after the other.

    noise: standard deviation of the logarithm of a round's seconds, to see what a restless clock does.
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

    def play(self, way: StreamMethod) -> list[StreamOutcome]:
        """Every request, one after the other."""
        clock = np.random.default_rng(self._seed)
        return [self._request(way, i, prompt, clock) for i, prompt in enumerate(self.prompts)]

    def _request(
        self, way: StreamMethod, number: int, prompt: StreamPrompt, clock: np.random.Generator
    ) -> StreamOutcome:
        result = StreamOutcome()
        arm = self.arms[way.begin(number, prompt)]
        read: dict[str, int] = {}  # drafter -> output positions it has read, the prompt with them
        beside: list[_ShadowDraft] = []
        position = 1
        while position < prompt.num_output:
            context = prompt.num_prompt + position - 1
            start = self._catch_up(arm.drafter, prompt, position, read)
            drafting = 0.0
            for drafter in way.shadow_drafters(number):
                start += self._catch_up(drafter, prompt, position, read)
                draft = self._shadows(drafter, prompt, position)
                if draft is not None:
                    beside.append(draft)
                    drafting += self.prices.drafting(drafter, draft.drafted, context)
            allowed = min(arm.num_draft_tokens, prompt.num_output - position - 1)
            drafted, accepted = self._round(arm, prompt, position)
            emitted = min(accepted + 1, prompt.num_output - position)
            own = self.prices.drafting(arm.drafter, drafted, context)
            other = float(self.prices.rounds(arm.drafter, context, 1)[drafted]) - own
            other *= exp(self._noise * clock.standard_normal()) if self._noise else 1.0
            for place in range(emitted):
                result.plain_seconds += float(self.prices.rounds(NONE, context + place, 1)[0])
            position += emitted
            result.seconds += start + drafting + own + other
            result.rounds[arm.name] = result.rounds.get(arm.name, 0) + 1
            outcomes = [draft.tell(position) for draft in beside]
            beside = [
                draft for draft, one in zip(beside, outcomes, strict=True) if not one.is_final
            ]
            if allowed:
                outcomes.append(
                    DraftOutcome.of(arm.drafter, drafted, allowed, accepted, accepted + 1)
                )
            seen = RoundReport(
                arm.name, RoundStats(drafted, accepted), emitted, context, 1,
                prompt.num_output - position, outcomes, start, drafting + own, other,
            )  # fmt: skip
            wanted = way.after_round(number, seen)
            if wanted is not None and wanted != arm.name:
                arm = self.arms[wanted]
                result.switches += 1
        way.end(number)
        return result

    def _round(self, arm: Arm, prompt: StreamPrompt, position: int) -> tuple[int, int]:
        if not arm.num_draft_tokens:
            return 0, 0
        drafted, accepted = prompt.ahead[arm.drafter][position - 1]
        k = arm.num_draft_tokens
        return min(k, int(drafted)), min(k, int(accepted))

    def _shadows(self, drafter: str, prompt: StreamPrompt, position: int) -> _ShadowDraft | None:
        allowed = min(self._lengths[drafter], prompt.num_output - position - 1)
        if not allowed:
            return None
        drafted, accepted = prompt.ahead[drafter][position - 1]
        return _ShadowDraft(drafter, position, int(drafted), allowed, int(accepted))

    def _catch_up(
        self, drafter: str, prompt: StreamPrompt, position: int, read: dict[str, int]
    ) -> float:
        """Seconds of reading what the drafter has not; a round's own few tokens are in its price."""
        behind = position - read.get(drafter, -prompt.num_prompt)
        read[drafter] = position
        if behind <= self._lengths[drafter] + 1:
            return 0.0
        return self.prices.catching_up(drafter, behind)
