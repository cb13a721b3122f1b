"""The judge of a round: places without a possible token, and the same verdicts on other devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.drafting.contract import Draft
from paceline.models.scores import Scores
from paceline.requests import RequestSettings
from paceline.verification.judge import _draw_at_every_place, _read_answer, judge

if TYPE_CHECKING:
    from paceline.contracts import Request

NAN, INF = float("nan"), float("inf")


@dataclass
class Row:
    request: Request
    tokens: list[int]

    @property
    def text(self) -> tuple[list[int], int]:
        return self.tokens, len(self.request.prompt_tokens)


def row_of(**settings: Any) -> Row:
    read = RequestSettings.read({"max_new_tokens": 50, **settings})
    return Row(read.request((1, 2), "0"), [1, 2])


JUDGED = [{}, {"temperature": 1.0, "seed": 3}, {"min_new_tokens": 1}]


@pytest.mark.parametrize("settings", JUDGED, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_logits_that_are_not_finite_count_only_on_the_accepted_path(
    settings: dict[str, Any], bad: float
) -> None:
    logits = torch.zeros(3, 6)
    logits[:, 4] = 50.0
    logits[2] = bad
    for tokens, fails in (([4, 4], True), ([4, 3], False), ([3, 4], False), ([-1, -1], False)):
        row = row_of(**settings)
        [verdict] = judge([row], [Draft(tokens)], Scores.of(logits))
        assert (verdict.error is not None) == fails
        assert fails or verdict.next_token == 4
        assert not fails or "the target's logits are not finite" in str(verdict.error)


@pytest.mark.parametrize("settings", JUDGED, ids=str)
def test_an_invalid_draft_id_does_not_match_a_place_without_a_token(
    settings: dict[str, Any],
) -> None:
    logits = torch.full((3, 6), NAN)
    row = row_of(**settings)

    [verdict] = judge([row], [Draft([-1, -1])], Scores.of(logits))

    assert verdict.error is not None and verdict.path == []


@pytest.mark.parametrize("method", ["residual", "block"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_stochastic_draft_goes_beyond_a_place_without_a_token(method: str, place: int) -> None:
    logits = torch.zeros(4, 6)
    logits[:, 4] = 50.0
    logits[place] = NAN
    probs = torch.zeros(3, 6)
    probs[:, 4] = 1.0
    row = row_of(temperature=1.0, sampling=method)

    [verdict] = judge([row], [Draft([4, 4, 4], probs=probs)], Scores.of(logits))

    assert verdict.error is not None and len(verdict.path) == place


def test_a_place_without_a_token_does_not_change_the_tokens_before_it() -> None:
    """Block verification reads one place ahead; the draft ends there."""
    logits = torch.zeros(3, 2)
    logits[1] = NAN
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    kept = 0
    for seed in range(200):
        row = row_of(temperature=1.0, sampling="block", seed=seed)
        [verdict] = judge([row], [Draft([0, 0], probs=probs)], Scores.of(logits))
        kept += len(verdict.path)
    assert 70 < kept < 130  # p/q is a half


def test_the_judge_gives_the_same_verdict_on_other_devices() -> None:
    """Run the code of other devices on the CPU: draw at every place, then follow the draft."""
    logits = torch.zeros(3, 6)
    logits[:, 4] = 50.0
    logits[1] = NAN
    for tokens in ([4, 4], [3, 4]):
        here, there = row_of(temperature=1.0, seed=3), row_of(temperature=1.0, seed=3)
        [verdict] = judge([here], [Draft(tokens)], Scores.of(logits))
        answer = _draw_at_every_place(
            logits, Draft(tokens), there.request.sampling, len(there.tokens)
        )
        other = _read_answer(answer.tolist(), Draft(tokens))
        assert verdict.path == other.path
        assert (verdict.next_token < 0) == (other.next_token < 0) == (verdict.error is not None)
