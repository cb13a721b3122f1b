"""The interface of learners, which turn a dataset into a chooser, and how they judge themselves.

A learner sees the training part only. It holds out some of these prompts again, to find its own
settings and to see whether its chooser gains more than the best single arm. Symbols: N prompts, A
arms, L loads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Final, Generic, TypeVar

import numpy as np
from pydantic import ConfigDict

from paceline.config import LearningSection, parse
from paceline.errors import StoreError
from paceline.selection.choosers import Chooser, FixedChooser, PortableChooser, Reduction
from paceline.selection.features import standardisation, standardise
from paceline.store import hash_share

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset

NUM_FOLDS: Final = 5
_HALF: Final = "half: "  # before a name that is hashed
_WIDE_BLOCK: Final = 16  # features; a block with more is one source with many outputs
CROSS_VALIDATE_UP_TO: Final = 1000  # prompts; beyond, one fold is large enough to judge by


class LearnerSettings(LearningSection):
    """The section `learning` for one learner; a learner with options adds them in a subclass."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a training, judged on prompts of the training part that were not learned from.

    Nor did they choose what they judge: see `earned_unselected`.

    score: the mean reward there, over the trained loads. gain: its difference to the best single
    arm's, `gain_error` the standard error. constant: the chooser is the best single arm, because the
    gain was not distinct from 0. settings: values that the learner found by itself.
    """

    num_prompts: int
    num_validation: int
    score: float
    gain: float
    gain_error: float
    constant: bool
    settings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def judged(
        cls,
        num_prompts: int,
        earned: np.ndarray,
        single: np.ndarray,
        settings: Mapping[str, float] | None = None,
    ) -> Summary:
        """Return the summary for rewards [n] on prompts not learned from.

        single: [n] the best single arm's rewards on the same prompts.
        """
        gain, error = gain_over_single(earned, single)
        return cls(
            num_prompts=num_prompts,
            num_validation=len(earned),
            score=float(np.nanmean(earned)),
            gain=gain,
            gain_error=error,
            constant=bool(gain <= error),
            settings=dict(settings or {}),
        )


@dataclass(frozen=True, slots=True)
class Curve:
    """A learning curve: the score on prompts not learned from, by the quantity in `label`."""

    label: str
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Fitted:
    """The result of a learner."""

    chooser: Chooser
    summary: Summary
    curve: Curve


S = TypeVar("S", bound=LearnerSettings)


class Learner(ABC, Generic[S]):
    """One way to learn; `learners.LEARNERS` lists them all.

    Settings: the section `learning` with this learner's options. chooser: the class that it fits,
    unless the best single arm wins. search_space: range of each option that `--search` tries, on a
    logarithmic scale. predicts_work: the chooser predicts rounds and is priced in seconds, so the
    reward can only be `speed`. fits_choices: it can learn from rewards alone, without replayed rounds,
    so from logged choices. needs_all_arms: the rewards of arms that were not tried must be estimated;
    otherwise they may be NaN.
    """

    name: str
    Settings: type[S]
    chooser: ClassVar[type[Chooser]]
    search_space: ClassVar[Mapping[str, tuple[float, float]]] = {}
    predicts_work: ClassVar[bool] = False
    fits_choices: ClassVar[bool] = False
    needs_all_arms: ClassVar[bool] = True

    @abstractmethod
    def fit(self, data: Dataset, settings: S, on_progress: Progress) -> Fitted:
        """Learn from the training part; deterministic in the settings' seed."""

    def settings(self, section: LearningSection) -> S:
        """Return the section as this learner's settings, without the options of other learners.

        Raises ConfigError for an option out of range.
        """
        options = self.Settings.model_fields
        own = {name: value for name, value in section.model_dump().items() if name in options}
        return parse(self.Settings, own | {"learner": self.name}, "learning")


def make_folds(groups: Sequence[str], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return NUM_FOLDS pairs (rows to learn from, other rows); rows of one group stay together.

    Raises StoreError if there are fewer groups than folds.
    """
    from sklearn.model_selection import GroupKFold

    if (num_groups := len(set(groups))) < NUM_FOLDS:
        raise StoreError(
            f"{num_groups} different prompts are too few to learn from, at least {NUM_FOLDS} are "
            "needed; run `paceline collect PROMPTS` with more prompts"
        )
    folds = GroupKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    return list(folds.split(groups, groups=groups))


def judged_folds(data: Dataset, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the folds that a learner judges itself on, see `make_folds`."""
    folds = make_folds(data.groups, seed)
    return folds if len(data) <= CROSS_VALIDATE_UP_TO else folds[:1]


def rewards_by_load(data: Dataset, settings: LearningSection) -> np.ndarray:
    """Return rewards [L, N, A] under each of the settings' loads; L is 1 where no load matters."""
    if settings.reward != "speed":
        return data.rewards[None]
    return np.stack([data.rewards_for(rows) for rows in settings.loads])


def best_single(data: Dataset, rewards: np.ndarray, settings: LearningSection) -> FixedChooser:
    """Return the chooser of the arm with the largest mean reward, by load. rewards: [L, N, A]."""
    loads = settings.loads if len(rewards) == len(settings.loads) else (1,)
    best = rewards.mean(axis=1).argmax(axis=1)
    return FixedChooser(
        data.arms, {rows: data.arms[a] for rows, a in zip(loads, best, strict=True)}
    )


def gain_over_single(earned: np.ndarray, single: np.ndarray) -> tuple[float, float]:
    """Return (mean, standard error) of the difference over prompts. earned, single: [n] rewards.

    Where only some arms were tried a reward may not be a number; then the means of those known are
    compared.
    """
    known = np.isfinite(earned), np.isfinite(single)
    if all(mask.all() for mask in known):
        gain = earned - single
        return float(gain.mean()), float(gain.std() / np.sqrt(max(len(gain), 1)))
    parts = [values[mask] for values, mask in zip((earned, single), known, strict=True)]
    if not all(map(len, parts)):
        return 0.0, float("inf")
    error = sum(float(part.var()) / len(part) for part in parts) ** 0.5
    return float(parts[0].mean() - parts[1].mean()), error


def cross_validate(
    data: Dataset,
    rewards: np.ndarray,
    settings: LearningSection,
    make: Callable[[Dataset, np.ndarray], Chooser],
) -> tuple[np.ndarray, np.ndarray]:
    """Return ([n], [n]) mean rewards over the loads: of choosers that had not seen the prompt, and of
    the arm that is best in hindsight.

    rewards: [L, N, A]. make: called with rows and their rewards, returns a chooser.
    """
    earned, single = [], []
    best = np.nanmean(rewards, axis=1).argmax(axis=1)  # [L]
    for rest, own in judged_folds(data, settings.seed):
        chooser = make(data.rows(rest), rewards[:, rest])
        earned.append(earned_by(chooser, data.rows(own), rewards[:, own], settings))
        single.append(rewards[np.arange(len(best))[:, None], own, best[:, None]].mean(axis=0))
    return np.concatenate(earned), np.concatenate(single)


def judged_groups(data: Dataset, seed: int) -> list[str]:
    """Return the prompts' names in the order in which `judged_folds` judges their rows."""
    return [data.groups[i] for _, own in judged_folds(data, seed) for i in own]


def earned_unselected(
    earned: np.ndarray,
    scores: np.ndarray,
    groups: Sequence[str],
    pick: Callable[[np.ndarray], int] = lambda means: int(means.argmax()),
) -> np.ndarray:
    """Return rewards [n], each of the candidate that other prompts chose.

    The best of many candidates looks better than it is on the prompts that chose it. So each half of the
    prompts is judged under the candidate of the other half. earned, scores: [candidates, n]; pick:
    chooses a candidate by the mean scores.
    """
    half = np.array([hash_share(f"{_HALF}{group}") < 0.5 for group in groups])  # [n]
    if half.all() or not half.any():
        return np.asarray(earned[pick(scores.mean(axis=1))])
    found = np.empty(earned.shape[1])
    for own in (half, ~half):
        found[own] = earned[pick(scores[:, ~own].mean(axis=1)), own]
    return found


def first_best(scores: np.ndarray, least_gain: float) -> int:
    """Return the place of the last score that exceeds all before it by `least_gain`. scores: [n]."""
    best, highest = 0, -np.inf
    for place, score in enumerate(scores.tolist()):
        if score > highest + least_gain:
            best, highest = place, score
    return best


def earned_by(
    chooser: Chooser, data: Dataset, rewards: np.ndarray, settings: LearningSection
) -> np.ndarray:
    """Return [N] mean rewards over the loads of the chooser's arms. rewards: [L, N, A]."""
    if isinstance(chooser, PortableChooser) and chooser.pricer is None:
        chooser.pricer = data.pricer()
    loads = settings.loads if len(rewards) == len(settings.loads) else (1,)
    distributions = (
        chooser.distribution(chooser.preferences(data.features, data.situation(rows)))
        for rows in loads
    )
    # an arm that is not taken counts for nothing, also where its reward is not known
    earned = [
        np.where(distribution > 0, distribution * own, 0.0).sum(axis=1)
        for distribution, own in zip(distributions, rewards, strict=True)
    ]
    return np.asarray(np.mean(earned, axis=0))


def outcomes_of(data: Dataset) -> np.ndarray:
    """Return [N, O] what portable choosers predict.

    These are the rates of rounds, of drafted tokens and of rounds without a draft; of cascades the
    rates of a model's calls and of their tokens; and the logarithm of the number of tokens after the
    first.
    """
    tokens = np.log(np.maximum(data.num_tokens - 1, 1))[:, None]
    rates = [data.rounds_per_token, data.drafted_per_token, data.empty_per_token]
    composed = list(data.composed)
    rates += [data.calls_per_token[:, composed], data.proposed_per_token[:, composed]]
    return np.hstack([*rates, tokens])


def outcome_weights(data: Dataset) -> np.ndarray:
    """Return the weights [N, O] of outcomes, with mean 1 per outcome.

    The rates of a prompt weigh in proportion to its tokens, since the seconds of all prompts add up in
    that proportion; all lengths weigh the same.
    """
    tokens = np.maximum(data.num_tokens - 1, 1).astype(np.float64)
    weights = np.repeat((tokens / tokens.mean())[:, None], outcomes_of(data).shape[1], axis=1)
    weights[:, -1] = 1.0
    return weights


_EVERYWHERE: Final = np.full(2, np.finfo(np.float32).max)
_NEAR: Final = 0.99  # share of prompts like those in training that count as near
_FAR: Final = 1.1  # times the distance of the near ones

# --- features as learners read them: standardised, weighted by block, reduced to components ---------


def block_weights(spans: Mapping[str, slice], num_features: int, wide: float = 1.0) -> np.ndarray:
    """Return [F] float32: a wide block, such as all hidden states, weighs `wide` times one statistic.

    Without weights hundreds of hidden units, which fit a few hundred prompts in many ways, would
    outweigh a statistic such as the repetition within a prompt.
    """
    weights = np.ones(num_features, dtype=np.float32)
    for span in spans.values():
        width = span.stop - span.start
        if width > _WIDE_BLOCK:
            weights[span] = wide * width**-0.5
    return weights


def reduce(features: np.ndarray, weights: np.ndarray, num_components: int) -> Reduction:
    """Return the at most `num_components` directions in which weighted features [N, F] vary most."""
    from sklearn.decomposition import PCA

    mean, scale = standardisation(features)
    inputs = (standardise(features, mean, scale) * weights).astype(np.float64)
    N, F = inputs.shape
    # without a solver PCA would draw random projections for large inputs
    pca = PCA(min(num_components, N, F), svd_solver="covariance_eigh" if N > F else "full")
    with np.errstate(invalid="ignore"):  # inputs that do not vary at all
        pca.fit(inputs)
    values = pca.explained_variance_  # [Z], falling
    kept = values > 1e-9 * max(values.max(), 1e-30)
    basis = pca.components_[kept].T  # [F, Z]
    return Reduction(
        mean=mean,
        scale=scale,
        basis=(weights[:, None] * basis).astype(np.float32),
        centre=(pca.mean_ @ basis).astype(np.float32),
        weights=weights,
        bounds=_EVERYWHERE,
    )


def bounded(reduction: Reduction, data: Dataset, seed: int) -> Reduction:
    """Return a reduction of the data's features that tells prompts unlike the data's from others.

    How far new prompts of the same kind lie from all directions is measured in folds: reduced by the
    others' directions, all but the last percent of them are near.
    """
    distances = [
        reduce(data.features[rest], reduction.weights, reduction.num_components).distance(
            data.features[own]
        )
        for rest, own in make_folds(data.groups, seed)
    ]
    near = np.quantile(np.concatenate(distances), _NEAR)
    return replace(reduction, bounds=np.array([near, _FAR * near], dtype=np.float32))
