"""A policy from logged requests alone, each of which tried one arm: no replay, no prices, no models.

A log holds less information than a collection, so it takes more requests, of a policy that explored.
The reward is clocked: the logarithm of tokens per second, so that an arm's gain counts the same on slow
and fast requests. The rewards of arms that were not tried are estimated doubly robustly, and a learner
that needs nothing but rewards learns from them; one that predicts acceptance would need every arm
replayed. Symbols: n requests, F features, A arms.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.config import DEFAULT_OBJECTIVE
from paceline.contracts import NONE, no_progress, split_arm
from paceline.costs.table import CostTable
from paceline.drafting.cascade.calibration import CALIBRATION_FILE, save_calibration
from paceline.errors import StoreError
from paceline.learning.dataset import UNKNOWN, Dataset, drafters_of
from paceline.learning.learn import EVALUATION_FILE, policy_card
from paceline.learning.learners import check_settings, find_learner
from paceline.learning.off_policy import (
    LoggedChoices,
    cross_fitted_rewards,
    doubly_robust,
    doubly_robust_rewards,
)
from paceline.learning.rollout import Logged, adopt, not_compared
from paceline.learning.rounds import RoundTable
from paceline.rewards import REWARD_VERSION
from paceline.selection.artefact import PolicyArtefact, RewardCard, policy_of, save_policy
from paceline.selection.choosers import Situation
from paceline.selection.drift import TrainingRange
from paceline.store import is_validation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.config import LearningSection
    from paceline.contracts import Progress
    from paceline.learning.off_policy import Estimate
    from paceline.learning.rollout import Verdict
    from paceline.selection.artefact import PolicyIdentity
    from paceline.selection.encoders import FeatureEncoder
    from paceline.selection.policies import Policy
    from paceline.store import LoggedDecision

MIN_CHOICES: Final = 200
_SUBSTITUTE: Final = "policy_gradient"  # for learners that need more than rewards
NO_PRICES: Final = ""
"""The cost table's hash in the card of a policy that was learned without one."""


@dataclass(frozen=True, slots=True)
class ChoicesResult:
    """A policy learned from choices, with its estimated gain on logged requests it never saw.

    `gain` is the logarithm of tokens per second relative to the log: 0.1 is about 10% faster.
    """

    policy: Policy
    card: PolicyArtefact
    gain: Estimate
    verdict: Verdict | None  # over the current policy, if one was given
    range: TrainingRange  # of features: acceptance under exploration is not the policy's
    notes: list[str]

    def save(self, folder: Path) -> None:
        """Write the policy and its training range. The chances of cascades stay as they are."""
        self.range.save(folder)
        (folder / EVALUATION_FILE).unlink(missing_ok=True)  # of the policy that was there
        if not (folder / CALIBRATION_FILE).is_file():
            save_calibration(folder, {})  # cascades draft by the chances that are assumed
        save_policy(folder, self.policy.chooser, self.card)


def learn_from_choices(
    decisions: Sequence[LoggedDecision],
    identity: PolicyIdentity,
    section: LearningSection,
    encode: FeatureEncoder,
    current: Policy | None = None,
    on_progress: Progress = no_progress,
) -> ChoicesResult:
    """Train on a part of the usable decisions, and estimate the gain on the rest.

    encode: gives the policy the features that `identity` names. current: the policy that the gain is
    compared with. The learner is the section's if it can learn from choices, else `policy_gradient`.
    Raises StoreError if too few decisions were made by a policy that explored.
    """
    settings = check_settings(section)
    if not find_learner(settings.learner).fits_choices:
        settings = check_settings(section.model_copy(update={"learner": _SUBSTITUTE}))
    learner = find_learner(settings.learner)
    usable, notes = _usable(decisions, identity)
    if len(usable) < MIN_CHOICES:
        raise StoreError(
            f"{len(usable)} of {len(decisions)} logged requests can be learned from, at least "
            f"{MIN_CHOICES} are needed: {'; '.join(notes) or 'serve more'}; without log.tokens: ids "
            "a policy is learned only from what was served with explore > 0"
        )
    tried = {decision.arm for decision in usable}
    arms = [NONE, *sorted(tried - {NONE})]
    log = _arrays(usable, arms)
    held_out = np.array([is_validation(id, settings.held_out) for id in log.ids])
    if min(held_out.sum(), (~held_out).sum()) < 2:
        raise StoreError("the logged requests are all alike; serve more, or more different ones")
    training, unseen = log.rows(~held_out), log.rows(held_out)
    predicted = cross_fitted_rewards(training.choices, training.features, seed=settings.seed)
    if learner.needs_all_arms:
        rewards = doubly_robust_rewards(training.choices, predicted)
    else:
        rewards = np.full(predicted.shape, np.nan)
        rewards[np.arange(len(rewards)), training.choices.chosen] = training.choices.rewards
    clocked = settings.model_copy(update={"reward": "clocked"})
    fitted = learner.fit(_dataset(training, rewards, arms, encode), clocked, on_progress)
    policy = policy_of(fitted.chooser, encode.num_features, settings.objective, encode=encode)
    picks = _picks(policy, arms, unseen)
    predicted = cross_fitted_rewards(unseen.choices, unseen.features, seed=settings.seed)
    gain = doubly_robust(unseen.choices, picks, predicted)
    return ChoicesResult(
        policy,
        policy_card(
            identity,
            settings,
            encode.identities(),
            RewardCard(kind="clocked", version=REWARD_VERSION),
            NO_PRICES,
            {**asdict(fitted.summary), "held_out": asdict(gain)},
        ),
        gain,
        None if current is None else _compare(current, picks, arms, unseen),
        TrainingRange.fit(training.features, {}),
        notes,
    )


def _compare(current: Policy, picks: np.ndarray, arms: Sequence[str], unseen: _Log) -> Verdict:
    """Return whether the candidate, with these picks [n, A], should replace the current policy."""
    if not set(current.arms) <= set(arms):
        reason = "it may choose arms that were never tried: not compared"
        return not_compared(len(unseen.ids), reason)
    of_current = _picks(current, arms, unseen)
    return adopt(Logged(unseen.choices, unseen.features, of_current, picks))


def _picks(policy: Policy, arms: Sequence[str], log: _Log) -> np.ndarray:
    """Return the probability [n, A] of each arm under the policy, at each request's own load."""
    places = [arms.index(arm) for arm in policy.arms]
    distribution = np.zeros((len(log.ids), len(arms)))
    for rows in np.unique(log.rows_in_flight):
        own = log.rows_in_flight == rows
        situation = Situation(log.num_prompt[own], int(rows), policy.objective)
        preferred = policy.chooser.preferences(log.features[own], situation)
        distribution[np.ix_(own, places)] = policy.chooser.distribution(preferred)
    return distribution


def _dataset(
    log: _Log, rewards: np.ndarray, arms: Sequence[str], encode: FeatureEncoder
) -> Dataset:
    """Return the requests as a dataset without rounds, since none were replayed. rewards: [n, A]."""
    n, unknown = len(rewards), np.full(rewards.shape, np.nan)
    return Dataset(
        arms=tuple(arms),
        ids=log.ids,
        groups=log.ids,
        domains=("",) * n,
        prompts=((),) * n,
        features=log.features,
        num_prompt=log.num_prompt,
        num_tokens=log.num_output,
        limits=log.num_output,
        rounds_per_token=unknown,
        drafted_per_token=unknown,
        empty_per_token=unknown,
        calls_per_token=unknown,
        proposed_per_token=unknown,
        composed=(),
        seconds=unknown,
        rewards=rewards,
        trained=np.full((n, len(drafters_of(arms))), UNKNOWN, dtype=np.int8),
        spans=encode.spans,
        rounds=RoundTable((), log.num_prompt, ()),
        costs=CostTable({}, []),
        objective=DEFAULT_OBJECTIVE,
        reward="clocked",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Log:
    ids: tuple[str, ...]  # n; equal for equal features
    features: np.ndarray  # [n, F]
    num_prompt: np.ndarray  # [n] int64
    num_output: np.ndarray  # [n] int64
    rows_in_flight: np.ndarray  # [n] int64
    choices: LoggedChoices  # n

    def rows(self, mask: np.ndarray) -> _Log:
        """Return the requests where a mask [n] is true.

        Their mean reward is subtracted, so that the value of a policy is its gain over the log.
        """
        choices = self.choices.rows(mask)
        return _Log(
            tuple(self.ids[i] for i in np.flatnonzero(mask)),
            self.features[mask],
            self.num_prompt[mask],
            self.num_output[mask],
            self.rows_in_flight[mask],
            replace(choices, rewards=choices.rewards - choices.rewards.mean()),
        )


def _arrays(decisions: Sequence[LoggedDecision], arms: Sequence[str]) -> _Log:
    choices = LoggedChoices(
        chosen=np.array([arms.index(d.arm) for d in decisions]),
        propensities=np.array([d.propensity for d in decisions]),
        rewards=np.array([np.log(d.num_output / d.seconds_total) for d in decisions]),
        num_arms=len(arms),
    )
    features = np.stack([d.features for d in decisions if d.features is not None])
    return _Log(
        # a hash of the features, so that a prompt served twice is on one side of a split
        ids=tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in features),
        features=features,
        num_prompt=np.array([d.num_prompt for d in decisions]),
        num_output=np.array([d.num_output for d in decisions]),
        rows_in_flight=np.array([d.rows_in_flight or 1 for d in decisions]),
        choices=choices,
    )


def _usable(
    decisions: Sequence[LoggedDecision], identity: PolicyIdentity
) -> tuple[list[LoggedDecision], list[str]]:
    usable: list[LoggedDecision] = []
    left_out: Counter[str] = Counter()
    for decision in decisions:
        if reason := _why_not(decision, identity):
            left_out[reason] += 1
        else:
            usable.append(decision)
    return usable, [f"{count} {reason}" for reason, count in left_out.items()]


def _why_not(decision: LoggedDecision, identity: PolicyIdentity) -> str | None:
    header, features = decision.header, decision.features
    same = (header.target, header.tokenizer) == (identity.target, identity.tokenizer)
    if not same or header.drafters != dict(identity.drafters):
        return "were served by another target or other drafters"
    if features is None:
        return "named their drafter, or ended before one was chosen"
    if header.encoders != dict(identity.encoders):
        return "were logged with other features"
    if not np.isfinite(features).all():
        return "have features that are no numbers"
    if decision.finish_reason not in ("stop", "length") or decision.seconds_total <= 0:
        return "did not finish"
    if split_arm(decision.arm)[0] not in identity.drafters:
        return "used an arm that is not configured now"
    if decision.propensity >= 1:
        return "were chosen with certainty"
    return None
