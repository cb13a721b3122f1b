"""A policy for drafters of which only the texts are known: the setting of arXiv 2408.08470.

Every drafter answered the prompts by itself, somewhere else. The reward is `alignment`; nothing was
replayed and there are no prices, so speeds are unknown. The cost of a text is given by the user. With
alpha 1 `none` is no arm: it equals the target on every prompt, so no drafter could be better. Symbols:
N prompts, A arms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.contracts import NONE, no_progress
from paceline.costs.table import CostTable
from paceline.errors import ConfigError, StoreError
from paceline.files import write_atomically
from paceline.learning.dataset import (
    MIN_PROMPTS,
    UNKNOWN,
    Dataset,
    check_rewards,
    default_spans,
    drafters_of,
    split,
    stack_features,
)
from paceline.learning.from_choices import NO_PRICES
from paceline.learning.learn import (
    EVALUATION_FILE,
    Seeds,
    check_features,
    check_reward,
    constant_note,
    fit_seeds,
    policy_card,
    reward_card,
)
from paceline.learning.learners import check_settings, find_learner
from paceline.learning.rounds import RoundTable
from paceline.learning.search import search as search_settings
from paceline.learning.text_report import POLICY, TextReport, judge
from paceline.rewards import METRICS, alignment_reward, cost_score
from paceline.selection.artefact import PolicyArtefact, policy_of, save_policy
from paceline.selection.drift import RANGE_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.config import LearningSection
    from paceline.contracts import Progress
    from paceline.learning.learners import Curve, Summary
    from paceline.selection.artefact import PolicyIdentity
    from paceline.selection.encoders import FeatureEncoder
    from paceline.selection.policies import Policy
    from paceline.store.records import CollectedPrompt


@dataclass(frozen=True, slots=True)
class TextsResult:
    """A policy learned from texts, with its reward on prompts that it never saw."""

    policy: Policy
    report: TextReport
    training: Summary
    seeds: Seeds
    curve: Curve
    card: PolicyArtefact

    def save(self, folder: Path) -> None:
        """Write the policy, and next to it the report as evaluation.json."""
        (folder / RANGE_FILE).unlink(missing_ok=True)  # of the policy that was there
        write_atomically(folder / EVALUATION_FILE, self.report.to_json().encode())
        save_policy(folder, self.policy.chooser, self.card)


def learn_from_texts(
    prompts: Sequence[CollectedPrompt],
    identity: PolicyIdentity,
    section: LearningSection,
    encode: FeatureEncoder,
    on_progress: Progress = no_progress,
    search: int = 0,
) -> TextsResult:
    """Train on the training part, judge on the held-out part.

    identity: its drafters are those whose texts every prompt has, with `none`. encode: gives the policy
    its features. search: number of trials of the learner's options before the training. Raises
    ConfigError or StoreError, each with what to change.
    """
    settings = check_settings(section)
    check_reward(settings)
    arms = text_arms([name for name in identity.drafters if name != NONE], settings)
    data, notes = text_dataset(prompts, arms, settings)
    check_features(data, identity, encode)
    training_part, held_out = split(data, settings.held_out)
    if search:
        settings = search_settings(training_part, settings, search, on_progress)
    fitted, seeds = fit_seeds(find_learner(settings.learner), training_part, settings, on_progress)
    if fitted.summary.constant:
        notes.append(constant_note(fitted.chooser, held_out))
    report = judge(training_part, held_out, {POLICY: [fitted.chooser]}, settings, notes)
    card = policy_card(
        identity,
        settings,
        encode.identities(),
        reward_card(settings),
        NO_PRICES,
        {**asdict(fitted.summary), "seeds": asdict(seeds), "held_out": report.headline()},
    )
    policy = policy_of(fitted.chooser, encode.num_features, settings.objective, encode=encode)
    return TextsResult(policy, report, fitted.summary, seeds, fitted.curve, card)


def text_arms(writers: Sequence[str], section: LearningSection) -> tuple[str, ...]:
    """Return the arms: these drafters, and `none` where it does not win by definition.

    Raises ConfigError if there is no choice, a cost is missing or a cost is of another name.
    """
    unknown = sorted(set(section.text_costs) - set(writers))
    if unknown:
        raise ConfigError(
            f"learning.text_costs names '{unknown[0]}', and the collection has texts of "
            f"{', '.join(writers)}"
        )
    if section.alpha == 1.0:
        if len(writers) < 2:
            raise ConfigError(
                f"with alpha 1 a policy chooses among at least two drafters, and the collection has "
                f"texts of {', '.join(writers)} alone; add outputs of another one, or lower alpha"
            )
        return tuple(writers)
    missing = [name for name in writers if name not in section.text_costs]
    if missing:
        raise ConfigError(
            f"with alpha {section.alpha:g} the reward 'alignment' needs the cost of '{missing[0]}': set "
            f"learning.text_costs: {{{missing[0]}: SHARE}}, its seconds per token over the target's, or "
            "alpha: 1"
        )
    return (NONE, *writers)


def text_dataset(
    prompts: Sequence[CollectedPrompt], arms: Sequence[str], section: LearningSection
) -> tuple[Dataset, list[str]]:
    """Return (dataset of alignment rewards without rounds and seconds, notes for the reader).

    Raises StoreError if nothing can be learned from it.
    """
    if len(prompts) < MIN_PROMPTS:
        raise StoreError(
            f"{len(prompts)} prompts are too few to learn from, at least {MIN_PROMPTS} are needed "
            "(some hundred is better); run `paceline collect PROMPTS` with more prompts"
        )
    features = stack_features(prompts)
    N, A = len(prompts), len(arms)
    unknown = np.full((N, A), np.nan)
    num_prompt = np.array([len(p.prompt_tokens) for p in prompts])
    data = Dataset(
        arms=tuple(arms),
        ids=tuple(p.id for p in prompts),
        groups=tuple(p.prompt_id for p in prompts),
        domains=tuple(p.domain for p in prompts),
        trained=np.full((N, len(drafters_of(arms))), UNKNOWN, dtype=np.int8),
        prompts=tuple(p.prompt_tokens for p in prompts),
        features=features,
        num_prompt=num_prompt,
        num_tokens=np.array([len(p.output_tokens) for p in prompts]),
        limits=np.array([p.max_new_tokens for p in prompts]),
        rounds_per_token=unknown,
        drafted_per_token=unknown,
        empty_per_token=unknown,
        calls_per_token=unknown,
        proposed_per_token=unknown,
        composed=(),
        seconds=unknown,
        rewards=np.array([[_reward(p, arm, section) for arm in arms] for p in prompts]),
        spans=prompts[0].spans or default_spans(features.shape[1]),
        rounds=RoundTable((), num_prompt, ()),
        costs=CostTable({}, []),
        objective=section.objective,
        reward="alignment",
    )
    return data, check_rewards(data)


def _reward(prompt: CollectedPrompt, arm: str, section: LearningSection) -> float:
    """Return one text's reward. Raises StoreError if the prompt lacks the text."""
    if arm == NONE:
        return alignment_reward(section.alpha, 1.0, 0.0)
    if arm not in prompt.draft_outputs:
        raise StoreError(
            f"prompt '{prompt.id}' has no text of '{arm}'; run `paceline collect PROMPTS` with "
            f"--outputs {arm}=FILE to add it"
        )
    similarity = METRICS[section.metric](prompt.output_tokens, prompt.draft_outputs[arm])
    cost = cost_score(section.text_costs.get(arm, 1.0), 1.0)
    return alignment_reward(section.alpha, similarity, cost)
