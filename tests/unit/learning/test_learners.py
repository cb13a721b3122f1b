"""Every learner on prompts whose best arms are known, and on logs of the chosen arm only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.config import LearningSection
from paceline.contracts import no_progress
from paceline.costs import CostTable, Measurement
from paceline.errors import ConfigError, StoreError
from paceline.learning.dataset import Dataset, build_dataset
from paceline.learning.learn import fit_seeds
from paceline.learning.learners import LEARNERS, check_settings, find_learner
from paceline.learning.learners.bandits import LinearBandit
from paceline.learning.learners.base import (
    block_weights,
    earned_by,
    earned_unselected,
    first_best,
    make_folds,
    reduce,
    rewards_by_load,
)
from paceline.learning.search import search
from paceline.selection.choosers import CHOOSERS, AcceptanceChooser, FixedChooser, NetworkChooser
from paceline.store.records import CollectedPrompt, ReplayedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.learning.learners import Fitted

ARMS = ("none", "code@2", "code", "math@2", "math")
# with `throughput` the best arms of 1 and 16 rows differ more than a linear chooser can express
SETTINGS = LearningSection(loads=(1, 16), max_epochs=60, objective="latency")
FAST = ("acceptance", "knn", "linucb", "first_line_lookup")


def table(speed: float = 1.0) -> CostTable:
    """Build prices: a draft pays with 1 row in flight, not with 16. speed: of drafters."""
    rows = [
        Measurement("target", "forward", t, 0, n, 1.0 + (0.02 if n == 1 else 1.2) * (t - 1))
        for n in (1, 16)
        for t in (1, 9, 81)
    ]
    rows += [Measurement("target", "prefill", 10, 0, 1, 2.0)]
    rows += [Measurement("engine", "round", 0, 0, 1, 0.01)]
    for drafter in ("code", "math"):
        rows += [Measurement(drafter, "start", 10, 0, 1, 0.1)]
        rows += [Measurement(drafter, "propose", t, 0, 1, 0.05 * t * speed) for t in (0, 4)]
    return CostTable({}, rows)


def prompts(num: int, seed: int = 0) -> list[CollectedPrompt]:
    """Draw prompts of three kinds: `code`, `math` or neither is right. The hidden states tell which."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(3, 40)) * 0.7
    found = []
    for i in range(num):
        kind, T = i % 3, 60
        replays = {}
        for place, drafter in enumerate(("code", "math")):
            share = 0.9 if place == kind else 0.15
            run = np.minimum(rng.geometric(1 - share, T - 1) - 1, 4)
            kept = np.minimum(run, T - np.arange(1, T))
            replays[drafter] = ReplayedDrafter(
                np.stack([np.full(T - 1, 4), kept], axis=1), everywhere=True
            )
        features = np.hstack([centres[kind] + rng.normal(size=40), rng.normal(size=6)])
        # one in three prompts of a kind begins like another kind's
        opening = (kind + (i % 9 == 0)) % 3
        found.append(
            CollectedPrompt(
                f"p{i}",
                f"kind {kind}",
                (opening,) * 8 + (i,),
                tuple(range(T)),
                T,
                features.astype(np.float32),
                replays,
                {},
            )
        )
    return found


def data(num: int = 90, seed: int = 0, costs: CostTable | None = None) -> Dataset:
    return build_dataset(prompts(num, seed), ARMS, costs or table(), SETTINGS)[0]


def fit(name: str, train: Dataset, **changes: object) -> Fitted:
    settings = check_settings(SETTINGS.model_copy(update={"learner": name, **changes}))
    return LEARNERS[name].fit(train, settings, no_progress)


def share_of_oracle(fitted: Fitted, held_out: Dataset, rows: int) -> float:
    seconds = held_out.seconds_for(rows)
    chooser = fitted.chooser
    if chooser.portable and chooser.pricer is None:
        chooser.pricer = held_out.pricer()
    distribution = chooser.distribution(
        chooser.preferences(held_out.features, held_out.situation(rows))
    )
    return float(seconds.min(axis=1).sum() / (distribution * seconds).sum())


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_is_whole(name: str) -> None:
    """A learner in the catalogue can be configured, searched, fitted, saved and restored."""
    learner, train = LEARNERS[name], data(48)
    options = set(learner.Settings.model_fields) - set(LearningSection.model_fields)
    assert name == learner.name
    defaults = {option: learner.Settings.model_fields[option].default for option in options}
    settings = check_settings(LearningSection(learner=name, loads=(1, 16), **defaults))
    assert settings == check_settings(LearningSection(learner=name, loads=(1, 16)))
    assert set(learner.search_space) <= options
    for option, (low, high) in learner.search_space.items():
        assert low <= defaults[option] <= high
        assert learner.settings(LearningSection(**{option: low})) != settings

    short = check_settings(LearningSection(learner=name, loads=(1, 16), max_epochs=3, kinds=4))
    chooser = learner.fit(train, short, no_progress).chooser

    assert isinstance(chooser, (learner.chooser, FixedChooser))
    assert CHOOSERS[learner.chooser.kind] is learner.chooser
    assert learner.chooser.portable is learner.predicts_work
    restored = type(chooser).restore(train.arms, chooser.arrays(), chooser.facts())
    if chooser.portable:
        chooser.pricer = restored.pricer = train.pricer()
    found = chooser.preferences(train.features, train.situation())
    assert np.array_equal(restored.preferences(train.features, train.situation()), found)


def test_a_section_may_hold_the_options_of_several_learners_and_no_others() -> None:
    section = LearningSection(kinds=12, hidden_units=9)

    assert check_settings(section).kinds == 12
    networks = check_settings(section.model_copy(update={"learner": "reinforce"}))
    assert networks.hidden_units == 9 and not hasattr(networks, "kinds")
    with pytest.raises(ConfigError, match="unknown key 'kind'; did you mean 'kinds'"):
        check_settings(LearningSection(kind=12))
    with pytest.raises(ConfigError, match=r"'hidden_units': .*greater than or equal to 1, got 0"):
        check_settings(LearningSection(hidden_units=0))
    with pytest.raises(ConfigError, match="unknown learner 'kn'; did you mean 'knn'"):
        check_settings(LearningSection(learner="kn"))
    with pytest.raises(ConfigError, match="unknown learner 'zzz'; valid: acceptance, reinforce"):
        find_learner("zzz")


@pytest.mark.parametrize("name", FAST)
def test_held_out_prompts_get_nearly_what_the_oracle_gets(name: str) -> None:
    fitted = fit(name, data(150 if name == "linucb" else 90))
    held_out = data(90, seed=1)

    best_single = share_of_oracle(fit("fixed", data()), held_out, 1)
    assert best_single < 0.85
    least = {"first_line_lookup": 0.8, "linucb": 0.9}.get(name, 0.97)
    assert share_of_oracle(fitted, held_out, 1) > least
    assert fitted.summary.gain > fitted.summary.gain_error


def test_prompts_unlike_those_in_training_get_the_best_single_arm() -> None:
    train, held_out = data(), data(60, seed=1)
    chooser = fit("acceptance", train).chooser
    assert isinstance(chooser, AcceptanceChooser)
    chooser.pricer = train.pricer()
    # the same kinds of prompt, in a direction in which no training prompt varies alone
    rng = np.random.default_rng(7)
    away = 20.0 * rng.choice([-1.0, 1.0], size=46).astype(np.float32)
    strange = replace(held_out, features=held_out.features + away)

    assert chooser.reduction.familiarity(held_out.features).mean() > 0.9
    assert (chooser.reduction.familiarity(strange.features) == 0.0).all()
    # the arm with the least seconds by the average work, whatever the prompt
    work = chooser.work(strange.features, strange.situation())
    assert np.ptp(work.rounds_per_token, axis=0).max() < 1e-6
    taken = chooser.preferences(strange.features, strange.situation()).argmax(axis=1)
    assert {ARMS[place] for place in taken} == {ARMS[train.seconds.sum(axis=0).argmin()]}
    assert len(set(chooser.preferences(held_out.features, held_out.situation()).argmax(axis=1))) > 1


@pytest.mark.parametrize("name", ["acceptance", "knn", "reinforce", "fixed"])
def test_under_load_another_arm_is_taken(name: str) -> None:
    held_out = data(60, seed=1)
    assert {ARMS[place] for place in held_out.seconds_for(16).argmin(axis=1)} == {"none"}

    fitted = fit(name, data())

    assert share_of_oracle(fitted, held_out, 16) > 0.99


@pytest.mark.parametrize("name", ["acceptance", "knn"])
def test_a_portable_chooser_follows_the_prices(name: str) -> None:
    """A chooser that learned with cheap drafters takes `none` where drafters are expensive."""
    fitted = fit(name, data())
    dear = data(60, seed=1, costs=table(speed=40.0))

    fitted.chooser.pricer = dear.pricer()

    preferred = fitted.chooser.preferences(dear.features, dear.situation()).argmax(axis=1)
    assert {ARMS[place] for place in preferred} == {"none"}


@pytest.mark.parametrize("name", ["acceptance", "knn"])
def test_predicted_rates_stay_within_what_was_seen(name: str) -> None:
    train = data()
    fitted = fit(name, train)
    strange = replace(train, features=train.features * 1e4)

    work = fitted.chooser.work(strange.features, strange.situation())

    for predicted, seen in (
        (work.rounds_per_token, train.rounds_per_token),
        (work.drafted_per_token, train.drafted_per_token),
        (work.empty_per_token, train.empty_per_token),
    ):
        assert (predicted >= seen.min(axis=0) - 1e-6).all()
        assert (predicted <= seen.max(axis=0) + 1e-6).all()


@pytest.mark.parametrize("name", ["acceptance", "knn"])
def test_features_that_say_nothing_give_the_arm_that_is_best_on_average(name: str) -> None:
    train = data()
    shuffled = replace(train, features=np.random.default_rng(0).permutation(train.features))

    fitted = fit(name, shuffled)

    assert fitted.summary.constant
    fitted.chooser.pricer = train.pricer()
    preferred = fitted.chooser.preferences(train.features, train.situation()).argmax(axis=1)
    assert set(preferred) == {int(train.seconds.sum(axis=0).argmin())}


def test_labels_reach_no_learner() -> None:
    train = data(30)
    renamed = replace(train, domains=("x",) * len(train))

    for name in ("acceptance", "knn", "linucb"):
        before, after = fit(name, train).chooser.arrays(), fit(name, renamed).chooser.arrays()
        assert all(np.array_equal(before[key], after[key]) for key in before), name


def test_folds_keep_a_prompts_rows_together() -> None:
    groups = [f"p{i}" for i in range(50)] * 2
    folds = make_folds(groups, 0)

    number = np.full(100, -1)
    for i, (rest, own) in enumerate(folds):
        assert sorted([*rest, *own]) == list(range(100))
        number[own] = i
    assert np.array_equal(number[:50], number[50:])
    assert set(np.bincount(number)) == {20}
    with pytest.raises(StoreError, match="4 different prompts are too few"):
        make_folds(["a", "b", "c", "d"] * 9, 0)


def test_rewards_by_load_are_the_prices() -> None:
    train = data(30)
    rewards = rewards_by_load(train, SETTINGS)

    assert rewards.shape == (2, 30, 5)
    assert rewards[0] == pytest.approx(train.rewards)
    seconds = train.seconds_for(16)
    assert rewards[1] == pytest.approx((seconds[:, :1] - seconds) / seconds[:, 0].mean())
    assert (rewards[1, :, 1:] < 0).all()


def test_the_bandits_ridge_is_that_of_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    bandit = LinearBandit(3, 2)
    inputs, rewards = rng.normal(size=(20, 3)), rng.normal(size=20)
    for x, r in zip(inputs, rewards, strict=True):
        bandit.update(x, 1, r)

    gram = inputs.T @ inputs + np.eye(3)
    assert bandit.weights[1] == pytest.approx(np.linalg.solve(gram, inputs.T @ rewards))
    assert (bandit.weights[0] == 0).all()
    x = rng.normal(size=3)
    width = np.sqrt(x @ np.linalg.solve(gram, x))
    assert bandit.bounds(x, 2.0)[1] == pytest.approx(bandit.weights[1] @ x + 2.0 * width)


def test_bandits_learn_from_the_logged_arms_alone(tabled: Callable[..., Dataset]) -> None:
    """One arm per prompt is known; the others are NaN and must not count."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, 6))
    truth = np.stack([np.ones(600), 1 + features[:, 0], 1 - features[:, 0]], axis=1)
    logged = np.where(np.eye(3, dtype=bool)[rng.integers(0, 3, 600)], truth, np.nan)
    arms = ("none", "a", "b")
    settings = check_settings(LearningSection(learner="linucb"))
    settings = settings.model_copy(update={"reward": "clocked"})

    part = tabled(arms, features[:400], rewards=logged[:400])
    fitted = LEARNERS["linucb"].fit(part, settings, no_progress)

    rest = tabled(arms, features[400:], rewards=truth[400:])
    earned = earned_by(fitted.chooser, rest, rest.rewards[None], settings).mean()
    assert earned > 0.97 * truth[400:].max(axis=1).mean()
    assert np.isfinite(fitted.summary.score)
    assert fitted.summary.gain > 0


def test_the_first_line_is_told_from_the_rest_of_a_prompt() -> None:
    fitted = fit("first_line_lookup", data())
    chooser = fitted.chooser

    assert 4 <= chooser.num_tokens <= 8  # the ninth token is the prompt's own
    assert set(chooser.table) == {(opening,) * chooser.num_tokens for opening in range(3)}
    unheard = replace(data(30), prompts=((77,) * 9,) * 30)
    distribution = chooser.preferences(unheard.features, unheard.situation())
    assert (distribution.argmax(axis=1) == chooser.otherwise).all()


def test_several_seeds_are_averaged_where_that_is_possible() -> None:
    train = data()
    for name, kind, least in (
        ("acceptance", AcceptanceChooser, 0.97),
        ("reinforce", NetworkChooser, 0.8),  # 30 epochs are few
    ):
        section = SETTINGS.model_copy(update={"learner": name, "seeds": 2, "max_epochs": 30})
        settings = check_settings(section)
        fitted, seeds = fit_seeds(LEARNERS[name], train, settings, no_progress)
        alone = fit(name, train, max_epochs=30)

        assert isinstance(fitted.chooser, kind)
        assert (len(seeds.scores), seeds.kept) == (2, "average")
        assert seeds.scores[0] == alone.summary.score
        assert seeds.spread == pytest.approx(np.std(seeds.scores, ddof=1))
        twice, once = fitted.chooser.arrays(), alone.chooser.arrays()
        assert sum(a.size for a in twice.values()) > 1.5 * sum(a.size for a in once.values())
        assert share_of_oracle(fitted, data(60, seed=1), 1) > least


def test_of_seeds_that_cannot_be_averaged_the_best_is_kept() -> None:
    settings = check_settings(SETTINGS.model_copy(update={"learner": "linucb", "seeds": 3}))
    fitted, seeds = fit_seeds(LEARNERS["linucb"], data(), settings, no_progress)

    assert seeds.kept == "best"
    assert fitted.summary.score == max(seeds.scores)


def test_the_best_of_many_is_not_judged_on_what_chose_it() -> None:
    """Forty candidates of the same worth: the best of them looks better, and is not."""
    rng = np.random.default_rng(0)
    gains, apparent = [], []
    for draw in range(60):
        earned = rng.normal(size=(40, 50))
        groups = [f"{draw} {i}" for i in range(50)]
        gains.append(earned_unselected(earned, earned, groups).mean())
        apparent.append(earned.mean(axis=1).max())
    assert np.mean(apparent) > 0.25
    assert abs(np.mean(gains)) < 4 * np.std(gains) / 60**0.5 < 0.1

    # a candidate that is better is found, and rows of one prompt are judged together
    earned = rng.normal(size=(5, 400)) + np.array([0, 0, 3, 0, 0])[:, None]
    assert np.array_equal(
        earned_unselected(earned, earned, [f"{i}" for i in range(400)]), earned[2]
    )
    pairs = [f"{i // 2}" for i in range(400)]
    which = np.arange(5.0)[:, None] + np.zeros((5, 400))
    chosen = earned_unselected(which, rng.normal(size=(5, 400)), pairs)
    assert (chosen[::2] == chosen[1::2]).all()
    assert np.array_equal(earned_unselected(which, earned, ["same"] * 400), which[2])


def test_epochs_end_at_the_last_clear_improvement() -> None:
    assert first_best(np.array([1.0, 3.0, 3.05, 2.0, 3.2, 3.1]), 0.1) == 4
    assert first_best(np.array([1.0, 3.0, 3.05]), 0.1) == 1


def test_a_search_finds_no_worse_settings_and_says_what_it_cannot_search() -> None:
    train = data(60)
    start = check_settings(SETTINGS.model_copy(update={"learner": "linucb", "optimism": 3.0}))
    found = search(train, start, 4)

    fits = [LEARNERS["linucb"].fit(train, s, no_progress) for s in (start, found)]
    assert fits[1].summary.score >= fits[0].summary.score
    low, high = LEARNERS["linucb"].search_space["optimism"]
    assert low <= found.optimism <= high
    assert found.model_copy(update={"optimism": 3.0}) == start
    with pytest.raises(ConfigError, match=r"learner 'fixed' has no settings to search.*acceptance"):
        search(train, check_settings(SETTINGS.model_copy(update={"learner": "fixed"})), 2)


def test_a_reduction_keeps_what_varies_and_leaves_out_what_does_not() -> None:
    rng = np.random.default_rng(0)
    for num in (20, 200):  # fewer and more prompts than features
        hidden = rng.uniform(-1, 1, size=(num, 3)) @ rng.normal(size=(3, 50))
        features = np.hstack([hidden, np.full((num, 1), 7.0)]).astype(np.float32)
        reduction = reduce(features, block_weights({}, 51), 8)

        assert reduction.num_components == 3
        components = reduction(features)
        assert components.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-4)
        # standardised inputs, and so their distances, are kept whole; none is large enough to clip
        standard = (features - features.mean(axis=0)) * reduction.scale
        apart = ((standard[0] - standard[1:]) ** 2).sum(axis=1)
        assert ((components[0] - components[1:]) ** 2).sum(axis=1) == pytest.approx(apart, rel=1e-3)
