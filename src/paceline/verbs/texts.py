"""Learning and evaluation for drafters that are known by their texts alone.

`paceline.learn` and `paceline.evaluate` come here where the configuration names no drafters and the
reward is `alignment`, or where the saved policy is of this kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from paceline.config import LearningSection, parse
from paceline.contracts import TEXT_ONLY, no_progress
from paceline.errors import ConfigError, StoreError
from paceline.learning.dataset import split
from paceline.learning.from_texts import learn_from_texts, text_arms, text_dataset
from paceline.learning.learners import check_settings, find_learner
from paceline.learning.text_report import POLICY, judge
from paceline.selection import PolicyIdentity, is_policy, load_policy
from paceline.selection.artefact import read_card, text_drafters
from paceline.selection.encoders import build_encoder
from paceline.store.collection import load_collection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.learning.from_texts import TextsResult
    from paceline.learning.text_report import TextReport
    from paceline.selection.choosers import Chooser
    from paceline.store.records import CollectedPrompt


def learns_from_texts(config: Config) -> bool:
    """Return whether `learn` learns to choose among texts."""
    return config.learning.reward == "alignment" and not config.drafters


def evaluates_texts(config: Config, compare: Sequence[str]) -> bool:
    """Return whether `evaluate` judges texts: those of the saved policy, or of learners to compare."""
    if compare:
        return learns_from_texts(config)
    folder = config.paths.policy
    return is_policy(folder) and bool(text_drafters(read_card(folder)))


def learn_texts(
    config: Config, on_progress: Progress = no_progress, search: int = 0
) -> TextsResult:
    """Train a policy for the texts of the configuration's collection. Does not write it.

    Raises ConfigError or StoreError, each with what to change.
    """
    check_settings(config.learning)  # before anything is read
    prompts, identity = _load(config, config.selection.encoders)
    encode = build_encoder(identity.hidden_size, config.selection)
    return learn_from_texts(prompts, identity, config.learning, encode, on_progress, search)


def evaluate_texts(
    config: Config, compare: Sequence[str] = (), on_progress: Progress = no_progress
) -> TextReport:
    """Judge the alignment reward of the saved policy, or of learners trained here, on held-out prompts.

    The saved policy is judged by the reward that it was learned with. Raises ConfigError, StoreError or
    ArtefactError with the remedy.
    """
    if compare:
        section = config.learning
        prompts, identity = _load(config, config.selection.encoders)
        arms = text_arms([n for n, line in identity.drafters.items() if line == TEXT_ONLY], section)
        data, notes = text_dataset(prompts, arms, section)
        train, held_out = split(data, section.held_out)
        policies: dict[str, list[Chooser]] = {}
        for done, name in enumerate(compare):
            on_progress("train", done, len(compare))
            own = check_settings(section.model_copy(update={"learner": name}))
            policies[name] = [find_learner(name).fit(train, own, no_progress).chooser]
        return judge(train, held_out, policies, section, notes)
    card = read_card(config.paths.policy)
    learned = {key: card.learner[key] for key in LearningSection.model_fields}
    section = parse(LearningSection, learned, str(config.paths.policy))
    prompts, identity = _load(config, list(card.encoders))
    policy = load_policy(config.paths.policy, identity, selection=config.selection)
    data, notes = text_dataset(prompts, policy.arms, section)
    train, held_out = split(data, section.held_out)
    return judge(train, held_out, {POLICY: [policy.chooser]}, section, notes)


def check_options(
    seeds: int, loads: Sequence[int], has_others: bool, chooses_encoders: bool
) -> None:
    """Raise ConfigError for an option of `evaluate` that does not exist for texts."""
    given = {
        "--seeds": seeds != 1,
        "--rows": list(loads) != [1],
        "--on or --leave-one-task-out": has_others,
        "--encoders": chooses_encoders,
    }
    wrong = next((option for option, is_given in given.items() if is_given), None)
    if wrong is not None:
        raise ConfigError(
            f"{wrong} is not supported for drafters that are known by their texts alone; remove it"
        )


def _load(config: Config, encoders: Sequence[str]) -> tuple[list[CollectedPrompt], PolicyIdentity]:
    """Return the collection's prompts, and the identity of a policy for the texts that it has."""
    store = config.paths.store
    collection = load_collection(store, [], encoders)
    writers = sorted({name for prompt in collection.prompts for name in prompt.draft_outputs})
    if not writers:
        raise StoreError(
            f"{store}: no drafter is configured, and no texts of drafters are here; run "
            "`paceline collect PROMPTS --outputs NAME=FILE`, or configure drafters"
        )
    made_with = collection.identity
    identity = PolicyIdentity(
        target=made_with.target,
        tokenizer=made_with.tokenizer,
        hidden_size=made_with.hidden_size,
        drafters=made_with.arms,
        encoders=made_with.encoders,
    )
    drafters = {**identity.drafters, **dict.fromkeys(writers, TEXT_ONLY)}
    return collection.prompts, replace(identity, drafters=drafters)
