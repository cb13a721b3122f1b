"""Hedge in a request: counts by depth, prices from counts, changes of arm; a readable reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.contracts import NONE, DraftOutcome
from paceline.selection import Arm, Hedge
from paceline.selection.adaptation import MARGIN, MEMORY, PRIOR_ROUNDS, ArmTable

LENGTHS = {"a": 4, "b": 12, "c": 3}
STEPS = {"a": 0.1, "b": 0.01, "c": 0.3, NONE: 0.0}  # seconds of a drafted token
ARMS = ArmTable(
    [
        Arm(NONE, NONE, 0),
        *(Arm(f"{d}@{k}", d, k) for d, full in LENGTHS.items() for k in sorted({1, 2, full})),
    ]
)


class Prices:
    """Seconds per drafted token are 0.1 for `a`, 0.01 for `b` and 0.3 for `c`; rows multiply them."""

    bucket = 64

    def rounds(self, drafter: str, context: int, rows: int) -> np.ndarray:
        drafted = np.arange(LENGTHS.get(drafter, 0) + 1)
        return (1.0 + context // 64) * (1.0 + STEPS[drafter] * rows * drafted**0.9)

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        return STEPS[drafter] * drafted

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        return 0.01 * num_tokens


@dataclass
class Reference:
    """The same losses in readable form: every judged depth of every draft, with its weight."""

    prior: dict[str, float]
    depths: dict[tuple[str, int], list[list[float]]] = field(default_factory=dict)
    drafts: dict[str, list[list[float]]] = field(default_factory=dict)  # [weight, drafted, allowed]

    def add(self, one: DraftOutcome) -> None:
        if one.known == 0:
            for draft in self.drafts.get(one.drafter, []):
                draft[0] *= MEMORY
            for (drafter, _), trials in self.depths.items():
                for trial in trials if drafter == one.drafter else []:
                    trial[0] *= MEMORY
            self.drafts.setdefault(one.drafter, []).append([1.0, one.drafted, one.allowed])
        for depth in range(one.known, one.accepted + one.ended):
            right = float(depth < one.accepted)
            self.depths.setdefault((one.drafter, depth), []).append([1.0, right])

    def survival(self, drafter: str, k: int) -> list[float]:
        """Return the chance that a draft is right up to each depth: a product of conditional shares."""
        chances, product = [], 1.0
        for depth in range(k):
            trials = self.depths.get((drafter, depth), [])
            if not trials:
                trials = [t for d in range(depth) for t in self.depths.get((drafter, d), [])]
            weight = sum(t[0] for t in trials)
            product *= sum(t[0] * t[1] for t in trials) / weight if weight else 1.0
            chances.append(product)
        return chances

    def lengths(self, drafter: str, k: int) -> list[float]:
        """Return for each depth the share of drafts that reach it, of those that were allowed to."""
        shares = []
        for depth in range(k):
            depths = [depth]
            if not any(d[2] > depth for d in self.drafts[drafter]):
                depths = list(range(depth))
            pairs = [(d, at) for at in depths for d in self.drafts[drafter] if d[2] > at]
            weight = sum(d[0] for d, _ in pairs)
            shares.append(sum(d[0] * (d[1] > at) for d, at in pairs) / weight)
        return shares

    def loss(self, arm: Arm, begun_at: tuple[int, int], context: int, rows: int) -> float:
        if arm.num_draft_tokens == 0:
            return 1.0
        k, prices = arm.num_draft_tokens, Prices()
        at_begin = prices.rounds(arm.drafter, *begun_at)[k] / prices.rounds(NONE, *begun_at)[0]
        curve = prices.rounds(arm.drafter, context, rows) / prices.rounds(NONE, context, rows)[0]
        prior = PRIOR_ROUNDS * MEMORY ** len(self.drafts.get(arm.drafter, []))
        spent = prior * curve[k]
        emitted = prior * at_begin / self.prior[arm.name]
        n = sum(d[0] for d in self.drafts.get(arm.drafter, []))
        if n:
            shares = self.lengths(arm.drafter, k)
            drafting = sum(s * (curve[j + 1] - curve[j]) for j, s in enumerate(shares))
            spent += n * (curve[0] + drafting)
            emitted += n * (1.0 + sum(self.survival(arm.drafter, k)))
        return float(spent / emitted)


def hedge_of(prior: dict[str, float], context: int = 100, rows: int = 1) -> Hedge:
    values = np.array([prior[arm.name] for arm in ARMS.arms])
    return Hedge(ARMS, values, Prices(), context, rows)


def flat(value: float = 1.0) -> dict[str, float]:
    return {arm.name: 1.0 if arm.name == NONE else value for arm in ARMS.arms}


@st.composite
def rounds(draw: st.DrawFn) -> list[list[DraftOutcome]]:
    """Draw the outcomes of some rounds; those of `b` become known in pieces, as the text grows."""
    found: list[list[DraftOutcome]] = []
    open_draft: tuple[int, int, int] | None = None  # drafted, right in the end, known so far
    for _ in range(draw(st.integers(1, 12))):
        outcomes = []
        for drafter in draw(st.lists(st.sampled_from(["a", "c"]), unique=True)):
            allowed = draw(st.integers(1, LENGTHS[drafter]))
            drafted = draw(st.integers(0, allowed))
            accepted = draw(st.integers(0, drafted))
            outcomes.append(DraftOutcome.of(drafter, drafted, allowed, accepted, accepted + 1))
        if open_draft is None:
            drafted = draw(st.integers(0, 12))
            open_draft = (drafted, draw(st.integers(0, drafted)), 0)
            known, visible = 0, draw(st.integers(1, 5))
        else:
            known = open_draft[2]
            visible = known + draw(st.integers(1, 5))
        drafted, truth, _ = open_draft
        one = DraftOutcome.of("b", drafted, 12, min(truth, visible), visible, known)
        outcomes.append(one)
        # a piece without a right token would count as the first piece again
        open_draft = None if one.is_final or one.accepted == 0 else (drafted, truth, one.accepted)
        found.append(outcomes)
    return found


@settings(deadline=None, max_examples=60, derandomize=True)
@given(rounds(), st.integers(0, 200), st.integers(1, 4), st.floats(0.3, 1.5))
def test_losses_equal_the_readable_reference(
    seen: list[list[DraftOutcome]], context: int, rows: int, value: float
) -> None:
    hedge, reference = hedge_of(flat(value)), Reference(flat(value))
    for outcomes in seen:
        hedge.observe(outcomes, 2)
        for one in outcomes:
            reference.add(one)

    losses = hedge.losses(context, rows)

    expected = [reference.loss(arm, (100, 1), context, rows) for arm in ARMS.arms]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


def test_before_any_text_the_losses_are_the_prior() -> None:
    prior = flat() | {"a@4": 0.5, "b@12": 0.7, "c@3": 1.4}
    losses = hedge_of(prior).losses(100, 1)

    np.testing.assert_allclose(losses, [prior[arm.name] for arm in ARMS.arms])


def test_one_draft_prices_every_length_of_its_drafter() -> None:
    """1 of 4 tokens accepted: length 1 was all right, longer drafts only cost more."""
    hedge = hedge_of(flat())
    for _ in range(200):
        hedge.observe([DraftOutcome.of("a", 4, 4, 1, 2)], 2)
    losses = dict(zip([arm.name for arm in ARMS.arms], hedge.losses(100, 1), strict=True))

    curve = Prices().rounds("a", 100, 1) / 2.0
    for k in (1, 2, 4):
        assert losses[f"a@{k}"] == pytest.approx(curve[k] / 2, rel=0.01)
    assert losses["a@1"] < losses["a@2"] < losses["a@4"]


def test_a_shortened_draft_does_not_count_against_longer_ones() -> None:
    """1 of 1 is always right, so a longer draft is expected to continue as well."""
    cut, wrong = hedge_of(flat()), hedge_of(flat())
    for _ in range(50):
        cut.observe([DraftOutcome.of("a", 1, 1, 1, 2)], 2)
        wrong.observe([DraftOutcome.of("a", 2, 4, 1, 2)], 2)
    a4 = ARMS.index["a@4"]

    assert cut.losses(100, 1)[a4] < 0.5
    assert wrong.losses(100, 1)[a4] > 0.6


def test_a_partly_known_draft_counts_at_once() -> None:
    """The text has confirmed 3 of 12 drafted tokens so far."""
    hedge = hedge_of(flat())
    before = hedge.losses(100, 1)[ARMS.index["b@12"]]
    hedge.observe([DraftOutcome.of("b", 12, 12, 3, 3)], 3)
    sooner = hedge.losses(100, 1)[ARMS.index["b@12"]]
    hedge.observe([DraftOutcome.of("b", 12, 12, 4, 6, known=3)], 3)
    later = hedge.losses(100, 1)[ARMS.index["b@12"]]

    assert sooner < before
    assert sooner < later  # the fifth was wrong


def test_losses_follow_the_prices_of_more_rows() -> None:
    hedge = hedge_of(flat(0.6))
    for _ in range(20):
        hedge.observe([DraftOutcome.of("a", 4, 4, 2, 3)], 3)
    alone, crowded = hedge.losses(100, 1), hedge.losses(100, 16)

    assert alone[ARMS.index["a@4"]] < 1.0 < crowded[ARMS.index["a@4"]]


def test_an_arm_is_left_only_for_one_that_clearly_outweighs_it() -> None:
    hedge = hedge_of(flat())
    losses = np.ones(len(ARMS))
    losses[ARMS.index["a@4"]] = 0.5
    step = MARGIN / np.sqrt(8 * np.log(len(ARMS)) * PRIOR_ROUNDS)

    losses[ARMS.index["b@2"]] = 0.5 - 0.9 * step
    assert hedge.best("a@4", losses) == "a@4"
    losses[ARMS.index["b@2"]] = 0.5 - 1.1 * step
    assert hedge.best("a@4", losses) == "b@2"
    assert hedge.best("a@4", losses, excluded={"b@2"}) == "a@4"
    assert losses[ARMS.index["b@2"]] == 0.5 - 1.1 * step


def test_more_text_makes_smaller_differences_count() -> None:
    hedge = hedge_of(flat())
    losses = np.ones(len(ARMS))
    losses[ARMS.index["b@2"]] = 0.97
    assert hedge.best(NONE, losses) == NONE
    for _ in range(100):
        hedge.observe([], 2)
    assert hedge.best(NONE, losses) == "b@2"
