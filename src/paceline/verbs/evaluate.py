"""`paceline evaluate` as a function of a configuration's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.bench.circumstances import circumstances
from paceline.contracts import no_progress
from paceline.costs.table import CostTable
from paceline.drafting.catalog import arms_of
from paceline.errors import ConfigError, StoreError
from paceline.learning.dataset import build_dataset, is_held_out, split
from paceline.learning.evaluation import (
    POLICY,
    Contender,
    Evaluation,
    Evaluator,
    in_other_words,
    train_contenders,
)
from paceline.models.detokenizer import Detokenizer
from paceline.models.loading import load_tokenizer
from paceline.replay import calibrate, price_rounds, stored_drafters
from paceline.selection import load_policy
from paceline.selection.artefact import read_card
from paceline.store.collection import load_collection
from paceline.verbs.pipeline import identity_of
from paceline.verbs.texts import check_options, evaluate_texts, evaluates_texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.config import Config
    from paceline.contracts import Progress
    from paceline.learning.dataset import Dataset
    from paceline.learning.text_report import TextReport
    from paceline.store.collection import LoadedCollection


def evaluate(
    config: Config,
    *,
    compare: Sequence[str] = (),
    encoders: Sequence[tuple[str, ...] | None] = (None,),
    seeds: int = 1,
    loads: Sequence[int] = (1,),
    on: Mapping[str, Path] | None = None,
    leave_one_task_out: bool = False,
    on_progress: Progress = no_progress,
) -> Evaluation | TextReport:
    """Price the collection and compare policies with other ways to choose, on held-out prompts.

    compare: learners to train on the training part, with each of `encoders` (None: all that were
    collected, (): none) and this number of `seeds`; without learners, the saved policy is evaluated.
    loads: numbers of rows in flight. on: folders of other collections by name. leave_one_task_out:
    also train on all tasks but one and test on that one, with the compared learners or the
    configuration's. A policy for drafters known by their texts is judged by its reward, see
    `verbs.texts`. Raises ConfigError, StoreError or ArtefactError with the remedy.
    """
    _check(compare, encoders, seeds, loads, leave_one_task_out)
    if evaluates_texts(config, compare):
        has_others = bool(on) or leave_one_task_out
        check_options(seeds, loads, has_others, list(encoders) != [None])
        return evaluate_texts(config, compare, on_progress)
    seen = config.selection.encoders if compare else list(read_card(config.paths.policy).encoders)
    collection = load_collection(config.paths.store, stored_drafters(config), seen)
    costs = CostTable.load(config.paths.costs)
    identity = identity_of(collection, config)
    costs.check(identity.drafters, identity.drafters, identity.target)
    settings, notes, contenders = config.learning, [], []
    arms = tuple(arms_of(config))
    if not compare:
        policy = load_policy(config.paths.policy, identity, costs, selection=config.selection)
        arms, contenders = policy.arms, [Contender(POLICY, (policy.chooser,))]
        # the policy's own training part, which the configuration may have changed
        share = read_card(config.paths.policy).learner.get("held_out", settings.held_out)
        settings = settings.model_copy(update={"held_out": share})
        notes = list(policy.notes)

    learned_from = [p for p in collection.prompts if not is_held_out(p, settings.held_out)]
    calibration = calibrate(learned_from, config)

    def priced(found: LoadedCollection) -> tuple[Dataset, list[str]]:
        prompts = price_rounds(found.prompts, config, costs, calibration)
        return build_dataset(prompts, arms, costs, settings)

    def trained(part: Dataset) -> list[Contender]:
        learners = compare or [settings.learner]
        return train_contenders(part, learners, encoders, settings, seeds, on_progress)

    others = {}  # read first, so that an error shows before anything is trained
    for name, folder in (on or {}).items():
        other = load_collection(folder, stored_drafters(config), seen)
        _check_alike(collection, other, folder)
        others[name] = priced(other)[0]
    data, found_notes = priced(collection)
    others = {name: in_other_words(data, other) for name, other in others.items()}
    train, held_out = split(data, settings.held_out)
    contenders = contenders or trained(train)
    evaluator = Evaluator(
        train,
        Detokenizer.of(load_tokenizer(config.target)),
        settings.seed,
        [*found_notes, *notes],
    )
    sections = evaluator.held_out(held_out, contenders, loads)
    sections += [evaluator.elsewhere(name, other, contenders) for name, other in others.items()]
    if leave_one_task_out:
        sections += evaluator.left_out(data, trained)
    return Evaluation(tuple(sections), _facts(config, costs, settings.objective, seeds))


def _check(
    compare: Sequence[str],
    encoders: Sequence[tuple[str, ...] | None],
    seeds: int,
    loads: Sequence[int],
    leave_one_task_out: bool,
) -> None:
    if seeds < 1 or not loads or min(loads) < 1:
        raise ConfigError(f"seeds and rows are at least 1, got {seeds} and {list(loads)}")
    trains = bool(compare) or leave_one_task_out
    if not trains and (seeds > 1 or list(encoders) != [None]):
        raise ConfigError(
            "seeds and encoders are for policies that are trained here; name learners with --compare"
        )


_PLURAL: Final = {"target": "weights", "arms": "drafters"}


def _check_alike(collection: LoadedCollection, other: LoadedCollection, folder: Path) -> None:
    """Raise StoreError unless both were made with the same target, features and drafters."""
    for name, expected in collection.identity._asdict().items():
        found = getattr(other.identity, name)
        if found != expected:
            differing = f"{found}, expected {expected}"
            if isinstance(expected, dict):
                names = {**expected, **found}
                differing = ", ".join(n for n in names if found.get(n) != expected.get(n))
            raise StoreError(
                f"{folder}: was collected with other {_PLURAL.get(name, name)} than the collection of "
                f"the configuration ({differing}); collect it again"
            )


def _facts(config: Config, costs: CostTable, objective: object, seeds: int) -> dict[str, object]:
    made = circumstances()
    machine = next((v for k, v in costs.fingerprint.items() if k in ("device", "cpu")), "")
    return {
        "collection": str(config.paths.store),
        "cost table": f"{costs.hash()[:12]} {machine}".strip(),
        "objective": objective,
        "trainings": seeds,
        "seed": config.learning.seed,
        "commit": made["commit"],
        "date": made["date"],
        "command": made["command"],
    }
