"""Measures of a drafter: rounds are the engine's, tasks weigh alike, a gain needs confidence."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.costs.pricing import round_seconds
from paceline.costs.table import CostTable, Measurement
from paceline.distillation.comparison import MEAN, compare, measure_intervals
from paceline.distillation.measures import (
    AnswerMatches,
    measure,
    memory_bound_costs,
    tally,
)
from paceline.distillation.prices import Prices
from paceline.drafting.chain_replay import ChainReplay
from paceline.drafting.draft_replay import PositionScores
from paceline.errors import ArtefactError, ConfigError
from paceline.replay.rounds import simulate
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

Bits = list[bool]


def answers_of(*matches: Bits, tasks: str | None = None) -> AnswerMatches:
    arrays = [np.array(own, dtype=bool) for own in matches]
    return AnswerMatches.of(arrays, list(tasks or "t" * len(arrays)))


def drawn(
    rates: list[float], length: int, seed: int, tasks: list[str] | None = None
) -> AnswerMatches:
    """Return one answer per rate of acceptance."""
    random = np.random.default_rng(seed)
    return AnswerMatches.of([random.random(length) < r for r in rates], tasks or ["t"] * len(rates))


# --- rounds ---------------------------------------------------------------------------------------


def replayed_rounds(match: Bits, num_draft_tokens: int, max_total_output: int) -> np.ndarray:
    """Return the rounds of replay, which are those of the engine."""
    bits = np.array(match, dtype=bool)
    unknown = np.full(len(bits), np.nan, dtype=np.float32)
    rooms = np.full(len(bits), 1000)
    chain = ChainReplay(PositionScores(bits, *(unknown,) * 3), rooms, num_draft_tokens)
    return simulate(chain, len(bits), max_total_output)


@settings(deadline=None)
@given(
    match=st.lists(st.booleans(), max_size=24),
    length=st.integers(1, 6),
    beyond=st.integers(0, 8),
)
def test_rounds_are_those_of_replay_to_the_end_of_the_text(
    match: Bits, length: int, beyond: int
) -> None:
    """The first token is the prefill's; the last round may end with a drafted stop, or at the limit."""
    rounds = replayed_rounds(match, length, len(match) + beyond)
    counts = tally(answers_of(match), 6)

    assert counts.rounds[0, length] == len(rounds)
    assert counts.rounds[0, 0] == max(len(match) - 1, 0) == counts.emitted[0]


def test_each_answer_is_counted_by_its_own_matches() -> None:
    answers: list[Bits] = [[False, True, True, True], [], [True], [True, False, False], [False] * 2]
    together = tally(answers_of(*answers), 4).rounds
    assert together[:, 2].tolist() == [1, 0, 0, 2, 1]
    assert together.tolist() == [tally(answers_of(own), 4).rounds[0].tolist() for own in answers]


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4])
def test_block_efficiency_is_that_of_the_engine(num_draft_tokens: int) -> None:
    model = tiny_model(std=0.1, context=96)
    parts = build_from_objects(
        model,
        byte_tokenizer(),
        {"near": perturbed(model, 0.1)},
        Config(target=ModelSection(model="unused")),
    )
    pace = Pace(parts)
    matches, emitted, rounds = [], 0, 0
    for prompt in ("count the words", "abcabcabc", "print(1)"):
        done = pace.complete(prompt, max_new_tokens=40, drafter=f"near@{num_draft_tokens}")
        scores = parts.drafters["near"].would_accept(pace.encode(prompt), done.token_ids).scores
        assert scores is not None
        matches.append(scores.match)
        emitted += len(done.token_ids) - 1
        rounds += len(done.rounds)
    found = measure(AnswerMatches.of(matches, ["t"] * 3), 1.0)

    assert 1.0 < emitted / rounds < num_draft_tokens + 1
    assert found.mean.block_efficiency[num_draft_tokens] == pytest.approx(emitted / rounds)


# --- measures -------------------------------------------------------------------------------------


def test_tasks_have_equal_weight_whatever_their_number_of_tokens() -> None:
    found = measure(answers_of([True] * 41, [False] * 5, [False] * 5, tasks="abb"), 0.1)

    assert found.tasks["a"].match_rate == 1.0
    assert found.tasks["a"].block_efficiency[:4].tolist() == [1.0, 2.0, 40 / 14, 4.0]
    assert found.tasks["b"].block_efficiency.tolist() == [1.0] * 17
    assert (found.tasks["b"].num_answers, found.tasks["b"].num_tokens) == (2, 10)
    assert found.mean.match_rate == 0.5
    assert found.mean.block_efficiency[3] == 2.5


def test_mbsu_and_the_speedup_without_prices_are_by_parameters() -> None:
    found = measure(answers_of([True] * 41), parameter_ratio=0.25, longest=4)
    own = found.mean

    assert not found.is_priced
    assert own.mbsu == pytest.approx(own.block_efficiency / [1.0, 1.25, 1.5, 1.75, 2.0])
    assert own.speedups == pytest.approx(own.mbsu)
    assert own.best_length == 4
    assert own.predicted_speedup == pytest.approx(2.5)


def test_the_speedup_with_prices_is_by_the_seconds_and_their_best_length() -> None:
    """Four drafted tokens emit more than two; here they cost more than they bring."""
    costs = np.array([1.0, 1.2, 1.25, 4.0, 5.0])
    found = measure(answers_of([True] * 41), 0.25, costs, longest=9)

    assert found.is_priced
    assert len(found.mean.speedups) == 5
    assert found.mean.best_length == 2
    assert found.mean.predicted_speedup == pytest.approx(40 / 14 / 1.25)
    assert found.mean.mbsu[4] == pytest.approx(5.0 / 2.0)


def test_a_drafter_that_does_not_pay_has_a_speedup_below_one() -> None:
    """Plain decoding is not a draft length: two bad drafters could not be told apart."""
    found = measure(answers_of([False] * 9), 0.25)
    assert found.mean.best_length == 1
    assert found.mean.predicted_speedup == pytest.approx(1 / 1.25)


def test_acceptance_under_sampling_is_the_mean_overlap() -> None:
    bits = [np.array([True, False]), np.array([True, True, True])]
    found = measure(AnswerMatches.of(bits, "tt", [np.array([0.5, 0.1]), np.full(3, 0.8)]), 0.1)
    assert found.mean.acceptance == pytest.approx((0.6 + 2.4) / 5)
    unknown = measure(AnswerMatches.of(bits, "tt"), 0.1)
    assert math.isnan(unknown.mean.acceptance)
    assert unknown.to_history()["acceptance"] is None


def test_a_history_entry_is_plain_json_with_every_task() -> None:
    entry = measure(answers_of([True] * 9, [False] * 9, tasks="ab"), 0.5, longest=2).to_history()
    read = json.loads(json.dumps(entry))

    assert read == entry
    assert read["domains"]["a"]["block_efficiency"] == {"1": 2.0, "2": 2.66667}
    assert read["match_rate"] == 0.5
    assert read["is_priced"] is False


def test_a_task_without_a_round_neither_gains_nor_ends_a_training() -> None:
    """Answers of one token are the prefill's; answers of none are no answers."""
    answers = answers_of([True] * 3, [True], [False], [], tasks="abbc")
    found = measure(answers, 0.1)
    assert sorted(found.tasks) == ["a", "b"]
    assert found.tasks["b"].match_rate == 0.5
    assert found.tasks["b"].block_efficiency.tolist() == [1.0] * 17
    assert found.tasks["b"].predicted_speedup == 1.0
    rise = compare(answers, answers, 4)
    assert sorted(rise) == ["a", "b", MEAN]
    assert rise["b"].block_efficiency.value == 0.0


def test_answers_without_a_token_are_refused() -> None:
    for answers in (answers_of([]), AnswerMatches.of([], [])):
        with pytest.raises(ConfigError, match="no answer to measure on"):
            measure(answers, 0.1)
        with pytest.raises(ConfigError, match="no answer to compare on"):
            compare(answers, answers, 4)
    with pytest.raises(ValueError, match="2 answers have 1 tasks"):
        AnswerMatches.of([np.ones(2, dtype=bool)] * 2, ["t"])


# --- prices ---------------------------------------------------------------------------------------


def table() -> CostTable:
    cells = [("target", "forward", n, 1.0 + 0.1 * n) for n in (1, 5, 9)]
    cells += [("small", "propose", k, 0.05 + 0.2 * k) for k in (1, 4, 8)]
    cells += [("engine", "round", 0, 0.3)]
    return CostTable({}, [Measurement(s, o, n, 64, 1, seconds) for s, o, n, seconds in cells])


def test_prices_of_a_table_are_those_of_rounds() -> None:
    """The engine's seconds are in a plain round, too."""
    prices = Prices.from_table(table(), "small", 8, context=64)
    lengths = np.arange(1, 9)
    at = np.array(64)
    plain = round_seconds(table().seconds, "none", np.array(0), at)
    drafting = round_seconds(table().seconds, "small", lengths, at)

    assert prices.round_costs[0] == 1.0
    assert prices.round_costs[1:] == pytest.approx(drafting / plain)
    assert prices.plain == pytest.approx(1.4)
    assert prices.step_share == pytest.approx((0.05 + 1.6) / 8 / 1.1)
    with pytest.raises(ArtefactError, match="no 'propose' of 'large'"):
        Prices.from_table(table(), "large", 8)
    with pytest.raises(ConfigError, match="1 token or more; got 0"):
        Prices.from_table(table(), "small", 0)


def test_costs_by_parameters_are_one_and_a_share_per_token() -> None:
    assert memory_bound_costs(0.1, 3) == pytest.approx([1.0, 1.1, 1.2, 1.3])


# --- comparison -----------------------------------------------------------------------------------


def test_a_clear_rise_is_a_gain_and_an_equal_drafter_is_none() -> None:
    before, after = drawn([0.6] * 100, 60, 1), drawn([0.7] * 100, 60, 2)
    rise = compare(before, after, 4)[MEAN]
    assert rise.match_rate.is_gain
    assert rise.block_efficiency.is_gain
    assert rise.match_rate.low < 0.1 < rise.match_rate.high
    assert not compare(after, before, 4)[MEAN].match_rate.is_gain

    same = compare(before, before, 4)[MEAN].match_rate
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert not same.is_gain


def test_chance_is_called_a_gain_as_rarely_as_the_interval_says() -> None:
    """Two drafters of the same acceptance, 5 answers in each of 2 tasks: 2.5% of the comparisons."""
    tasks = ["a", "b"] * 5
    gains = [
        compare(drawn([0.7] * 10, 40, 2 * i, tasks), drawn([0.7] * 10, 40, 2 * i + 1, tasks), 4)[
            MEAN
        ].match_rate.is_gain
        for i in range(150)
    ]
    assert 0 < sum(gains) <= 12


def test_the_difficulty_of_answers_cancels_in_a_comparison() -> None:
    """Answers of 0.2 to 0.9 acceptance; unpaired, a rise of 0.03 would be lost among them."""
    rates = [0.2 + 0.7 * i / 59 for i in range(60)]
    random = np.random.default_rng(0)
    places = [random.random(80) for _ in rates]
    before, after = (
        AnswerMatches.of([own < r + rise for own, r in zip(places, rates, strict=True)], ["t"] * 60)
        for rise in (0.0, 0.03)
    )
    rise = compare(before, after, 4)[MEAN].match_rate
    alone = measure_intervals(before, 4)[MEAN].match_rate
    assert rise.is_gain
    assert rise.high - rise.low < 0.2 * (alone.high - alone.low)


def test_the_mean_of_a_comparison_weighs_tasks_alike() -> None:
    tasks = ["long"] * 40 + ["short"] * 10
    before = drawn([0.5] * 50, 30, 3, tasks)
    bits = [
        before.match[a:b].copy() for a, b in zip(before.starts, before.starts[1:], strict=False)
    ]
    for own in bits[40:]:
        own[:] = True
    rise = compare(before, AnswerMatches.of(bits, tasks), 4)
    assert rise["long"].match_rate.value == 0.0
    assert rise[MEAN].match_rate.value == pytest.approx(rise["short"].match_rate.value / 2)


def test_a_single_answer_gives_no_confidence() -> None:
    rise = compare(answers_of([False] * 50), answers_of([True] * 50), 4)[MEAN].match_rate
    assert (rise.value, rise.low, rise.high) == (1.0, -math.inf, math.inf)
    assert not rise.is_gain


def test_acceptance_under_sampling_is_compared_where_it_is_known() -> None:
    bits = [np.array([True, False, True])] * 6
    low, high = (AnswerMatches.of(bits, "tttttt", [np.full(3, a)] * 6) for a in (0.5, 0.6))
    rise = compare(low, high, 2)[MEAN].acceptance
    assert rise is not None
    assert rise.low == pytest.approx(0.1)
    assert compare(low, AnswerMatches.of(bits, "tttttt"), 2)[MEAN].acceptance is None


def test_drafters_are_compared_on_the_same_answers_only() -> None:
    with pytest.raises(ConfigError, match="compared on the same answers, tasks and order"):
        compare(answers_of([True] * 3), answers_of([True] * 4), 4)
    with pytest.raises(ConfigError, match="compared on the same answers, tasks and order"):
        compare(answers_of([True] * 3, tasks="a"), answers_of([True] * 3, tasks="b"), 4)
