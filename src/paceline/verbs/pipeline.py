"""The main job on a configuration's own files: collect, profile and learn, and the three in a row.

Where a verb takes a `Config` or a `Pace`, a `Pace` lends the models that it has loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paceline.assembly import Pace, build, build_controller, find_round_seconds, give_chances
from paceline.bench.profile import measure_cost_table
from paceline.collection import collect_trajectories
from paceline.contracts import no_progress
from paceline.costs.table import CostTable
from paceline.drafting.catalog import arms_of
from paceline.errors import ConfigError
from paceline.learning import train_policy
from paceline.learning.dataset import is_held_out
from paceline.learning.learners import check_settings
from paceline.replay import calibrate, price_rounds, stored_drafters, with_cascades
from paceline.selection import PolicyIdentity
from paceline.selection.encoders import build_encoder
from paceline.store.collection import load_collection
from paceline.verbs.texts import learn_texts, learns_from_texts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.collection import CollectionReport
    from paceline.config import Config, DrafterSection
    from paceline.contracts import Progress, PromptRecord
    from paceline.drafting.cascade.calibration import Calibration
    from paceline.learning import LearningResult, TextsResult
    from paceline.store.collection import LoadedCollection
    from paceline.store.records import CollectedPrompt


def collect(
    config: Config | Pace,
    prompts: Sequence[PromptRecord],
    max_new_tokens: int = 256,
    alignment: bool = False,
    on_progress: Progress = no_progress,
    **settings: Any,
) -> CollectionReport:
    """Decode prompts once with the target and replay every drafter on the answers.

    Continues a run that was stopped. settings: samplings, scores, outputs, sources and workers of
    `collection.collect_trajectories`, which lists the errors.
    """
    pace = _pace_of(config)
    return collect_trajectories(
        pace,
        prompts,
        pace.parts.config.paths.store,
        max_new_tokens,
        alignment=alignment,
        on_progress=on_progress,
        **settings,
    )


def profile(
    config: Config | Pace, on_progress: Progress = no_progress, budget: float | None = None
) -> CostTable:
    """Measure this machine's cost table and write it; the drafters of a pace are priced with it.

    budget: seconds for the repeats, by default `bench.profile.BUDGET`.
    """
    parts = _pace_of(config).parts
    table = measure_cost_table(parts, on_progress, budget)
    table.save(parts.config.paths.costs)
    for drafter in parts.drafters.values():
        drafter.price(table)
    return table


def learn(
    config: Config,
    on_progress: Progress = no_progress,
    search: int = 0,
    figure: Path | None = None,
) -> LearningResult | TextsResult:
    """Train a policy for the configuration's drafters from its collection and costs, and write it.

    Without drafters and with the reward `alignment`, the policy is for the drafters whose texts are
    collected, and needs no costs. search: number of settings of the learner to try first. figure: a PNG
    of the learning curves. Raises StoreError or ArtefactError if the collection or the cost table is
    missing or does not fit.
    """
    if learns_from_texts(config):
        if figure is not None:
            raise ConfigError("the plot shows speeds, which texts do not have; remove --plot")
        texts = learn_texts(config, on_progress, search)
        texts.save(config.paths.policy)
        return texts
    return _learn_replayed(config, on_progress, search, figure)


def _learn_replayed(
    config: Config, on_progress: Progress, search: int = 0, figure: Path | None = None
) -> LearningResult:
    learned = train(load_priced(config), config, on_progress, search, figure)
    learned.save(config.paths.policy)
    return learned


@dataclass(frozen=True, slots=True)
class PricedCollection:
    """The prompts of a collection, priced with a cost table, and the identity of a policy for them.

    calibration: of cascades, from the prompts that are learned from.
    """

    prompts: list[CollectedPrompt]
    costs: CostTable
    identity: PolicyIdentity
    calibration: Calibration


def load_priced(config: Config) -> PricedCollection:
    """Read the configuration's collection and cost table.

    Raises ConfigError if the section `learning` does not fit its learner.
    """
    check_settings(config.learning)  # before anything is read
    encoders = config.selection.encoders
    collection = load_collection(config.paths.store, stored_drafters(config), encoders)
    costs = CostTable.load(config.paths.costs)
    learned_from = [p for p in collection.prompts if not is_held_out(p, config.learning.held_out)]
    calibration = calibrate(learned_from, config)
    prompts = price_rounds(collection.prompts, config, costs, calibration)
    return PricedCollection(prompts, costs, identity_of(collection, config), calibration)


def train(
    priced: PricedCollection,
    config: Config,
    on_progress: Progress,
    search: int = 0,
    figure: Path | None = None,
) -> LearningResult:
    """Train a policy on a priced collection, for the configuration's arms."""
    return train_policy(
        priced.prompts,
        priced.costs,
        priced.identity,
        arms_of(config),
        config.learning,
        on_progress,
        encode=build_encoder(priced.identity.hidden_size, config.selection),
        search=search,
        figure=figure,
        calibration=priced.calibration,
    )


def identity_of(collection: LoadedCollection, config: Config) -> PolicyIdentity:
    """Return the target, tokenizer and drafters that a policy of a collection is for."""
    made_with = collection.identity
    return PolicyIdentity(
        target=made_with.target,
        tokenizer=made_with.tokenizer,
        hidden_size=made_with.hidden_size,
        drafters=with_cascades(made_with.arms, config),
        encoders=made_with.encoders,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """The results of collect, profile and learn; `pace` chooses with the learned policy."""

    pace: Pace
    costs: CostTable
    learned: LearningResult
    seconds: dict[str, float]  # wall clock, by stage


def prepare(
    config: Config,
    prompts: Sequence[PromptRecord],
    max_new_tokens: int,
    on_progress: Progress = no_progress,
) -> Prepared:
    """Collect, profile and learn with models that are loaded once."""
    check_settings(config.learning)  # before the work is done
    marks = [perf_counter()]
    pace = Pace(build(config))
    marks.append(perf_counter())
    collect(pace, prompts, max_new_tokens, on_progress=on_progress)
    marks.append(perf_counter())
    costs = profile(pace, on_progress)
    marks.append(perf_counter())
    learned = _learn_replayed(config, on_progress)
    marks.append(perf_counter())
    stages = ("load", "collect", "profile", "learn")
    seconds = {name: marks[i + 1] - marks[i] for i, name in enumerate(stages)}
    parts, policy = pace.parts, learned.policy
    give_chances(parts, learned.calibration)
    controller = build_controller(parts, policy.arms, costs, policy.objective)
    round_seconds, notes = find_round_seconds(parts, costs)
    served = Pace(parts, policy.choose, controller, notes=notes, round_seconds=round_seconds)
    return Prepared(served, costs, learned, seconds)


def in_folder(config: Config, folder: Path) -> Config:
    """Return the configuration with the paths of all results in one folder.

    Drafters that use collected answers use those of this folder.
    """
    names = {"costs": "costs.json", "policy": "policy"}
    paths = config.paths.model_copy(update={key: folder / name for key, name in names.items()})
    return with_store(config.model_copy(update={"paths": paths}), folder / "collection")


def with_store(config: Config, store: Path) -> Config:
    """Return the configuration with another collection, whose answers its drafters use."""

    def redirect(section: DrafterSection) -> DrafterSection:
        if section.settings.get("answers") is None:
            return section
        return section.model_copy(update={"settings": {**section.settings, "answers": str(store)}})

    return config.model_copy(
        update={
            "paths": config.paths.model_copy(update={"store": store}),
            "drafters": {name: redirect(section) for name, section in config.drafters.items()},
        }
    )


def _pace_of(config: Config | Pace) -> Pace:
    return config if isinstance(config, Pace) else Pace(build(config))
