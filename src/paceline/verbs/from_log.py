"""Learning from served requests: a decision log makes a policy, which replaces a worse one.

With token ids in the log every drafter is replayed on the served answers; without, the policy is
learned from the choices alone, see `learning.from_choices`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paceline.assembly import Pace, build, policy_identity
from paceline.collection import collect_log
from paceline.contracts import no_progress
from paceline.costs.table import CostTable
from paceline.drafting.catalog import arms_of
from paceline.errors import ArtefactError, ConfigError
from paceline.learning import learn_from_choices
from paceline.learning.dataset import build_dataset, split
from paceline.learning.evaluation import unseen_part
from paceline.learning.learners import check_settings
from paceline.learning.rollout import Replayed, adopt, not_compared
from paceline.selection import is_policy, load_policy
from paceline.selection.artefact import read_card
from paceline.selection.encoders import build_encoder
from paceline.store import read_decisions
from paceline.verbs.pipeline import load_priced, train

if TYPE_CHECKING:
    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.learning import ChoicesResult, LearningResult
    from paceline.learning.dataset import Dataset
    from paceline.learning.rollout import Verdict
    from paceline.selection import Policy, PolicyIdentity


class LearnedFromLog(NamedTuple):
    """A policy learned from served requests; notes give the number of ignored decisions by reason.

    verdict: the reason for which it replaced the current policy or did not; None without a current one.
    """

    learned: LearningResult | ChoicesResult
    verdict: Verdict | None
    notes: list[str]


def learn_from_log(config: Config, on_progress: Progress = no_progress) -> LearnedFromLog:
    """Train a policy on the configuration's decision log; write it if it is better than the current one.

    With token ids, the served answers are added to the collection, every drafter is replayed on them,
    and the policy is learned from the whole collection. Without, it is learned from the choices alone,
    which needs the log of a policy that explores. Raises ConfigError without a log folder.
    """
    if config.log.folder is None:
        raise ConfigError("there is no log to learn from; set log.folder in the configuration")
    check_settings(config.learning)  # before the work is done
    decisions, notes = read_decisions(config.log.folder)
    parts = build(config)
    if any(decision.prompt_tokens is not None for decision in decisions):
        taken = collect_log(Pace(parts), decisions, config.paths.store, on_progress)
        notes += [f"{count} {reason}" for reason, count in taken.left_out.items()]
        learned, verdict = _learn_if_better(config, on_progress)
        return LearnedFromLog(learned, verdict, notes)
    encode = build_encoder(parts.target.hidden_size, config.selection)
    identity = replace(policy_identity(parts), encoders=encode.identities())
    current, why_not = _current_policy(config, identity)
    chosen = learn_from_choices(decisions, identity, config.learning, encode, current, on_progress)
    if why_not is not None:
        chosen = replace(chosen, verdict=not_compared(len(decisions), why_not))
    if chosen.verdict is None or chosen.verdict.adopt:
        chosen.save(config.paths.policy)
    return LearnedFromLog(chosen, chosen.verdict, notes + chosen.notes)


def _learn_if_better(
    config: Config, on_progress: Progress
) -> tuple[LearningResult, Verdict | None]:
    """Learn, and write the policy if it beats the current one on the held-out prompts."""
    priced = load_priced(config)
    learned = train(priced, config, on_progress)
    current, why_not = _current_policy(config, priced.identity)
    verdict = None if why_not is None else not_compared(len(priced.prompts), why_not)
    if current is not None:
        dataset, _ = build_dataset(priced.prompts, arms_of(config), priced.costs, config.learning)
        held_out = unseen_part(split(dataset, config.learning.held_out)[1])
        verdict = adopt(Replayed(_seconds(current, held_out), _seconds(learned.policy, held_out)))
    if verdict is None or verdict.adopt:
        learned.save(config.paths.policy)
    return learned, verdict


def _current_policy(config: Config, identity: PolicyIdentity) -> tuple[Policy | None, str | None]:
    """Return (policy, None), (None, reason not to compare it) or, without a policy, (None, None)."""
    folder, path = config.paths.policy, config.paths.costs
    if not is_policy(folder):
        return None, None
    costs = CostTable.load(path) if path.is_file() else None
    try:
        policy = load_policy(folder, identity, costs, selection=config.selection)
    except ArtefactError as error:
        return None, f"it cannot be compared; delete it to replace it: {error}"
    if read_card(folder).encoders != dict(identity.encoders):
        return None, "it has other features, so it was not compared; delete it to replace it"
    if not set(policy.arms) <= set(arms_of(config)):
        return (
            None,
            "it chooses among other arms, so it was not compared; delete it to replace it",
        )
    return policy, None


def _seconds(policy: Policy, prompts: Dataset) -> np.ndarray:
    """Return the [N] predicted seconds of a policy's choices."""
    places = np.array([prompts.arms.index(arm) for arm in policy.arms])
    preferred = policy.chooser.preferences(prompts.features, prompts.situation())
    return np.asarray(
        (policy.chooser.distribution(preferred) * prompts.seconds[:, places]).sum(axis=1)
    )
