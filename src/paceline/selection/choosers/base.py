"""What ranks arms: the interface of all choosers, in numpy alone.

A chooser sees features and the situation, N prompts at a time; it knows no text, no model and no
file. A *portable* one predicts what an arm would do (rounds a token, those that draft nothing, and
drafted tokens) and has it priced by the machine's cost table at the moment of choosing; any other
carries the prices it was trained with inside. Symbols: N prompts, F features, A arms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np

from paceline.contracts import NONE
from paceline.errors import ArtefactError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from paceline.costs import Objective

    Arrays = Mapping[str, np.ndarray]
    Facts = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Situation:
    """What a price depends on beside the arm, for N prompts.

    rows: requests in flight, this one among them. objective: see `costs.pricing`. limits: the most
    tokens each may emit, where known. prompts: the tokens, for choosers that look at them.
    """

    num_prompt: np.ndarray  # [N] int
    rows: int = 1
    objective: Objective = 0.0
    limits: np.ndarray | None = None  # [N] int
    prompts: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.num_prompt)


class Work(NamedTuple):
    """What arms would do on N prompts; a token is one emitted after the prefill's own."""

    rounds_per_token: np.ndarray  # [N, A]; 1 for `none`
    drafted_per_token: np.ndarray  # [N, A]; 0 for `none`
    empty_per_token: np.ndarray  # [N, A] rounds that draft nothing; 1 for `none`
    num_tokens: np.ndarray  # [N] tokens the answer is expected to have


class Pricer(Protocol):
    """This machine's prices for a list of arms; `costs.pricing.ArmPricer` is one."""

    def seconds_per_token(
        self,
        rounds_per_token: np.ndarray,  # [A]
        drafted_per_token: np.ndarray,  # [A]
        empty_per_token: np.ndarray,  # [A]
        context: float,
        rows: int,
        objective: Objective,
        num_tokens: float,
        num_prompt: int,
    ) -> np.ndarray: ...  # [A]


class Chooser(ABC):
    """Ranks `arms` for prompts. What is learned is in `arrays` and `facts`, and comes back from them.

    portable: whether it is priced when it chooses, see `PortableChooser`.
    """

    kind: ClassVar[str]
    portable: ClassVar[bool] = False
    arms: tuple[str, ...]

    @abstractmethod
    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        """[N, A], greater is better; the scale is the kind's own. features: [N, F]."""

    def distribution(self, preferences: np.ndarray) -> np.ndarray:
        """[N, A] with which it takes each arm: all on the most preferred one, the first of equals."""
        return np.asarray(np.eye(len(self.arms))[preferences.argmax(axis=1)])

    def scores(self, preferences: np.ndarray) -> np.ndarray:
        """[N, A] from preferences [N, A], what a decision reports: here a softmax of them."""
        return softmax(preferences)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was learned, as named arrays."""
        return {}

    def facts(self) -> dict[str, object]:
        """What was learned and is no array, as JSON takes it."""
        return {}

    @classmethod
    def merged(cls, choosers: Sequence[Self]) -> Self | None:
        """One chooser that averages several which were learned alike; None where the kind has none."""
        return None

    @classmethod
    @abstractmethod
    def restore(cls, arms: Sequence[str], arrays: Arrays, facts: Facts) -> Self:
        """The chooser that gave these; raises ValueError, KeyError or TypeError if none could."""


class PortableChooser(Chooser):
    """Predicts work and has it priced live. Its preferences are predicted speeds over `none`."""

    portable: ClassVar[bool] = True
    pricer: Pricer | None = None

    @abstractmethod
    def work(self, features: np.ndarray, situation: Situation) -> Work:
        """What each arm would do on each prompt. features: [N, F]."""

    def seconds_per_token(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        """[N, A] predicted, prefill and the drafter's start included."""
        return price_work(self.pricer, self.work(features, situation), situation)

    def preferences(self, features: np.ndarray, situation: Situation) -> np.ndarray:
        return self.speeds(self.seconds_per_token(features, situation))

    def speeds(self, seconds: np.ndarray) -> np.ndarray:
        """[N, A] over `none`, from seconds per token [N, A]."""
        return np.asarray(seconds[:, [self.arms.index(NONE)]] / seconds)

    def scores(self, preferences: np.ndarray) -> np.ndarray:
        """Predicted speed over `none`, as it is."""
        return preferences


def price_work(
    pricer: Pricer | None, work: Work, situation: Situation, whole: bool = True
) -> np.ndarray:
    """[N, A] seconds per token. An answer is priced at its middle. whole: prefill and the drafter's
    start are spread over its tokens; else the rounds alone are priced.
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
                work.rounds_per_token[i],
                work.drafted_per_token[i],
                work.empty_per_token[i],
                float(context[i]),
                situation.rows,
                situation.objective,
                float(work.num_tokens[i]) if whole else math.inf,
                int(situation.num_prompt[i]),
            )
            for i in range(len(situation))
        ]
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in float64 so that they sum to one."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
