"""The budget of verified tokens: the best of all cuts, its leak rule, and what it learns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.contract import Draft
from paceline.engine.acceptance import Acceptance
from paceline.engine.budget import Budget
from paceline.verification import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass
class FixedSeconds:
    """Prices that depend on the number of drafted tokens alone."""

    seconds: Sequence[float]
    asked: list[tuple[int, int, int]] = field(default_factory=list)

    def up_to(self, rows: int, context: int, num_drafted: int) -> np.ndarray:
        self.asked.append((rows, context, num_drafted))
        return np.array(self.seconds)


def row(acceptance: float = 0.6, allowed: int = 8, arm: str = "math") -> Any:
    """A row whose drafter's tokens were right with this frequency."""
    return SimpleNamespace(
        arm=arm,
        is_asked=arm != "none",
        num_read=100,
        draft_limit=allowed,
        num_draft_tokens=allowed,
        in_use=SimpleNamespace(acceptance=Acceptance(1000.0 * acceptance, 1000.0)),
    )


def budget(seconds: Sequence[float]) -> Budget:
    prices: Any = FixedSeconds(seconds)
    return Budget(prices)


def lengths(drafts: Sequence[Draft]) -> list[int]:
    return [len(draft.tokens) for draft in drafts]


# --- the best of all cuts -------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> Draft:
    """A chain or tree with chances that never rise towards the leaves."""
    length = draw(st.integers(0, 4))
    is_chain = draw(st.booleans())
    parents = [k - 1 if is_chain else draw(st.integers(-1, k - 1)) for k in range(length)]
    chances: list[float] = []
    for parent in parents:
        above = chances[parent] if parent >= 0 else 1.0
        chances.append(above * draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])))
    return Draft(list(range(length)), None if is_chain else parents, None, chances)


def all_cuts(draft: Draft) -> Iterator[tuple[int, ...]]:
    """Yield every set of tokens that holds the parents of its tokens."""
    length = len(draft.tokens)
    parents = range(-1, length - 1) if draft.parents is None else draft.parents
    for kept in itertools.product([False, True], repeat=length):
        if all(parents[k] < 0 or kept[parents[k]] for k in range(length) if kept[k]):
            yield tuple(k for k in range(length) if kept[k])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(trees(), min_size=2, max_size=3),
    st.lists(st.sampled_from([0.0, 0.05, 0.2, 0.9]), min_size=12, max_size=12),
)
def test_no_cut_of_all_drafts_is_faster(drafts: list[Draft], steps: list[float]) -> None:
    """For any prices that do not fall with the number of tokens, convex or not."""
    seconds = np.cumsum([1.0, *steps])
    rows = [row() for _ in drafts]

    cut = budget(seconds).cut(rows, drafts)

    def rate(chances: float, num: int) -> float:
        return float((len(rows) + chances) / seconds[num])

    def chance(draft: Draft, k: int) -> float:
        assert draft.chances is not None
        return draft.chances[k]

    kept = sum(chance(d, k) for d, c in zip(drafts, cut, strict=True) for k in c.tokens)
    best = max(
        rate(
            sum(chance(d, k) for d, c in zip(drafts, cuts, strict=True) for k in c),
            sum(map(len, cuts)),
        )
        for cuts in itertools.product(*(all_cuts(d) for d in drafts))
    )
    assert rate(kept, sum(lengths(cut))) == pytest.approx(best, rel=1e-12)
    for before, after in zip(drafts, cut, strict=True):
        assert tuple(after.tokens) in set(all_cuts(before))
        if before.parents is not None and after.tokens:
            assert after.parents is not None
            parents = [after.tokens[p] if p >= 0 else -1 for p in after.parents]
            assert parents == [before.parents[k] for k in after.tokens]


def test_the_likelier_row_keeps_more() -> None:
    rows = [row(0.9), row(0.3)]
    drafts = [Draft([1, 2, 3, 4]), Draft([5, 6, 7, 8])]

    cut = budget([1.0 + 0.25 * n for n in range(9)]).cut(rows, drafts)

    assert lengths(cut) == [4, 0]
    assert [r.num_draft_tokens for r in rows] == [8, 0], "the controller must see the cut"
    assert cut[0] is drafts[0]


def test_seconds_of_drafting_make_longer_drafts_worth_their_price() -> None:
    """They are spent already, so a round that emits little wastes them."""
    drafts = [Draft([1] * 4), Draft([2] * 4)]
    seconds = [1.0 + 0.3 * n for n in range(9)]
    rows = [row(0.7), row(0.7)]
    plain, charged = budget(seconds), budget(seconds)
    nothing = [Draft([]), Draft([])]
    charged.learn(rows, nothing, nothing, [Verdict([], 1), Verdict([], 1)], drafting=20.0)

    assert sum(lengths(plain.cut(rows, drafts))) < sum(lengths(charged.cut(rows, drafts)))


def test_one_row_and_rows_without_a_draft_ask_for_no_price() -> None:
    prices: Any = FixedSeconds([])
    alone = [Draft([1, 2, 3])]
    empty = [Draft([]), Draft([])]

    assert Budget(prices).cut([row(0.01)], alone) is alone
    assert Budget(prices).cut([row(), row()], empty) is empty
    assert prices.asked == []


def test_prices_are_asked_at_the_rows_mean_context() -> None:
    prices: Any = FixedSeconds([1.0] * 4)
    rows = [row(), row(), row(arm="none")]
    rows[1].num_read = 400

    Budget(prices).cut(rows, [Draft([1, 2]), Draft([3]), Draft([])])

    assert prices.asked == [(3, 200, 3)]


# --- the length of the next draft -----------------------------------------------------------------


def after_a_cut(drafts: list[Draft], acceptance: float = 0.7) -> tuple[Budget, list[Any]]:
    """Return a budget that has kept tokens likelier than 0.4 or so, and its rows."""
    cutting = budget([1.0 + 0.25 * n for n in range(30)])
    rows = [row(acceptance) for _ in drafts]
    for r in rows:
        r.in_use.acceptance.has_learned = True
    cutting.cut(rows, drafts)
    return cutting, rows


def test_the_next_draft_has_one_token_more_than_would_be_kept() -> None:
    cutting, rows = after_a_cut([Draft([1] * 8), Draft([2] * 8)])
    kept = rows[0].num_draft_tokens
    assert 0 < kept < 7

    assert cutting.limit(rows[0], 8) == kept + 1
    assert cutting.limit(rows[0], 1) == 1
    assert cutting.limit(learned(0.05), 8) == 1, "one token, by which its acceptance is learned"
    assert kept + 1 < cutting.limit(learned(0.9), 8) <= 8


def learned(acceptance: float) -> Any:
    found = row(acceptance)
    found.in_use.acceptance.has_learned = True
    return found


def test_a_row_without_a_learned_acceptance_drafts_at_full_length() -> None:
    """Its first draft, and a drafter with estimates of its own."""
    cutting, _ = after_a_cut([Draft([1] * 8), Draft([2] * 8)])

    assert cutting.limit(row(0.3), 8) == 8


def test_after_a_round_without_a_cut_drafts_have_full_length() -> None:
    cutting, rows = after_a_cut([Draft([1] * 8), Draft([2] * 8)])
    assert cutting.limit(rows[0], 8) < 8

    cutting.cut([row(0.99), row(0.99)], [Draft([1]), Draft([])])

    assert cutting.limit(rows[0], 8) == 8


# --- drawn tokens ---------------------------------------------------------------------------------


def drawn(tokens: list[int], chances: list[float] | None = None) -> Draft:
    return Draft(tokens, None, torch.rand(len(tokens), 5), chances)


def test_what_was_drawn_moves_no_cut() -> None:
    """Neither the tokens, nor their number where a drafter stopped, nor its estimates."""
    prices = [1.0 + 0.2 * n for n in range(30)]
    rows = [row(0.7, allowed=4), row(0.5, allowed=4)]
    other = Draft([1, 2, 3, 4])

    whole = lengths(budget(prices).cut(rows, [drawn([1, 2, 3, 4]), other]))

    assert 0 < whole[0] < 4
    for own in (
        drawn([4, 4, 4, 4]),
        drawn([1, 2, 3, 4], chances=[1.0, 1.0, 1.0, 1.0]),
        drawn([1, 2, 3, 4], chances=[0.0, 0.0, 0.0, 0.0]),
        drawn([1, 2]),
        drawn([3]),
    ):
        for r in rows:
            r.num_draft_tokens = 4
        found = budget(prices).cut(rows, [own, other])
        assert lengths(found) == [min(whole[0], len(own.tokens)), whole[1]]


def test_probabilities_are_cut_with_their_tokens() -> None:
    draft = drawn([1, 2, 3, 4])
    assert draft.probs is not None

    [cut, _] = budget([1.0 + 0.3 * n for n in range(30)]).cut(
        [row(0.7, allowed=4), row()], [draft, Draft([])]
    )

    assert cut.probs is not None and 0 < len(cut.tokens) < 4
    assert torch.equal(cut.probs, draft.probs[: len(cut.tokens)])


# --- acceptance -----------------------------------------------------------------------------------


def rate_after(draft: Draft, verified: Draft, verdict: Verdict, rounds: int = 200) -> float:
    acceptance = Acceptance()
    for _ in range(rounds):
        acceptance.learn(draft, verified, verdict)
    return acceptance.right / acceptance.tried


def test_acceptance_is_that_of_the_tokens_that_were_tried() -> None:
    chain = Draft([1, 2, 3])
    tree = Draft([1, 2, 3], [-1, 0, 0])

    assert Acceptance().chances(None, 2) == pytest.approx([0.6, 0.36], abs=0.02)
    assert rate_after(chain, chain, Verdict([0, 1, 2], 9)) > 0.98
    assert rate_after(chain, chain, Verdict([0], 9)) == pytest.approx(0.5, abs=0.02)
    assert rate_after(chain, chain, Verdict([], 9)) < 0.1
    assert rate_after(tree, tree, Verdict([0], 9)) == pytest.approx(0.5, abs=0.02)
    assert rate_after(tree, tree, Verdict([0, 2], 9)) > 0.97, "a leaf is the draft's end"


def test_the_targets_token_tries_the_first_token_that_was_cut() -> None:
    chain, first, nothing = Draft([1, 2, 3]), Draft([1]), Draft([])

    assert rate_after(chain, first, Verdict([0], 2)) > 0.98
    assert rate_after(chain, first, Verdict([0], 9)) == pytest.approx(0.5, abs=0.02)
    assert rate_after(chain, nothing, Verdict([], 1)) > 0.96
    assert rate_after(chain, nothing, Verdict([], 9)) < 0.1


def test_a_drawn_token_is_tried_by_the_judge_alone() -> None:
    """The target rarely draws the token that the drafter drew, even where it would be accepted."""
    draft, first = drawn([1, 2, 3]), drawn([1])

    assert rate_after(draft, first, Verdict([0], 9)) > 0.96
    assert rate_after(draft, Draft([]), Verdict([], 9)) == pytest.approx(0.6)


def test_a_drafter_that_is_no_longer_tried_is_forgiven() -> None:
    acceptance = Acceptance(right=1.0, tried=100.0)

    for _ in range(400):
        acceptance.learn(drawn([1]), Draft([]), Verdict([], 9))

    assert acceptance.right / acceptance.tried == pytest.approx(0.6, abs=0.02)


def test_siblings_share_their_parents_chance() -> None:
    chances = Acceptance(500.0, 1000.0).chances([-1, -1, 0, 0, 2], 5)

    assert chances == pytest.approx([0.5, 0.25, 0.25, 0.125, 0.125])


def test_a_row_that_failed_teaches_nothing() -> None:
    rows = [row(), row()]
    drafts = [Draft([1]), Draft([2])]

    budget([]).learn(rows, drafts, drafts, [Verdict([], -1, "no token"), Verdict([0], 1)], 0.1)

    assert rows[0].in_use.acceptance == Acceptance(600.0, 1000.0)
    assert rows[1].in_use.acceptance != Acceptance(600.0, 1000.0)


def test_the_drafters_own_chances_stay_its_own() -> None:
    """An estimate in the draft is better than the row's mean, and needs no learning."""
    rows = [row(), row()]
    drafts = [Draft([1], None, None, [0.9]), Draft([2], None, None, [0.9])]

    budget([]).learn(rows, drafts, drafts, [Verdict([], 1), Verdict([], 1)], 0.1)

    assert rows[0].in_use.acceptance == Acceptance(600.0, 1000.0)
