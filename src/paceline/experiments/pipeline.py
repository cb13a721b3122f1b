"""The offline verbs on a configuration's own files, and all of them in a row.

What `paceline collect`, `profile`, `learn`, `evaluate` and `trigram build` do, as functions. Their
files stand where the configuration's `paths` say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from paceline.assembly import Pace, build, policy_identity
from paceline.bench.profile import profile as measure_costs
from paceline.collection import collect as collect_prompts
from paceline.collection import collect_log
from paceline.costs.table import CostTable
from paceline.drafting.trigram.build import build_table
from paceline.drafting.trigram.corpora import TextFiles, TokenSequences
from paceline.errors import ArtefactError, ConfigError, StoreError
from paceline.learning import evaluate as evaluate_network
from paceline.learning import learn as learn_policy
from paceline.learning import learn_from_choices
from paceline.learning.dataset import build_dataset, split
from paceline.learning.rollout import Replayed, adopt
from paceline.models.loading import load_tokenizer
from paceline.models.vocabulary import Vocabulary
from paceline.replay import price_stops
from paceline.selection import PolicyIdentity, load_policy
from paceline.selection.artefact import read_card
from paceline.selection.network import softmax
from paceline.store import read_decisions
from paceline.store.collection import load_collection, open_trajectories, read_trajectories

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.collection import CollectionReport
    from paceline.config import Config
    from paceline.contracts import PromptRecord
    from paceline.drafting.trigram.build import BuildSettings, Corpus
    from paceline.drafting.trigram.table import TableFacts
    from paceline.learning import ChoicesResult, EvaluationReport, LearningResult
    from paceline.learning.dataset import Dataset
    from paceline.learning.rollout import Verdict
    from paceline.selection.policies import NetworkPolicy
    from paceline.store.collection import LoadedCollection

    OnProgress = Callable[[str, int, int], None]


def _quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def collect(
    config: Config,
    prompts: Sequence[PromptRecord],
    max_new_tokens: int = 256,
    alignment: bool = False,
    on_progress: OnProgress = _quiet,
) -> CollectionReport:
    """Decode prompts once with the target and replay every drafter on them; resumes."""
    return collect_prompts(
        Pace(build(config)),
        prompts,
        config.paths.store,
        max_new_tokens,
        alignment=alignment,
        on_progress=on_progress,
    )


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
        raise StoreError(f"{folder}: the collection is empty; run `paceline collect`")
    # the prompt's last two tokens are what the first answered one follows
    sequences = [(*t.prompt_tokens[-2:], *t.output_tokens) for t in trajectories]
    return TokenSequences(f"{folder} {store.num_rows}", sequences)


def profile(config: Config, on_progress: OnProgress = _quiet) -> CostTable:
    """Measure this machine's cost table and write it."""
    table = measure_costs(build(config), on_progress=on_progress)
    table.save(config.paths.costs)
    return table


def learn(config: Config, on_progress: OnProgress = _quiet) -> LearningResult:
    """Train a policy for the configuration's drafters and write it."""
    collection = load_collection(config.paths.store, list(config.drafters))
    costs = CostTable.load(config.paths.costs)
    learned = learn_policy(
        price_stops(collection.prompts, config, costs),
        costs,
        _identity(collection),
        config.learning,
        on_progress=on_progress,
    )
    learned.save(config.paths.policy)
    return learned


class LearnedFromLog(NamedTuple):
    """A policy learned from served requests; notes say what was left out of the log, and why.

    verdict: why it took the place of the one that was there, or did not; None where there was none.
    """

    learned: LearningResult | ChoicesResult
    verdict: Verdict | None
    notes: list[str]


def learn_from_log(config: Config, on_progress: OnProgress = _quiet) -> LearnedFromLog:
    """Train a policy from the configuration's decision log; write it if it is better than the current.

    With token ids, what was served joins the collection, every drafter is replayed on it, and the
    policy is learned from the whole. Without, it is learned from the choices alone, which takes a log
    of a policy that explored.
    """
    if config.log.folder is None:
        raise ConfigError("there is no log to learn from; set log.folder in the configuration")
    decisions, notes = read_decisions(config.log.folder)
    parts = build(config)
    if any(decision.prompt_tokens is not None for decision in decisions):
        taken = collect_log(Pace(parts), decisions, config.paths.store, on_progress)
        notes += [f"{count} {reason}" for reason, count in taken.left_out.items()]
        learned, verdict = _learn_if_better(config, on_progress)
        return LearnedFromLog(learned, verdict, notes)
    identity = policy_identity(parts)
    current = _current_policy(config, identity)
    chosen = learn_from_choices(decisions, identity, config.learning, current, on_progress)
    if chosen.verdict is None or chosen.verdict.adopt:
        chosen.save(config.paths.policy)
    return LearnedFromLog(chosen, chosen.verdict, notes + chosen.notes)


def _learn_if_better(
    config: Config, on_progress: OnProgress
) -> tuple[LearningResult, Verdict | None]:
    """`learn`, but the policy there stays unless the new one beats it on the held-out prompts."""
    collection = load_collection(config.paths.store, list(config.drafters))
    identity = _identity(collection)
    costs = CostTable.load(config.paths.costs)
    prompts = price_stops(collection.prompts, config, costs)
    learned = learn_policy(prompts, costs, identity, config.learning, on_progress=on_progress)
    current, verdict = _current_policy(config, identity), None
    if current is not None:
        arms = learned.policy.arms
        dataset, _ = build_dataset(prompts, arms, costs.seconds, config.learning)
        _, held_out = split(dataset, config.learning.held_out)
        verdict = adopt(Replayed(_seconds(current, held_out), _seconds(learned.policy, held_out)))
    if verdict is None or verdict.adopt:
        learned.save(config.paths.policy)
    return learned, verdict


def _current_policy(config: Config, identity: PolicyIdentity) -> NetworkPolicy | None:
    """The policy there; None where there is none, or one that could not serve these models."""
    try:
        return load_policy(config.paths.policy, identity)
    except ArtefactError:
        return None


def _seconds(policy: NetworkPolicy, prompts: Dataset) -> np.ndarray:
    """[N] predicted, of what a policy chooses on prompts."""
    places = np.array([prompts.arms.index(arm) for arm in policy.arms])
    chosen = places[policy.network.logits(prompts.features).argmax(axis=1)]
    return np.asarray(prompts.seconds[np.arange(len(prompts)), chosen])


def evaluate(config: Config) -> EvaluationReport:
    """Price the held-out prompts anew and compare the policy with every other way to choose."""
    collection = load_collection(config.paths.store, list(config.drafters))
    identity = _identity(collection)
    policy = load_policy(config.paths.policy, identity)
    costs = CostTable.load(config.paths.costs)
    costs.check(policy.arms, identity.arms)
    prompts = price_stops(collection.prompts, config, costs)
    dataset, notes = build_dataset(prompts, policy.arms, costs.seconds, config.learning)
    training_part, held_out = split(dataset, config.learning.held_out)
    if read_card(config.paths.policy).costs != costs.hash():
        notes = [
            *notes,
            "the policy was learned with another cost table than the one it is priced with here; "
            "`paceline learn` fits it to this one",
        ]
    return evaluate_network(
        training_part,
        held_out,
        policy.network,
        choose_seconds=_choose_seconds(policy, held_out),
        seed=config.learning.seed,
        notes=notes,
    )


def _choose_seconds(policy: NetworkPolicy, held_out: Dataset) -> float:
    """What one choice takes on this machine, the median over the held-out prompts.

    The network and the softmax; gathering the features costs about as much again, and both are
    thousandths of a request.
    """
    spent = []
    for features in held_out.features:
        began = perf_counter()
        softmax(policy.network.logits(features))
        spent.append(perf_counter() - began)
    return median(spent)


def _identity(collection: LoadedCollection) -> PolicyIdentity:
    made_with = collection.identity
    return PolicyIdentity(
        target=made_with.target,
        tokenizer=made_with.tokenizer,
        hidden_size=made_with.hidden_size,
        arms=made_with.arms,
    )


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
    collection = load_collection(config.paths.store, list(config.drafters))
    learned = learn_policy(
        price_stops(collection.prompts, config, costs),
        costs,
        policy_identity(parts),
        config.learning,
        on_progress=on_progress,
    )
    learned.save(config.paths.policy)
    stage("learn")
    return Prepared(Pace(parts, learned.policy.choose), costs, learned, seconds)
