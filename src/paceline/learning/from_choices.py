"""A policy from logged requests alone, each of which tried one arm: no replay, no prices, no models.

Less is known than from a collection, so more requests are needed, and only a log of a policy that
explored can be learned from. The reward is by the clock: the logarithm of tokens per second, so that
an arm's gain counts the same on slow and fast requests. Each request's missing rewards are filled in
doubly robustly, and the learner is the same as for full information.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.errors import StoreError
from paceline.learning.off_policy import (
    LoggedChoices,
    cross_fitted_rewards,
    doubly_robust,
    doubly_robust_rewards,
)
from paceline.learning.reinforce import train
from paceline.learning.rollout import Logged, adopt
from paceline.rewards import REWARD_VERSION
from paceline.selection.artefact import PolicyArtefact, RewardCard, network_policy, save_policy
from paceline.selection.drift import TrainingRange
from paceline.selection.features import FEATURE_VERSION, num_features
from paceline.store import is_validation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.config import LearningSection
    from paceline.learning.off_policy import Estimate
    from paceline.learning.reinforce import Progress
    from paceline.learning.rollout import Verdict
    from paceline.selection.artefact import PolicyIdentity
    from paceline.selection.policies import NetworkPolicy
    from paceline.store import LoggedDecision

MIN_CHOICES: Final = 200
NO_PRICES: Final = ""
"""Stands for a cost table's hash in the card of a policy that was learned without one."""


@dataclass(frozen=True, slots=True)
class ChoicesResult:
    """A policy learned from choices, with what it would gain on logged requests it never saw.

    `gain` is in the logarithm of tokens per second, over what was served: 0.1 is some 10% faster.
    """

    policy: NetworkPolicy
    card: PolicyArtefact
    gain: Estimate
    verdict: Verdict | None  # over the current policy, where one was given
    range: TrainingRange  # of features: acceptance under exploration is not the policy's
    notes: list[str]

    def save(self, folder: Path) -> None:
        """Write the policy, and its training range beside it."""
        self.range.save(folder)
        save_policy(folder, self.policy.network, self.card)


def learn_from_choices(
    decisions: Sequence[LoggedDecision],
    identity: PolicyIdentity,
    settings: LearningSection,
    current: NetworkPolicy | None = None,
    on_progress: Progress = lambda stage, done, total: None,
) -> ChoicesResult:
    """Train on a part of the usable decisions, estimate the gain, also over `current`, on the rest.

    Raises StoreError where too few were made by a policy that explored.
    """
    arms = list(identity.arms)
    usable, notes = _usable(decisions, identity)
    if len(usable) < MIN_CHOICES:
        raise StoreError(
            f"{len(usable)} of {len(decisions)} logged requests can be learned from, at least "
            f"{MIN_CHOICES} are needed: {'; '.join(notes) or 'serve more'}; without log.tokens: ids "
            "a policy is learned only from what was served with explore > 0"
        )
    log = _arrays(usable, arms)
    held_out = np.array(
        # by what the policy saw, so that a prompt served twice is on one side
        [
            is_validation(hashlib.sha256(row.tobytes()).hexdigest(), settings.held_out)
            for row in log.features
        ]
    )
    if min(held_out.sum(), (~held_out).sum()) < 2:
        raise StoreError("the logged requests are all alike; serve more, or more different ones")
    training, unseen = log.rows(~held_out), log.rows(held_out)
    predicted = cross_fitted_rewards(training.choices, training.features, seed=settings.seed)
    filled = doubly_robust_rewards(training.choices, predicted)
    network, summary = train(training.features, filled, settings, on_progress)
    policy = network_policy(network, arms)
    picks = _picks(policy, arms, unseen.features)
    gain = doubly_robust(
        unseen.choices,
        picks,
        cross_fitted_rewards(unseen.choices, unseen.features, seed=settings.seed),
    )
    card = PolicyArtefact(
        target=identity.target,
        tokenizer=identity.tokenizer,
        hidden_size=identity.hidden_size,
        arms=list(identity.arms.items()),
        reward=RewardCard(kind="clocked", version=REWARD_VERSION),
        costs=NO_PRICES,
        learner=settings.model_dump(),
        training={**asdict(summary), "held_out": asdict(gain)},
    )
    verdict = None
    if current is not None:
        of_current = _picks(current, arms, unseen.features)
        verdict = adopt(Logged(unseen.choices, unseen.features, of_current, picks))
    seen = TrainingRange.fit(training.features, {})
    return ChoicesResult(policy, card, gain, verdict, seen, notes)


def _picks(policy: NetworkPolicy, arms: Sequence[str], features: np.ndarray) -> np.ndarray:
    """[n, A] one where the policy would choose the arm, else zero."""
    places = np.array([arms.index(arm) for arm in policy.arms])
    chosen = places[policy.network.logits(features).argmax(axis=1)]
    return np.asarray(np.eye(len(arms))[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class _Log:
    """Decisions as arrays."""

    features: np.ndarray  # [n, F]
    choices: LoggedChoices  # n

    def rows(self, mask: np.ndarray) -> _Log:
        """Where a mask [n] is true; rewards are then measured from their own mean, so that the value
        of a policy is its gain over what was served.
        """
        of = self.choices
        rewards = of.rewards[mask] - of.rewards[mask].mean()
        choices = LoggedChoices(of.chosen[mask], of.propensities[mask], rewards, of.num_arms)
        return _Log(self.features[mask], choices)


def _arrays(decisions: Sequence[LoggedDecision], arms: Sequence[str]) -> _Log:
    choices = LoggedChoices(
        chosen=np.array([arms.index(d.arm) for d in decisions]),
        propensities=np.array([d.propensity for d in decisions]),
        rewards=np.array([np.log(d.num_output / d.seconds_total) for d in decisions]),
        num_arms=len(arms),
    )
    return _Log(np.stack([d.features for d in decisions if d.features is not None]), choices)


def _usable(
    decisions: Sequence[LoggedDecision], identity: PolicyIdentity
) -> tuple[list[LoggedDecision], list[str]]:
    """(decisions to learn from, how many were left out and why)."""
    width = num_features(identity.hidden_size)
    usable: list[LoggedDecision] = []
    left_out: Counter[str] = Counter()
    for decision in decisions:
        if reason := _why_not(decision, identity, width):
            left_out[reason] += 1
        else:
            usable.append(decision)
    return usable, [f"{count} {reason}" for reason, count in left_out.items()]


def _why_not(decision: LoggedDecision, identity: PolicyIdentity, width: int) -> str | None:
    header, features = decision.header, decision.features
    same = (header.target, header.tokenizer) == (identity.target, identity.tokenizer)
    if not same or any(header.arms.get(arm) != line for arm, line in identity.arms.items()):
        return "were served by another target or other drafters"
    if features is None:
        return "named their drafter, or ended before one was chosen"
    if header.feature_version != FEATURE_VERSION or features.shape != (width,):
        return "were logged with other features"
    if not np.isfinite(features).all():
        return "have features that are no numbers"
    if decision.finish_reason not in ("stop", "length") or decision.seconds_total <= 0:
        return "did not finish"
    if decision.switches:
        return "changed their arm on the way"
    if decision.arm not in identity.arms:
        return "used an arm that is not configured now"
    if decision.propensity >= 1:
        return "were chosen with certainty"
    return None
