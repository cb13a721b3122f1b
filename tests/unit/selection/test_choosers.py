"""Choosers against readable references, saved to arrays and restored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.costs import CostTable, Measurement
from paceline.costs.pricing import ArmPricer, ArmRates
from paceline.errors import ArtefactError
from paceline.selection.choosers import (
    CHOOSERS,
    AcceptanceChooser,
    Chooser,
    FirstLineChooser,
    FixedChooser,
    LinearChooser,
    NeighboursChooser,
    NetworkChooser,
    PolicyNetwork,
    RandomChooser,
    Reduction,
    Situation,
    softmax,
)
from paceline.selection.features import CLIP

if TYPE_CHECKING:
    from collections.abc import Callable

ARMS = ("none", "code@2", "code")
COMPOSED = np.array([2])  # as if `code` were a cascade
F, Z, A, H = 6, 3, 3, 4
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(7, F)).astype(np.float32)


def arrays(*shapes: tuple[int, ...], seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def situation(num: int = 7, rows: int = 1, **changes: object) -> Situation:
    prompts = tuple((i % 3, i % 3, i) for i in range(num))
    return Situation(np.full(num, 20), rows, prompts=prompts, **changes)


def network(seed: int = 1) -> PolicyNetwork:
    return PolicyNetwork(*arrays((F + 1,), (F + 1,), (F + 1, H), (H,), (H, A), (A,), seed=seed))


def reduction() -> Reduction:
    everywhere = np.full(2, 1e30, np.float32)
    return Reduction(*arrays((F,), (F,), (F, Z), (Z,), (F,)), everywhere)


def acceptance(seed: int = 1) -> AcceptanceChooser:
    M, E, O = 5, 2, 3 * A + 2 * len(COMPOSED) + 1  # noqa: E741
    gates, biases = arrays((E, Z, M), (E, M), seed=seed)
    kinds = np.random.default_rng(seed).uniform(0.2, 1.0, size=(E, M, O)).astype(np.float32)
    low, high = np.full(O, 0.1, np.float32), np.full(O, 0.9, np.float32)
    average = np.full(O, 0.5, np.float32)
    ends = (low, high, average, COMPOSED)
    return AcceptanceChooser(ARMS, reduction(), gates, biases, kinds, *ends)


def neighbours() -> NeighboursChooser:
    points = reduction()(RNG.normal(size=(9, F)).astype(np.float32))
    O = 3 * A + 2 * len(COMPOSED) + 1  # noqa: E741
    outcomes = np.random.default_rng(2).uniform(0.2, 1.0, size=(9, O)).astype(np.float32)
    return NeighboursChooser(ARMS, reduction(), points, outcomes, 4, COMPOSED)


def prices() -> CostTable:
    rows = [Measurement("target", "prefill", 10, 0, 1, 2.0)]
    rows += [Measurement("target", "forward", t, 0, 1, 1.0 + 0.1 * t) for t in (1, 5)]
    rows += [Measurement("engine", "round", 0, 0, 1, 0.1)]
    rows += [Measurement("code", "start", 10, 0, 1, 0.5)]
    rows += [Measurement("code", "propose", t, 0, 1, 0.1 * t) for t in (0, 4)]
    return CostTable({}, rows)


def all_kinds() -> list[Chooser]:
    return [
        acceptance(),
        neighbours(),
        NetworkChooser(ARMS, [network(1), network(2)]),
        LinearChooser(ARMS, reduction(), arrays((Z + 2, A))[0]),
        FirstLineChooser(ARMS, {(0, 0): 1, (1, 1): 2}, 0, 2),
        FixedChooser(ARMS, {1: "code", 16: "none"}),
        RandomChooser(ARMS),
    ]


def test_every_kind_is_known_by_its_name() -> None:
    assert set(CHOOSERS) == {chooser.kind for chooser in all_kinds()}


@pytest.mark.parametrize("chooser", all_kinds(), ids=lambda chooser: chooser.kind)
def test_what_was_learned_survives_arrays_and_json(chooser: Chooser) -> None:
    import json

    facts = json.loads(json.dumps(chooser.facts()))
    again = CHOOSERS[chooser.kind].restore(ARMS, chooser.arrays(), facts)
    for one in (chooser, again):
        if one.portable:
            one.pricer = ArmPricer(prices(), ARMS)

    for rows in (1, 16):
        told = situation(rows=rows)
        preferences = chooser.preferences(FEATURES, told)
        assert preferences.shape == (7, A)
        assert np.array_equal(again.preferences(FEATURES, told), preferences)
        distribution = chooser.distribution(preferences)
        assert distribution.sum(axis=1) == pytest.approx(np.ones(7))
        assert chooser.scores(preferences).shape == (7, A)


@pytest.mark.parametrize("chooser", all_kinds(), ids=lambda chooser: chooser.kind)
def test_one_prompt_gets_what_it_gets_among_many(chooser: Chooser) -> None:
    if chooser.portable:
        chooser.pricer = ArmPricer(prices(), ARMS)
    together = chooser.preferences(FEATURES, situation())

    for i in range(7):
        told = Situation(np.array([20]), prompts=(situation().prompts[i],))
        alone = chooser.preferences(FEATURES[i : i + 1], told)[0]
        assert alone == pytest.approx(together[i], rel=1e-4, abs=1e-5)


def logits_one_by_one(net: PolicyNetwork, features: list[float]) -> list[float]:
    """Compute the logits by sums over inputs and hidden units, as a readable reference."""
    inputs = [
        max(-CLIP, min(CLIP, (x - float(m)) * float(s)))
        for x, m, s in zip(features, net.mean, net.scale, strict=True)
    ]
    hidden = [
        math.tanh(sum(x * float(w) for x, w in zip(inputs, net.w1[:, h], strict=True)) + net.b1[h])
        for h in range(len(net.b1))
    ]
    return [
        sum(x * float(w) for x, w in zip(hidden, net.w2[:, a], strict=True)) + net.b2[a]
        for a in range(len(net.b2))
    ]


def test_a_network_reads_features_and_the_logarithm_of_the_rows() -> None:
    net = network()
    chooser = NetworkChooser(ARMS, [net])
    for rows in (1, 8):
        scores = chooser.scores(chooser.preferences(FEATURES, situation(rows=rows)))
        for i, vector in enumerate(FEATURES):
            expected = logits_one_by_one(net, [*map(float, vector), math.log(rows)])
            assert scores[i] == pytest.approx(softmax(np.array(expected)), abs=1e-5)


def test_networks_are_averaged_in_the_logarithm() -> None:
    one, two = (NetworkChooser(ARMS, [network(seed)]) for seed in (1, 2))
    both = NetworkChooser.merged([one, two])

    each = [chooser.preferences(FEATURES, situation()) for chooser in (one, two)]
    assert both.preferences(FEATURES, situation()) == pytest.approx((each[0] + each[1]) / 2)


def test_outcomes_are_the_gates_mean_of_kinds() -> None:
    chooser = acceptance()
    for i, vector in enumerate(FEATURES):
        inputs = chooser.reduction(vector[None])[0]
        expected = np.zeros(3 * A + 3)
        for gate, bias, kinds in zip(chooser.gates, chooser.biases, chooser.kinds, strict=True):
            shares = softmax(inputs @ gate + bias)
            expected += sum(s * k for s, k in zip(shares, kinds, strict=True)) / 2
        found = chooser.outcomes(FEATURES)[i]
        assert found == pytest.approx(np.clip(expected, 0.1, 0.9), abs=1e-5)


def test_gates_of_several_choosers_are_averaged() -> None:
    one, two = acceptance(1), acceptance(2)
    both = AcceptanceChooser.merged([one, two])

    each = [chooser.outcomes(FEATURES) for chooser in (one, two)]
    assert both.outcomes(FEATURES) == pytest.approx((each[0] + each[1]) / 2, abs=1e-5)


def test_the_nearest_points_speak() -> None:
    chooser = neighbours()
    components = chooser.reduction(FEATURES)
    for i, near in enumerate(chooser.nearest(FEATURES)):
        distances = ((components[i] - chooser.points) ** 2).sum(axis=1)
        assert set(near) == set(np.argsort(distances)[:4])
    work = chooser.work(FEATURES, situation())
    near = chooser.outcomes[chooser.nearest(FEATURES)[0]]
    expected = np.average(near, axis=0, weights=np.exp(near[:, -1]))  # of all their tokens
    assert work.rounds_per_token[0] == pytest.approx(expected[:A])
    assert work.drafted_per_token[0] == pytest.approx(expected[A : 2 * A])
    assert work.empty_per_token[0] == pytest.approx(expected[2 * A : 3 * A])
    assert work.num_tokens[0] == pytest.approx(np.exp(near[:, -1].mean()))
    # a drafter's proposals are its drafting rounds, a cascade's are predicted
    assert work.calls_per_token[0, :2] == pytest.approx(
        np.maximum(expected[:2] - expected[2 * A : 2 * A + 2], 0), abs=1e-6
    )
    assert work.proposed_per_token[0, :2] == pytest.approx(expected[A : A + 2])
    assert work.calls_per_token[0, 2] == pytest.approx(expected[3 * A])
    assert work.proposed_per_token[0, 2] == pytest.approx(expected[3 * A + 1])


@pytest.mark.parametrize("make", [acceptance, neighbours])
def test_places_of_cascades_are_saved_and_checked(make: Callable[[], Chooser]) -> None:
    chooser = make()
    arrays, facts = chooser.arrays(), chooser.facts()

    again = CHOOSERS[chooser.kind].restore(ARMS, arrays, facts)

    assert again.composed.tolist() == [2]  # type: ignore[attr-defined]
    for wrong, words in (([3], "place is not among"), ([-1], "place is not among"), ([], "arrays")):
        changed = arrays | {"composed": np.array(wrong, dtype=np.int64)}
        with pytest.raises(ValueError, match=words):
            CHOOSERS[chooser.kind].restore(ARMS, changed, facts)


def test_preferences_of_a_portable_chooser_are_speeds_over_none() -> None:
    chooser = acceptance()
    chooser.pricer = ArmPricer(prices(), ARMS)
    told = situation(limits=np.full(7, 2))
    work = chooser.work(FEATURES, told)
    assert (work.num_tokens == 1.0).all()  # the limit, less the prefill's token

    seconds = chooser.seconds_per_token(FEATURES, told)
    for i in range(7):
        expected = chooser.pricer.seconds_per_token(
            ArmRates(*(rates[i] for rates in work[:5])), 20.5, 1, 0.0, 1.0, 20
        )
        assert seconds[i] == pytest.approx(expected)
    preferences = chooser.preferences(FEATURES, told)
    assert preferences == pytest.approx(seconds[:, :1] / seconds)
    assert (preferences[:, 0] == 1.0).all()
    assert np.array_equal(chooser.scores(preferences), preferences)


def test_a_portable_chooser_is_priced_with_the_drafters_in_flight() -> None:
    """A drafter that the other rows use becomes cheaper than one that they do not use."""
    chooser = acceptance()
    calls = [Measurement("code", "propose", t, 0, 4, 0.12 * t) for t in (0, 4)]
    chooser.pricer = ArmPricer(CostTable({}, [*prices().measurements, *calls]), ARMS)

    def seconds(**drafters: int) -> np.ndarray:
        told = situation(rows=4, objective="throughput", drafters_in_flight=drafters)
        return chooser.seconds_per_token(FEATURES, told)

    of_code = [i for i, arm in enumerate(ARMS) if arm.startswith("code")]
    assert (seconds(code=3)[:, of_code] < seconds(none=3)[:, of_code]).all()
    assert np.array_equal(seconds(code=3)[:, 0], seconds(none=3)[:, 0])


def test_without_prices_a_portable_chooser_says_what_to_do() -> None:
    with pytest.raises(ArtefactError, match="run `paceline profile`"):
        acceptance().preferences(FEATURES, situation())


def test_a_fixed_arm_is_that_of_the_nearest_load() -> None:
    chooser = FixedChooser(ARMS, {1: "code", 4: "code@2", 16: "none"})

    arms = [chooser.at(rows) for rows in (1, 2, 3, 5, 9, 64)]
    assert arms == ["code", "code", "code@2", "code@2", "none", "none"]


def test_the_first_tokens_decide_and_the_unheard_of_gets_the_rest() -> None:
    chooser = FirstLineChooser(ARMS, {(0, 0): 1, (1, 1): 2}, 0, 2)

    assert chooser.preferences(FEATURES, situation()).argmax(axis=1).tolist() == [
        1, 2, 0, 1, 2, 0, 1
    ]  # fmt: skip


def test_softmax_survives_large_logits() -> None:
    assert softmax(np.array([1e4, 0.0, -1e4])).tolist() == [1.0, 0.0, 0.0]


def test_arrays_that_do_not_fit_are_refused() -> None:
    for chooser in all_kinds():
        found = chooser.arrays()
        if found:
            cut = {name: array[..., :-1] for name, array in found.items()}
            with pytest.raises((ValueError, IndexError)):
                CHOOSERS[chooser.kind].restore(ARMS, cut, chooser.facts())
            name = next(iter(found))
            with pytest.raises((ValueError, KeyError)):
                rest = {k: v for k, v in found.items() if k != name}
                CHOOSERS[chooser.kind].restore(ARMS, rest, chooser.facts())
