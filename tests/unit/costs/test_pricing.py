"""Prices of arms: the live pricer equals the table, and the objectives keep their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import LearningSection
from paceline.contracts import split_arm
from paceline.costs import ArmPricer, CostTable, Measurement, Objective
from paceline.costs.pricing import ArmRates, by_objective, prompt_seconds, round_seconds
from paceline.errors import ArtefactError, ConfigError
from paceline.rewards import request_seconds

ARMS = ("none", "math", "math@1", "lookup@6", "code@3", "code")
LONGEST = {"none": 0, "math": 4, "lookup": 12, "code": 5}
OBJECTIVES: list[Objective] = ["latency", "throughput", 0.3, 0.5]


def a_table() -> CostTable:
    """Return a table whose seconds rise unevenly in everything, on grids that differ."""
    generator = np.random.default_rng(5)
    cells = [Measurement("target", "prefill", n, 0, 1, 2e-3 * n**0.9) for n in (16, 64, 300)]
    for rows in (1, 2, 4, 8):
        cells.append(Measurement("engine", "round", 0, 0, rows, 1e-4 * rows**0.7))
        for context in (32, 128, 500) if rows == 1 else (32, 128):
            total = 3e-3 * rows**0.4 * (1 + context / 900)
            for tokens in range(1, 5 + 12 * rows, 3):
                total += 2e-4 * generator.random()
                cells.append(Measurement("target", "forward", tokens, context, rows, total))
    for name, length in (("math", 4), ("lookup", 12), ("code", 5)):
        speed = {"math": 3e-4, "lookup": 1e-6, "code": 5e-4}[name]
        cells += [Measurement(name, "start", n, 0, 1, speed * n / 9) for n in (16, 90, 300)]
        for rows in (1, 4):
            for context in (32, 200):
                for tokens in {0, 1, length}:
                    seconds = speed * rows**0.5 * (0.1 + tokens) * (1 + context / 999)
                    cells.append(Measurement(name, "propose", tokens, context, rows, seconds))
    return CostTable({}, cells)


TABLE = a_table()
PRICER = ArmPricer(TABLE, ARMS)


def table_seconds_per_token(
    arm: str,
    rounds_per_token: float,
    drafted_per_token: float,
    empty_per_token: float,
    context: float,
    rows: int,
    objective: Objective,
    num_tokens: float,
    num_prompt: float,
) -> float:
    """Return the seconds per token of one arm, read from the table itself: the readable reference."""
    drafter = split_arm(arm)[0]
    drafting = rounds_per_token - empty_per_token
    drafted = drafted_per_token / drafting if drafting else 0.0
    whole = int(drafted)

    def price(num_drafting: int) -> float:
        lengths, contexts = np.array([0, whole, whole + 1]), np.array([context])
        nothing, fewer, more = round_seconds(
            TABLE.seconds, drafter, lengths, contexts, rows, num_drafting
        )
        typical = fewer + (drafted - whole) * (more - fewer)
        before = prompt_seconds(TABLE.seconds, drafter, np.array([num_prompt]))[0]
        return float(empty_per_token * nothing + drafting * typical + before / num_tokens)

    return by_objective(price, rows, objective)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 1.0), st.floats(0, 1), st.floats(0, 0.99)), min_size=6, max_size=6
    ),
    st.floats(0, 2000),
    st.sampled_from([1, 2, 3, 4, 7, 8, 12]),
    st.sampled_from(OBJECTIVES),
    st.integers(1, 300),
    st.integers(16, 900),
)
def test_live_prices_are_those_of_the_table(
    needs: list[tuple[float, float, float]],
    context: float,
    rows: int,
    objective: Objective,
    num_tokens: int,
    num_prompt: int,
) -> None:
    """At any length, load, mean draft and share of empty rounds."""
    rounds = np.array([r for r, _, _ in needs])
    empty = rounds * [share for _, _, share in needs]
    lengths = [split_arm(a)[1] or LONGEST[split_arm(a)[0]] for a in ARMS]
    most = [share * length for (_, share, _), length in zip(needs, lengths, strict=True)]
    drafted = (rounds - empty) * most
    situation = (context, rows, objective, num_tokens, num_prompt)
    live = PRICER.seconds_per_token(
        ArmRates(rounds, drafted, empty, rounds - empty, drafted), *situation
    )
    direct = [
        table_seconds_per_token(arm, rounds[i], drafted[i], empty[i], *situation)
        for i, arm in enumerate(ARMS)
    ]
    # beyond the measured range the table is flat at its minimum, perhaps from between two grid points
    inside = 32 <= context <= 500 and rows <= 8
    assert live == pytest.approx(direct, rel=1e-9 if inside else 0.02)


@given(st.sampled_from(ARMS), st.integers(1, 12), st.sampled_from(OBJECTIVES))
def test_exact_and_live_prices_agree_on_a_request_of_full_and_empty_rounds(
    arm: str, rows: int, objective: Objective
) -> None:
    """On a table that is flat in the context, so the middle of the answer is typical."""
    flat = CostTable({}, [m for m in TABLE.measurements if m.context in (0, 32)])
    length = split_arm(arm)[1] or LONGEST[split_arm(arm)[0]]
    rounds = np.array([(length, min(length, 2))] * 10 + [(0, 0)] * 7)
    num_tokens = 1 + int((rounds[:, 1] + 1).sum())
    exact = request_seconds(flat.seconds, arm, 64, rounds, rows, objective) / num_tokens
    one_arm = ArmPricer(flat, [arm])
    num_empty = int((rounds[:, 0] == 0).sum())
    counts = (17, 10 * length, num_empty, 17 - num_empty, 10 * length)
    rates = ArmRates(*(np.array([n / num_tokens]) for n in counts))
    (live,) = one_arm.seconds_per_token(rates, 70.0, rows, objective, num_tokens, 64)
    assert live == pytest.approx(
        exact, rel=1e-9 if objective in ("latency", "throughput") else 1e-6
    )


@given(st.sampled_from(ARMS), st.integers(16, 300), st.integers(1, 16))
def test_objectives_are_ordered_and_mixed(arm: str, num_prompt: int, rows: int) -> None:
    length = split_arm(arm)[1] or LONGEST[split_arm(arm)[0]]
    rounds = np.array([(length, min(length, 1))] * 7)
    own = {o: request_seconds(TABLE.seconds, arm, num_prompt, rounds, rows, o) for o in OBJECTIVES}
    alone = request_seconds(TABLE.seconds, arm, num_prompt, rounds)
    more = request_seconds(TABLE.seconds, arm, num_prompt, rounds, rows + 1, "latency")
    if rows == 1:
        assert set(own.values()) == {alone}
    # neighbours cost a request time, and save the machine some
    assert own["throughput"] <= own["latency"] <= more
    assert alone <= own["latency"]
    assert own[0.3] == pytest.approx(own["latency"] ** 0.7 * own["throughput"] ** 0.3)
    assert own["throughput"] * (1 - 1e-12) <= own[0.5] <= own[0.3] <= own["latency"] * (1 + 1e-12)


@given(
    st.integers(0, 12), st.integers(0, 12), st.integers(0, 6), st.sampled_from([1, 4, 7]),
    st.sampled_from(OBJECTIVES),
)  # fmt: skip
def test_a_cascades_proposals_are_priced_by_the_tokens_of_its_models(
    by_lookup: int, by_model: int, num_empty: int, rows: int, objective: Objective
) -> None:
    """Rounds of a lookup draft 3 tokens, those of a model 5, at the price of a proposal of 0 and 5."""
    flat = CostTable({}, [m for m in TABLE.measurements if m.context in (0, 32)])
    kinds = [(3, 1, 0)] * by_lookup + [(5, 2, 5)] * by_model + [(0, 0, 0)] * num_empty
    rounds = np.array(kinds, dtype=np.int64).reshape(-1, 3)
    num_tokens = 1 + int((rounds[:, 1] + 1).sum())
    exact = request_seconds(
        flat.seconds, "code", 64, rounds[:, :2], rows, objective, proposed=rounds[:, 2]
    )
    drafted = rounds[:, 0].sum()
    counts = (len(rounds), drafted, num_empty, by_model, 5 * by_model)
    rates = ArmRates(*(np.array([n / num_tokens]) for n in counts))

    (live,) = ArmPricer(flat, ["code"]).seconds_per_token(
        rates, 70.0, rows, objective, num_tokens, 64
    )

    if not len(rounds):
        return  # without a round nothing was started
    if by_lookup and by_model:
        # a mean draft is priced between whole ones, and verification is not linear in the tokens
        assert live * num_tokens == pytest.approx(exact, rel=0.05)
    else:
        relative = 1e-9 if objective in ("latency", "throughput") else 1e-6
        assert live * num_tokens == pytest.approx(exact, rel=relative)


def test_the_machines_tokens_per_second_are_the_default() -> None:
    rounds = np.array([(4, 1)] * 7)

    found = request_seconds(TABLE.seconds, "math", 64, rounds, 8)

    assert found == request_seconds(TABLE.seconds, "math", 64, rounds, 8, "throughput")
    assert found < request_seconds(TABLE.seconds, "math", 64, rounds, 8, "latency")
    assert LearningSection().objective == "throughput"


def test_a_round_is_charged_by_hand() -> None:
    """Four rows: one drafts and three do not, or all draft and share."""

    def seconds(subject: str, operation: str, tokens: object, context: object, rows: int) -> float:
        known = {
            ("target", "forward", 4, 4): 10.0, ("target", "forward", 13, 4): 26.0,
            ("engine", "round", 0, 4): 2.0, ("math", "propose", 3, 1): 3.0,
            ("math", "propose", 3, 4): 8.0,
        }  # fmt: skip
        return known[subject, operation, int(np.asarray(tokens).item()), rows]

    drafted, context = np.array([3]), np.array([50])
    assert round_seconds(seconds, "math", drafted, context, 4, 1) == [15.0]
    assert round_seconds(seconds, "math", drafted, context, 4, 4) == [36.0 / 4]


def test_under_load_an_expensive_width_reverses_the_choice() -> None:
    """One row gets width for free and drafting wins; eight drafting rows pay for every token."""
    cells = [
        Measurement("target", "prefill", 1, 0, 1, 0.0),
        Measurement("math", "start", 1, 0, 1, 0.0),
    ]
    for rows in (1, 8):
        cells.append(Measurement("engine", "round", 0, 0, rows, 0.0))
        cells.append(Measurement("math", "propose", 4, 0, rows, 0.1))
        for tokens in (1, 1 + 4 * rows):
            packed = rows - 1 + tokens
            cells.append(Measurement("target", "forward", tokens, 0, rows, max(1.0, packed / 8)))
    table = CostTable({}, cells)
    rounds = {"none": np.zeros((20, 2), dtype=int), "math": np.array([(4, 1)] * 10)}

    def taken(arm: str, rows: int, objective: Objective) -> float:
        return request_seconds(table.seconds, arm, 5, rounds[arm], rows, objective)

    objectives: tuple[Objective, ...] = ("latency", "throughput")
    speed = {
        (rows, o): taken("none", rows, o) / taken("math", rows, o)
        for rows in (1, 8)
        for o in objectives
    }
    assert speed[1, "latency"] == speed[1, "throughput"] == pytest.approx(2 / 1.1)
    assert speed[8, "latency"] == pytest.approx(2 / 1.6)
    assert speed[8, "throughput"] == pytest.approx(2 / 5.1)


# --- the other rows' drafters ---------------------------------------------------------------------


def priced(
    arms: list[str], rows: int, others: dict[str, int], objective: Objective = "throughput"
) -> dict[str, float]:
    """Return seconds per token of arms that draft three tokens in each of two rounds per token.

    A call takes 5 seconds and 1 more per row and drafted token, a forward 10.
    """
    cells = [Measurement("target", "prefill", 1, 0, 1, 0.0)]
    for name in ("math", "code"):
        cells.append(Measurement(name, "start", 1, 0, 1, 0.0))
        cells += [
            Measurement(name, "propose", k, 0, n, 5.0 + n * k) for k in (1, 4) for n in (1, 8)
        ]
    for n in (1, 8):
        cells.append(Measurement("engine", "round", 0, 0, n, 0.0))
        cells += [Measurement("target", "forward", k, 0, n, 10.0) for k in (1, 99)]
    does = np.array([float(arm != "none") for arm in arms])
    twice, six, never = 2 * np.ones(len(arms)), 6 * does, 2 * (1 - does)
    rates = ArmRates(twice, six, never, 2 * does, six)
    pricer = ArmPricer(CostTable({}, cells), arms)
    found = pricer.seconds_per_token(rates, 9, rows, objective, np.inf, 5, others)
    return dict(zip(arms, found.tolist(), strict=True))


def test_a_drafter_in_use_costs_a_row_what_it_adds_to_the_call() -> None:
    """Four rows: three tokens more in the call for three others, or a call of its own."""
    arms = ["none", "math", "math@3", "code"]
    shared = 2 * 10 / 4  # two forwards by four rows

    found = priced(arms, 4, {"math": 2, "none": 1})

    assert found == pytest.approx(
        {"none": shared, "math": shared + 2 * 3, "math@3": shared + 2 * 3, "code": shared + 2 * 8}
    )


def test_rows_without_a_choice_are_assumed_to_share_the_call() -> None:
    arms = ["math", "code"]

    unknown = priced(arms, 4, {})
    assert unknown == pytest.approx(dict.fromkeys(arms, 2 * (10 + 5 + 4 * 3) / 4))
    # this row and another that has not chosen yet
    half = priced(arms, 4, {"math": 2})
    assert half == pytest.approx({"math": 2 * (10 / 4 + 3), "code": 2 * (10 / 4 + (5 + 6) / 2)})


def test_what_rows_are_charged_is_the_whole_round() -> None:
    """If each is charged for joining those before it."""
    joined = ["math", "code", "math", "math", "none", "code"]
    seconds = 0.0
    for i, arm in enumerate(joined):
        others = {name: joined[:i].count(name) for name in joined}
        others["none"] += len(joined) - 1 - i
        seconds += priced(["none", "math", "code"], len(joined), others)[arm] / 2

    assert seconds == pytest.approx(10 + (5 + 3 * 3) + (5 + 2 * 3))


def test_with_latency_the_other_rows_decode_plainly() -> None:
    arms = ["math", "code"]

    alone = priced(arms, 4, {}, "latency")

    assert priced(arms, 4, {"math": 3}, "latency") == alone
    shared, mixed = priced(arms, 4, {"math": 3}), priced(arms, 4, {"math": 3}, 0.5)
    assert mixed["code"] == pytest.approx((alone["code"] * shared["code"]) ** 0.5)


def test_a_call_that_seems_shorter_for_more_rows_is_free_at_best() -> None:
    cells = [m for m in TABLE.measurements if m.subject != "math" or m.operation != "propose"]
    cells += [Measurement("math", "propose", 4, 0, rows, 1.0 / rows) for rows in (1, 4)]
    pricer = ArmPricer(CostTable({}, cells), ["none", "math"])
    one, nothing = np.ones(2), np.zeros(2)

    none, math = pricer.seconds_per_token(
        ArmRates(one, nothing, one, nothing, nothing), 60, 4, "throughput", np.inf, 64, {"math": 3}
    )

    assert math == none


def test_missing_drafters_and_invalid_objectives_raise() -> None:
    with pytest.raises(ArtefactError, match="chat not measured"):
        ArmPricer(TABLE, ["none", "chat@2"])
    for wrong in ("fast", 1.5, -0.1):
        with pytest.raises(ConfigError, match="latency, throughput or a weight between 0 and 1"):
            request_seconds(TABLE.seconds, "none", 5, np.zeros((1, 2), int), 2, wrong)  # type: ignore[arg-type]
