"""The interface of choosers, which rank arms; in numpy alone.

A chooser sees features and the situation, N prompts at a time; it knows no text, no model and no
file. A *portable* one predicts an arm's work (rounds, rounds without a draft and drafted tokens, each
per token), and the machine's cost table prices it at the moment of choosing; any other has the prices
of its training built in. Symbols: N prompts, F features, A arms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from paceline.config import DEFAULT_OBJECTIVE
from paceline.contracts import NONE
from paceline.costs.pricing import ArmRates
from paceline.errors import ArtefactError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from paceline.costs.pricing import ArmPricer, Objective

    Arrays = Mapping[str, np.ndarray]
    Facts = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Situation:
    """Facts about N prompts that prices depend on, in addition to the arm.

    rows: requests in flight, this one included. objective: see `costs.pricing`. limits: the maximum
    number of tokens of each answer, if known. prompts: the tokens, for choosers that read them.
    drafters_in_flight: as in `Context`; empty in learning and evaluation, where the other rows are
    unknown and priced as if they all took the same arm.
    """

    num_prompt: np.ndarray  # [N] int
    rows: int = 1
    objective: Objective = DEFAULT_OBJECTIVE
    limits: np.ndarray | None = None  # [N] int
    prompts: Sequence[Sequence[int]] = ()
    drafters_in_flight: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.num_prompt)


class Work(NamedTuple):
    """The predicted work of arms on N prompts; the prefill's own token does not count."""

    rounds_per_token: np.ndarray  # [N, A]; 1 for `none`
    drafted_per_token: np.ndarray  # [N, A]; 0 for `none`
    empty_per_token: np.ndarray  # [N, A] rounds without a draft; 1 for `none`
    calls_per_token: np.ndarray  # [N, A] proposals of the costly kind, see `pricing.ArmRates`
    proposed_per_token: np.ndarray  # [N, A] their tokens
    num_tokens: np.ndarray  # [N] expected tokens of the answer


class Chooser(ABC):
    """A ranking of `arms` for prompts. Its learned values are in `arrays` and `facts`.

    portable: it is priced when it chooses, see `PortableChooser`.
    """

    kind: ClassVar[str]
    portable: ClassVar[bool] = False
    arms: tuple[str, ...]

    @abstractmethod
    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        """Return preferences [N, A], greater is better, on a scale of each kind. features: [N, F]."""

    def distribution(self, preferences: np.ndarray) -> np.ndarray:
        """Return the probability of each arm, [N, A]: 1 for the most preferred, the first of equals."""
        return np.asarray(np.eye(len(self.arms))[preferences.argmax(axis=1)])

    def scores(self, preferences: np.ndarray) -> np.ndarray:
        """Return the scores [N, A] that a decision reports: a softmax of the preferences [N, A]."""
        return softmax(preferences)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the learned arrays by name."""
        return {}

    def facts(self) -> dict[str, object]:
        """Return the learned values that are no arrays, ready for JSON."""
        return {}

    @classmethod
    def merged(cls, choosers: Sequence[Self]) -> Self | None:
        """Return the average of choosers of several seeds, or None if this kind has no average."""
        return None

    @classmethod
    @abstractmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> Self:
        """Return the chooser with these arrays and facts.

        Raises ValueError, KeyError or TypeError if they are not this kind's.
        """


class PortableChooser(Chooser):
    """A chooser that predicts work, priced live. It prefers by predicted speed-up over `none`."""

    portable: ClassVar[bool] = True
    pricer: ArmPricer | None = None

    @abstractmethod
    def work(self, features: np.ndarray, situation: Situation) -> Work:
        """Return the predicted work of each arm on each prompt. features: [N, F]."""

    def seconds_per_token(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        """Return the prediction [N, A], prefill and the drafter's start included."""
        return price_work(self.pricer, self.work(features, situation), situation)

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        return self.speeds(self.seconds_per_token(features, situation))

    def speeds(self, seconds: np.ndarray) -> np.ndarray:
        """Return speed-ups [N, A] over `none`, from seconds per token [N, A]."""
        return np.asarray(seconds[:, [self.arms.index(NONE)]] / seconds)

    def scores(self, preferences: np.ndarray) -> np.ndarray:
        return preferences


def price_work(
    pricer: ArmPricer | None, work: Work, situation: Situation, whole: bool = True
) -> np.ndarray:
    """Return seconds per token [N, A], at the context in the middle of the answer.

    whole: prefill and the drafter's start are spread over the tokens; otherwise only rounds are priced.
    Raises ArtefactError without prices.
    """
    if pricer is None:
        raise ArtefactError(
            "this policy is priced with the machine's cost table, and there is none; run "
            "`paceline profile`"
        )
    context = situation.num_prompt + work.num_tokens / 2  # [N]
    return np.stack(
        [
            pricer.seconds_per_token(
                ArmRates(
                    work.rounds_per_token[i],
                    work.drafted_per_token[i],
                    work.empty_per_token[i],
                    work.calls_per_token[i],
                    work.proposed_per_token[i],
                ),
                float(context[i]),
                situation.rows,
                situation.objective,
                float(work.num_tokens[i]) if whole else math.inf,
                int(situation.num_prompt[i]),
                situation.drafters_in_flight,
            )
            for i in range(len(situation))
        ]
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis, in float64 so that they sum to one."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
