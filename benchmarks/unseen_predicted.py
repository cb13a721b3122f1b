"""Predicted speeds of policies, single arms and ceilings on replayed prompts, for `unseen.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from unseen_report import ALL_TASKS, PER_TASK, SIMPLE, SINGLE, Arms, best_arms, ratio_of

from paceline.contracts import NONE
from paceline.drafting.catalog import arms_of
from paceline.experiments.prompt_files import TASKS
from paceline.learning.dataset import build_dataset, is_held_out
from paceline.learning.evaluation import POLICY, Contender
from paceline.learning.evaluation.ceilings import PER_ROUND, SPLIT_HALF, ceilings, per_round
from paceline.replay import calibrate, price_rounds
from paceline.replay.composed import cascades_of
from paceline.verbs.pipeline import PricedCollection, identity_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.config import Config
    from paceline.costs import CostTable
    from paceline.learning.dataset import Dataset
    from paceline.selection.choosers import Chooser
    from paceline.store.collection import LoadedCollection
    from paceline.store.records import CollectedPrompt

ORACLE_SIMPLE = "oracle without cascades"
ORACLE = "oracle"
ONE_CASCADE = "per-round oracle of the lookup and one model"


def price(
    collection: LoadedCollection,
    config: Config,
    costs: CostTable,
    without: str | None = None,
) -> PricedCollection:
    """Return a collection at the prices of a cost table, ready to learn from.

    without: a task whose prompts are left out, also where cascades are calibrated.
    """
    identity = identity_of(collection, config)
    costs.check(identity.drafters, identity.drafters, identity.target)
    prompts = [p for p in collection.prompts if p.domain != without]
    learned_from = [p for p in prompts if not is_held_out(p, config.learning.held_out)]
    calibration = calibrate(learned_from, config)
    priced = price_rounds(prompts, config, costs, calibration)
    return PricedCollection(priced, costs, identity, calibration)


def dataset_of(prompts: Sequence[CollectedPrompt], config: Config, costs: CostTable) -> Dataset:
    """Return prompts as arrays, for the configuration's arms."""
    return build_dataset(prompts, arms_of(config), costs, config.learning)[0]


def arms_for(data: Dataset) -> Arms:
    """Return the best arms of collected prompts."""
    return best_arms(data.arms, data.seconds, data.domains, data.composed)


def strategy_seconds(
    data: Dataset, arms: Arms, chooser: Chooser, config: Config
) -> dict[str, np.ndarray]:
    """Return the predicted seconds [N] of every strategy, those of `none` first."""
    place = {arm: i for i, arm in enumerate(data.arms)}
    each = np.arange(len(data))
    by_task = np.array([place[arms.of(task)[PER_TASK]] for task in data.domains])
    chosen = Contender(POLICY, (chooser,)).distributions(data)[0]
    simple = [i for i in range(len(data.arms)) if i not in set(data.composed)]
    bounds = ceilings(data)
    found = {
        NONE: data.seconds[:, place[NONE]],
        SIMPLE: data.seconds[:, place[arms.simple]],
        SINGLE: data.seconds[:, place[arms.single]],
        PER_TASK: data.seconds[each, by_task],
        POLICY: (chosen * data.seconds).sum(axis=1),
        f"{SPLIT_HALF}, without cascades": bounds[SPLIT_HALF],
        ORACLE_SIMPLE: data.seconds[:, simple].min(axis=1),
        ORACLE: data.seconds.min(axis=1),
    }
    pairs = [cascade.parts for cascade in cascades_of(config)]
    if pairs:
        found[ONE_CASCADE] = np.min([per_round(data, parts) for parts in pairs], axis=0)
    return found | {f"{PER_ROUND} of all drafters": bounds[PER_ROUND]}


def predict(
    data: Dataset, arms: Arms, chooser: Chooser, config: Config, apart: str
) -> dict[str, Any]:
    """Return the predicted speeds over `none` by strategy and task, and of the policy over single arms.

    All tasks are those but `apart`.
    """
    seconds = strategy_seconds(data, arms, chooser, config)
    domains = np.array(data.domains, dtype=str)
    parts = {ALL_TASKS: domains != apart}
    parts |= {task: domains == task for task in (*TASKS, apart) if (domains == task).any()}
    whole = parts[ALL_TASKS]
    return {
        "arms": arms._asdict() | {"by_task": dict(arms.by_task)},
        "over_none": {
            name: {
                task: float(seconds[NONE][part].sum() / own[part].sum())
                for task, part in parts.items()
            }
            for name, own in seconds.items()
        },
        "policy_over": {
            name: ratio_of(seconds[name][whole], seconds[POLICY][whole])
            for name in (SIMPLE, SINGLE, PER_TASK)
        },
    }
