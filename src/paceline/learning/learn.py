"""From a collection and prices to a policy and its predicted gain: dataset, training, evaluation.

No model runs here. The policy that is evaluated is the one that is returned: the held-out prompts
take no part in training, nor in the decision when to stop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from paceline.contracts import NONE, no_progress
from paceline.drafting.cascade.calibration import save_calibration
from paceline.errors import ArtefactError, ConfigError, StoreError
from paceline.files import write_atomically
from paceline.learning.dataset import build_dataset, split
from paceline.learning.evaluation import POLICY, EvaluationReport, evaluate_chooser, unseen_part
from paceline.learning.learners import check_settings, find_learner
from paceline.learning.learners.base import Fitted
from paceline.learning.plot import plot, speed_by_prompts
from paceline.learning.search import search as search_settings
from paceline.plotting import import_figure
from paceline.replay import rounds_of
from paceline.rewards import REWARD_VERSION
from paceline.selection.artefact import PolicyArtefact, RewardCard, policy_of, save_policy
from paceline.selection.choosers import PortableChooser
from paceline.selection.drift import MIN_PROMPTS, RANGE_FILE, TrainingRange
from paceline.selection.encoders import build_encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.config import LearningSection
    from paceline.contracts import Progress
    from paceline.costs.table import CostTable
    from paceline.drafting.cascade.calibration import Calibration
    from paceline.learning.dataset import Dataset
    from paceline.learning.learners import Curve, Learner, LearnerSettings, Summary
    from paceline.selection.artefact import PolicyIdentity
    from paceline.selection.choosers import Chooser
    from paceline.selection.encoders import FeatureEncoder
    from paceline.selection.policies import Policy
    from paceline.store.records import CollectedPrompt

EVALUATION_FILE: Final = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Seeds:
    """Scores of the seeds, in their order, and the result kept: their `average` or the `best`."""

    scores: tuple[float, ...]
    kept: str

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; 0 for one seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class LearningResult:
    """A policy ready to choose, with the facts of its training and its predicted gain."""

    policy: Policy
    report: EvaluationReport
    training: Summary
    seeds: Seeds
    curve: Curve
    card: PolicyArtefact
    range: TrainingRange | None  # of features and acceptance; None where prompts are too few
    calibration: Calibration  # of cascades

    def save(self, folder: Path | str) -> None:
        """Write the policy, and next to it the report as evaluation.json and the training range.

        Raises ArtefactError if the folder cannot be written.
        """
        try:
            if self.range is not None:
                self.range.save(Path(folder))
            else:
                (Path(folder) / RANGE_FILE).unlink(missing_ok=True)  # another policy's
            save_calibration(Path(folder), self.calibration)
            write_atomically(Path(folder) / EVALUATION_FILE, self.report.to_json().encode())
        except OSError as error:
            raise ArtefactError(f"{folder}: cannot be written ({error})") from error
        save_policy(Path(folder), self.policy.chooser, self.card)


def train_policy(
    prompts: Sequence[CollectedPrompt],
    costs: CostTable,
    identity: PolicyIdentity,
    arms: Sequence[str],
    section: LearningSection,
    on_progress: Progress = no_progress,
    encode: FeatureEncoder | None = None,
    search: int = 0,
    figure: Path | None = None,
    calibration: Calibration | None = None,
) -> LearningResult:
    """Train on the training part, evaluate on the held-out part.

    identity: the target, tokenizer and drafters of the policy; the collection and the cost table must
    have the same. arms: those to choose among, see `drafting.catalog.arms_of`. encode: gives the
    returned policy its features, by default the default encoders. search: number of trials of the
    learner's options before the training. figure: the PNG to draw the learning curves into.
    calibration: of the cascades, saved with the policy. Raises
    ConfigError, StoreError or ArtefactError, each with what to change.
    """
    if figure is not None:
        import_figure()  # before the work is done rather than after
    settings = check_settings(section)
    check_reward(settings)
    costs.check(identity.drafters, identity.drafters, identity.target)
    dataset, notes = build_dataset(prompts, arms, costs, settings)
    encode = encode or build_encoder(identity.hidden_size)
    check_features(dataset, identity, encode)
    training_part, held_out = split(dataset, settings.held_out)
    if search:
        settings = search_settings(training_part, settings, search, on_progress)
    learner = find_learner(settings.learner)
    fitted, seeds = fit_seeds(learner, training_part, settings, on_progress)
    chooser = fitted.chooser
    if isinstance(chooser, PortableChooser):
        chooser.pricer = dataset.pricer()
    if fitted.summary.constant:
        notes.append(constant_note(chooser, held_out))
    report = evaluate_chooser(training_part, held_out, chooser, seed=settings.seed, notes=notes)
    if figure is not None:
        unseen = unseen_part(held_out)
        points = speed_by_prompts(training_part, unseen, settings, on_progress)
        plot(fitted.curve, points, training_part, unseen, settings.learner, figure)
    encoders = identity.encoders or build_encoder(identity.hidden_size).identities()
    training = asdict(fitted.summary) | {"seeds": asdict(seeds), "held_out": _held_out(report)}
    reward = reward_card(settings)
    card = policy_card(identity, settings, encoders, reward, costs.hash(), training)
    policy = policy_of(chooser, encode.num_features, settings.objective, encode=encode)
    seen = _range(prompts, training_part, chooser)
    return LearningResult(
        policy, report, fitted.summary, seeds, fitted.curve, card, seen, calibration or {}
    )


def fit_seeds(
    learner: Learner[Any], data: Dataset, settings: LearnerSettings, on_progress: Progress
) -> tuple[Fitted, Seeds]:
    """Fit under `settings.seeds` seeds from `settings.seed` on.

    Choosers of a kind that can be averaged are averaged: the average varies less than any of them, and
    no seed is picked for a lucky score. Otherwise the seed with the best score is kept.
    """
    fits = []
    for i in range(settings.seeds):
        own = settings.model_copy(update={"seed": settings.seed + i})
        fits.append(learner.fit(data, own, _named(on_progress, settings, own.seed)))
    scores = tuple(fit.summary.score for fit in fits)
    average = _average(fits) if len(fits) > 1 else None
    if average is None:
        return fits[int(np.argmax(scores))], Seeds(scores, "best")
    return average, Seeds(scores, "average")


def _named(on_progress: Progress, settings: LearnerSettings, seed: int) -> Progress:
    if settings.seeds == 1:
        return on_progress
    return lambda stage, done, total: on_progress(f"{stage}, seed {seed}", done, total)


def _average(fits: Sequence[Fitted]) -> Fitted | None:
    """Return the average of the seeds that agree with the majority on whether there is a gain.

    Summary and curve are those of the best of these seeds. None: the choosers have no average.
    """
    constant = sum(fit.summary.constant for fit in fits) > len(fits) / 2
    agreeing = [fit for fit in fits if fit.summary.constant == constant]
    best = max(agreeing, key=lambda fit: fit.summary.score)
    if constant:
        return best
    choosers = [fit.chooser for fit in agreeing]
    merged = type(choosers[0]).merged(choosers)
    return None if merged is None else Fitted(merged, best.summary, best.curve)


def check_reward(settings: LearnerSettings) -> None:
    """Raise ConfigError if the learner cannot learn from the reward."""
    if settings.reward != "speed" and find_learner(settings.learner).predicts_work:
        raise ConfigError(
            f"the learner '{settings.learner}' predicts acceptance, which is priced in seconds alone; "
            f"take policy_gradient or reinforce for the reward '{settings.reward}'"
        )


def check_features(dataset: Dataset, identity: PolicyIdentity, encode: FeatureEncoder) -> None:
    """Raise StoreError unless the collection's features are those that `encode` computes."""
    lines = encode.identities()
    stale = [name for name, line in identity.encoders.items() if lines.get(name, line) != line]
    if stale:
        raise StoreError(
            f"the collection's features of '{stale[0]}' were computed otherwise than now; delete "
            "them and run `paceline collect PROMPTS` again"
        )
    num_features = dataset.features.shape[1]
    if num_features != encode.num_features:
        raise StoreError(
            f"the collection has {num_features} features a prompt, this target and version give "
            f"{encode.num_features}; run `paceline collect PROMPTS` into a new folder"
        )


def _range(
    prompts: Sequence[CollectedPrompt], training_part: Dataset, chooser: Chooser
) -> TrainingRange | None:
    """Return the range of the training prompts' features and of acceptance.

    An arm's acceptance is that on the prompts for which it would be chosen.
    """
    if len(training_part) < 2 * MIN_PROMPTS:
        return None
    by_id = {prompt.id: prompt for prompt in prompts}
    shares: dict[str, list[float]] = {arm: [] for arm in training_part.arms if arm != NONE}
    preferred = chooser.preferences(training_part.features, training_part.situation())
    for id, place in zip(training_part.ids, preferred.argmax(axis=1), strict=True):
        arm = training_part.arms[place]
        drafted, accepted = rounds_of(by_id[id], arm).sum(axis=0)
        if drafted:
            shares[arm].append(accepted / drafted)
    return TrainingRange.fit(
        training_part.features, {arm: np.array(found) for arm, found in shares.items()}
    )


def constant_note(chooser: Chooser, data: Dataset) -> str:
    """Return the note that a chooser takes no notice of the features."""
    preferred = chooser.preferences(data.features, data.situation()).argmax(axis=1)
    arms = list(dict.fromkeys(chooser.arms[place] for place in preferred))
    return (
        "the features did not tell which arm is best where: the policy always chooses "
        f"{' or '.join(repr(arm) for arm in arms)}; more prompts or more different drafters may help"
    )


def reward_card(settings: LearnerSettings) -> RewardCard:
    """Return the reward of a policy that was learned with these settings."""
    aligned = settings.reward == "alignment"
    return RewardCard(
        kind=settings.reward,
        version=REWARD_VERSION,
        alpha=settings.alpha if aligned else None,
        metric=settings.metric if aligned else None,
    )


def _held_out(report: EvaluationReport) -> dict[str, object]:
    return {
        "num_prompts": report.overall.num_prompts,
        "exposure": asdict(report.exposure),
        "speedup": report.headline(),
        "fraction_of_oracle": report.fraction_of_oracle,
        "chosen": report.overall.chosen[POLICY].arms,
        "reward": report.overall.strategies[POLICY].reward,
    }


def policy_card(
    identity: PolicyIdentity,
    settings: LearnerSettings,
    encoders: Mapping[str, str],
    reward: RewardCard,
    costs: str,
    training: dict[str, object],
) -> PolicyArtefact:
    """Return the card of a policy that is not saved yet. costs: the hash of the cost table."""
    return PolicyArtefact(
        target=identity.target,
        tokenizer=identity.tokenizer,
        hidden_size=identity.hidden_size,
        drafters=dict(identity.drafters),
        encoders=dict(encoders),
        arms=[],
        chooser="",
        objective=settings.objective,
        reward=reward,
        costs=costs,
        learner=settings.model_dump(),
        training=training,
    )
