"""Learning end to end: from a collection and a cost table to a policy that loads and chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.config import LearningSection
from paceline.contracts import Context, SamplingParams
from paceline.errors import ArtefactError, StoreError
from paceline.learning import train_policy
from paceline.learning.dataset import build_dataset, split
from paceline.learning.learners import LEARNERS, check_settings
from paceline.replay import rounds_of
from paceline.selection import PolicyIdentity, feature_vector, load_policy
from paceline.selection.artefact import read_card
from paceline.selection.drift import RANGE_FILE, TrainingRange
from paceline.store.records import ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.costs import CostTable
    from paceline.learning.dataset import Dataset
    from paceline.store.records import CollectedPrompt

D = 24
ARMS = {"none": "kind=none", "code": "kind=draft_model", "math": "kind=draft_model, width=2"}
IDENTITY = PolicyIdentity(target="t", tokenizer="v", hidden_size=D, drafters=ARMS)
SETTINGS = LearningSection(max_epochs=60, learner="reinforce")


def context(seed: int) -> Context:
    """Draw a context; even and odd seeds are of two kinds, whose hidden states differ."""
    rng = np.random.default_rng(seed)
    shift = 1.0 if seed % 2 else -1.0
    mean, last = (rng.normal(size=(2, D)) + shift).astype(np.float32)
    return Context(rng.integers(0, 99, 20).tolist(), mean, last, SamplingParams(), 1)


@pytest.fixture
def prompts(collected: Callable[..., CollectedPrompt]) -> list[CollectedPrompt]:
    return [
        collected(
            f"p{i}",
            {"code": 1, "math": 4} if i % 2 else {"code": 4, "math": 1},
            feature_vector(context(i)),
            domain="odd" if i % 2 else "even",
        )
        for i in range(120)
    ]


@pytest.fixture
def costs(cost_table: Callable[..., CostTable]) -> CostTable:
    return cost_table(["code", "math"])


def test_a_learned_policy_is_as_fast_as_the_oracle_here(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    result = train_policy(prompts, costs, IDENTITY, list(ARMS), SETTINGS)
    report = result.report

    assert report.fraction_of_oracle > 0.99
    assert report.headline()["policy"] > 1.3 * report.headline()["best single"]
    assert report.by_domain["odd"].chosen["policy"].arms["math"] > 0.95
    assert report.num_train + report.overall.num_prompts == 120
    assert result.training.num_prompts == report.num_train
    chosen = [result.policy.choose(context(seed)).arm for seed in range(1000, 1100)]
    right = [arm == ("math" if seed % 2 else "code") for seed, arm in enumerate(chosen)]
    assert sum(right) >= 98
    assert report.notes == ()


def test_what_is_saved_chooses_the_same(
    prompts: list[CollectedPrompt], costs: CostTable, tmp_path: Path
) -> None:
    result = train_policy(prompts, costs, IDENTITY, list(ARMS), SETTINGS)
    result.save(tmp_path)
    loaded = load_policy(tmp_path, IDENTITY, costs)
    card = read_card(tmp_path)

    contexts = [context(seed) for seed in range(500, 520)]
    assert [loaded.choose(c) for c in contexts] == [result.policy.choose(c) for c in contexts]
    assert (card.drafters, card.arms) == (ARMS, list(ARMS))
    assert (card.target, card.tokenizer, card.costs) == ("t", "v", costs.hash())
    assert (card.reward.kind, card.reward.alpha) == ("speed", None)
    assert check_settings(LearningSection(**card.learner)) == check_settings(SETTINGS)
    assert card.training["num_prompts"] == result.report.num_train
    assert card.training["held_out"]["speedup"] == pytest.approx(result.report.headline())
    assert json.loads((tmp_path / "evaluation.json").read_text())["num_train"] > 0


def test_the_training_range_lies_beside_the_policy(
    prompts: list[CollectedPrompt], costs: CostTable, tmp_path: Path
) -> None:
    train_policy(prompts, costs, IDENTITY, list(ARMS), SETTINGS).save(tmp_path)
    seen = TrainingRange.load(tmp_path)

    outside = [seen.distance(feature_vector(context(i))) > seen.farthest for i in range(500, 600)]
    assert np.mean(outside) < 0.1
    strange = replace(context(0), mean_hidden=np.full(D, 9.0, dtype=np.float32))
    assert seen.distance(feature_vector(strange)) > seen.farthest
    # each arm on the prompts it is chosen for, where it is good; on the others it is poor
    good = {arm: rounds_of(prompts[i], arm).sum(axis=0) for i, arm in enumerate(("code", "math"))}
    for arm, (drafted, accepted) in good.items():
        low, high = seen.acceptance[arm]
        assert low == pytest.approx(accepted / drafted) == high

    train_policy(prompts[:48], costs, IDENTITY, list(ARMS), SETTINGS).save(tmp_path)  # no range
    assert not (tmp_path / RANGE_FILE).exists()


def test_held_out_prompts_teach_nothing(prompts: list[CollectedPrompt], costs: CostTable) -> None:
    """Other outcomes on the held-out prompts change the report and no weight."""
    before = train_policy(prompts, costs, IDENTITY, list(ARMS), SETTINGS)
    ids = set(_held_out(prompts, costs))
    idle = ReplayedDrafter(np.zeros((40, 2), dtype=np.int64), everywhere=True)
    changed = [
        replace(p, replays=p.replays | {"code": idle}) if p.id in ids else p for p in prompts
    ]
    after = train_policy(changed, costs, IDENTITY, list(ARMS), SETTINGS)

    assert len(ids) == before.report.overall.num_prompts
    for name, array in before.policy.chooser.arrays().items():
        assert np.array_equal(array, after.policy.chooser.arrays()[name]), name
    assert after.report.overall != before.report.overall


@pytest.mark.parametrize(
    ("learner", "search"),
    [(name, 0) for name in LEARNERS]
    + [(name, 2) for name, learner in LEARNERS.items() if learner.search_space],
)
def test_nothing_is_chosen_on_held_out_prompts(
    learner: str, search: int, prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    """A planted leak: held-out prompts get the features, rounds and answers of others, cut in half.

    Weights, settings, number of steps, the choice of a constant arm and every figure of the training
    stay the same; what is said about the held-out prompts does not.
    """
    section = SETTINGS.model_copy(update={"learner": learner, "max_epochs": 8, "seeds": 2})
    ids = _held_out(prompts, costs)
    by_id = {p.id: p for p in prompts}
    swapped = dict(zip(ids, np.random.default_rng(0).permutation(ids).tolist(), strict=True))

    def leaked(prompt: CollectedPrompt) -> CollectedPrompt:
        if prompt.id not in swapped:
            return prompt
        other = by_id[swapped[prompt.id]]
        rounds = {
            name: ReplayedDrafter(own.table[: 20 // (int(own.table[0, 1]) + 1)], everywhere=False)
            for name, own in other.replays.items()
        }
        tokens = prompt.output_tokens[:21]
        return replace(prompt, features=other.features, replays=rounds, output_tokens=tokens)

    before, after = (
        train_policy(p, costs, IDENTITY, list(ARMS), section, search=search)
        for p in (prompts, [leaked(p) for p in prompts])
    )

    assert after.policy.chooser.kind == before.policy.chooser.kind
    for name, array in before.policy.chooser.arrays().items():
        assert np.array_equal(array, after.policy.chooser.arrays()[name]), name
    assert (after.training, after.seeds, after.curve) == (
        before.training,
        before.seeds,
        before.curve,
    )
    assert after.card.learner == before.card.learner
    assert after.report.overall.strategies["oracle"] != before.report.overall.strategies["oracle"]


@pytest.mark.parametrize("learner", ["knn", "linucb", "policy_gradient"])
def test_no_learner_is_given_a_held_out_prompt(
    learner: str,
    prompts: list[CollectedPrompt],
    costs: CostTable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Neither the search for settings nor the learning curve nor a seed's training."""
    taken: list[set[str]] = []
    kind = type(LEARNERS[learner])
    fit = kind.fit

    def record(self: Any, data: Dataset, settings: Any, on_progress: Any) -> Any:
        taken.append(set(data.ids))
        return fit(self, data, settings, on_progress)

    monkeypatch.setattr(kind, "fit", record)
    section = SETTINGS.model_copy(update={"learner": learner, "max_epochs": 4, "seeds": 2})
    searched = 3 if LEARNERS[learner].search_space else 0

    train_policy(
        prompts,
        costs,
        IDENTITY,
        list(ARMS),
        section,
        search=searched,
        figure=tmp_path / "curves.png",
    )

    held_out = set(_held_out(prompts, costs))
    assert len(taken) >= searched + 2 + 2
    assert all(ids.isdisjoint(held_out) for ids in taken)
    assert max(map(len, taken)) == len(prompts) - len(held_out)


def test_rewards_of_a_part_are_in_units_of_that_part(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    data, _ = build_dataset(prompts, list(ARMS), costs, SETTINGS)
    for part in split(data, SETTINGS.held_out):
        saved = 1.0 - part.seconds.sum(axis=0) / part.seconds[:, 0].sum()
        assert part.rewards.mean(axis=0) == pytest.approx(saved)


def _held_out(prompts: list[CollectedPrompt], costs: CostTable) -> tuple[str, ...]:
    data, _ = build_dataset(prompts, list(ARMS), costs, SETTINGS)
    return split(data, SETTINGS.held_out)[1].ids


def test_names_and_domains_do_not_reach_the_policy(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    renamed = [replace(p, domain="everything") for p in prompts]

    before, after = (
        train_policy(p, costs, IDENTITY, list(ARMS), SETTINGS) for p in (prompts, renamed)
    )

    assert before.policy.id == after.policy.id


def test_features_that_say_nothing_end_in_one_arm_and_a_note(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    features = [p.features for p in prompts]
    np.random.default_rng(0).shuffle(features)
    shuffled = [replace(p, features=f) for p, f in zip(prompts, features, strict=True)]

    result = train_policy(shuffled, costs, IDENTITY, list(ARMS), SETTINGS)

    assert result.training.constant
    (note,) = result.report.notes
    assert "the policy always chooses" in note
    (share,) = (s for s in result.report.overall.chosen["policy"].arms.values() if s)
    assert share == 1.0


def test_the_alignment_reward_is_on_the_card(
    prompts: list[CollectedPrompt], costs: CostTable, tmp_path: Path
) -> None:
    writing = [
        replace(p, draft_outputs={"code": p.output_tokens, "math": p.output_tokens[:3]})
        for p in prompts
    ]
    settings = LearningSection(reward="alignment", alpha=0.7, max_epochs=5, learner="reinforce")

    result = train_policy(writing, costs, IDENTITY, list(ARMS), settings)

    assert (result.card.reward.kind, result.card.reward.alpha) == ("alignment", 0.7)
    assert result.policy.choose(context(3)).arm == "code"


def test_a_cost_table_without_an_arm_is_refused(
    prompts: list[CollectedPrompt], cost_table: Callable[..., CostTable]
) -> None:
    with pytest.raises(ArtefactError, match=r"math not measured; run `paceline profile`"):
        train_policy(prompts, cost_table(["code"]), IDENTITY, list(ARMS), SETTINGS)


def test_features_of_another_target_are_refused(
    prompts: list[CollectedPrompt], costs: CostTable
) -> None:
    with pytest.raises(StoreError, match=r"54 features a prompt.*give 134.*paceline collect"):
        train_policy(prompts, costs, replace(IDENTITY, hidden_size=64), list(ARMS), SETTINGS)
