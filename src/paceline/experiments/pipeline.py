"""The offline verbs on a configuration's own files, and all of them in a row.

What `paceline collect`, `profile`, `learn` and `trigram build` do, as functions. Their
files stand where the configuration's `paths` say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paceline.assembly import Pace, build, build_controller, policy_identity
from paceline.bench.profile import profile as measure_costs
from paceline.collection import collect as collect_prompts
from paceline.contracts import NONE, split_arm
from paceline.costs.table import CostTable
from paceline.drafting.catalog import arms_of
from paceline.drafting.trigram.build import build_table
from paceline.drafting.trigram.corpora import TextFiles, TokenSequences
from paceline.errors import ArtefactError, ConfigError, StoreError
from paceline.experiments.data_report import describe
from paceline.experiments.evaluation import identity_of
from paceline.learning import learn as learn_policy
from paceline.models.loading import load_tokenizer
from paceline.models.vocabulary import Vocabulary
from paceline.replay import price_stops
from paceline.selection.encoders import build_encoder
from paceline.store.collection import (
    load_collection,
    open_trajectories,
    read_overlaps,
    read_trajectories,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.collection import CollectionReport
    from paceline.config import Config
    from paceline.contracts import PromptRecord
    from paceline.drafting.trigram.build import BuildSettings, Corpus
    from paceline.drafting.trigram.table import TableFacts
    from paceline.experiments.data_report import DataReport
    from paceline.learning import LearningResult

    OnProgress = Callable[[str, int, int], None]


def _quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def collect(
    config: Config,
    prompts: Sequence[PromptRecord],
    max_new_tokens: int = 256,
    alignment: bool = False,
    on_progress: OnProgress = _quiet,
    **settings: Any,
) -> CollectionReport:
    """Decode prompts once with the target and replay every drafter on them; resumes.

    `settings` are those of `collection.collect`: samplings, scores, outputs, sources, workers.
    """
    return collect_prompts(
        Pace(build(config)),
        prompts,
        config.paths.store,
        max_new_tokens,
        alignment=alignment,
        on_progress=on_progress,
        **settings,
    )


def data(config: Config) -> DataReport:
    """What the configuration's collection holds, priced with its cost table where there is one."""
    collection = load_collection(config.paths.store, encoders=())
    there = {name: line for name, line in collection.identity.arms.items() if name != NONE}
    absent = [name for name in config.drafters if name not in there]
    notes = [
        f"'{name}' is configured and not in the collection; `paceline collect PROMPTS` adds it"
        for name in absent
    ]
    arms = [arm for arm in arms_of(config) if split_arm(arm)[0] in {NONE, *there}]
    costs = None
    prompts = collection.prompts
    try:
        costs = CostTable.load(config.paths.costs)
        # a drafter that is no longer configured has no price
        priced = {name: line for name, line in there.items() if name in config.drafters}
        costs.check(priced, priced)
        prompts = price_stops(prompts, config, costs)
    except ArtefactError as error:
        costs = None
        notes.append(f"who would be fastest is not known: {error}")
    report = describe(prompts, arms, costs, read_overlaps(config.paths.store))
    report.notes.extend(notes)
    return report


def build_trigrams(
    config: Config,
    out: Path,
    text: Sequence[Path] = (),
    from_collection: bool = False,
    settings: BuildSettings | None = None,
    on_progress: OnProgress = _quiet,
) -> TableFacts:
    """Write the table of a `trigram_tree` drafter: the statistics of text files, of the target's own
    answers in the configuration's store, or of both. A killed build goes on where it was.
    """
    tokenizer = load_tokenizer(config.target)
    tokenizer_hash = Vocabulary.of(tokenizer).hash()
    corpora: list[Corpus] = [TextFiles(text, tokenizer)] if text else []
    if from_collection:
        corpora.append(_answers(config.paths.store, tokenizer_hash))
    if not corpora:
        raise ConfigError("nothing to build from: give text files, or take the collection")
    return build_table(corpora, Path(out), tokenizer_hash, settings, on_progress)


def _answers(folder: Path, tokenizer: str) -> TokenSequences:
    store = open_trajectories(folder)
    if store.identity.get("tokenizer") != tokenizer:
        raise StoreError(
            f"{folder}: was collected with another tokenizer than the target's; collect again"
        )
    trajectories = read_trajectories(store)
    if not trajectories:
        raise StoreError(f"{folder}: the collection is empty; run `paceline collect PROMPTS`")
    # the prompt's last two tokens are what the first answered one follows
    sequences = [(*t.prompt_tokens[-2:], *t.output_tokens) for t in trajectories]
    return TokenSequences(f"{folder} {store.num_rows}", sequences)


def profile(config: Config, on_progress: OnProgress = _quiet) -> CostTable:
    """Measure this machine's cost table and write it."""
    table = measure_costs(build(config), on_progress=on_progress)
    table.save(config.paths.costs)
    return table


def learn(
    config: Config,
    on_progress: OnProgress = _quiet,
    search: int = 0,
    figure: Path | None = None,
) -> LearningResult:
    """Train a policy for the configuration's drafters and write it.

    search: how many settings of the learner to try first. figure: a PNG of the learning curves.
    """
    encoders = config.selection.encoders
    collection = load_collection(config.paths.store, list(config.drafters), encoders)
    costs = CostTable.load(config.paths.costs)
    learned = learn_policy(
        price_stops(collection.prompts, config, costs),
        costs,
        identity_of(collection),
        arms_of(config),
        config.learning,
        on_progress=on_progress,
        encode=build_encoder(collection.identity.hidden_size, config.selection),
        search=search,
        figure=figure,
    )
    learned.save(config.paths.policy)
    return learned


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything the pipeline made; `pace` chooses with the learned policy."""

    pace: Pace
    costs: CostTable
    learned: LearningResult
    seconds: dict[str, float]  # wall clock by stage


def prepare(
    config: Config,
    prompts: Sequence[PromptRecord],
    max_new_tokens: int,
    on_progress: OnProgress = _quiet,
) -> Prepared:
    """Collect, profile and learn with models loaded once."""
    seconds: dict[str, float] = {}
    began = perf_counter()

    def stage(name: str) -> None:
        nonlocal began
        seconds[name] = perf_counter() - began
        began = perf_counter()

    parts = build(config)
    stage("load")
    collect_prompts(
        Pace(parts), prompts, config.paths.store, max_new_tokens, on_progress=on_progress
    )
    stage("collect")
    costs = measure_costs(parts, on_progress=on_progress)
    costs.save(config.paths.costs)
    for drafter in parts.drafters.values():
        drafter.price(costs)
    stage("profile")
    encode = build_encoder(parts.target.hidden_size, config.selection)
    encoders = config.selection.encoders
    collection = load_collection(config.paths.store, list(config.drafters), encoders)
    learned = learn_policy(
        price_stops(collection.prompts, config, costs),
        costs,
        replace(policy_identity(parts), encoders=encode.identities()),
        arms_of(config),
        config.learning,
        on_progress=on_progress,
        encode=encode,
    )
    learned.save(config.paths.policy)
    stage("learn")
    controller = build_controller(parts, learned.policy.arms, costs, learned.policy.objective)
    return Prepared(Pace(parts, learned.policy.choose, controller), costs, learned, seconds)
