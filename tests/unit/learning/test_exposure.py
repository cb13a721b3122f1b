"""Policies are judged on prompts that no drafter was trained on; others have their own column."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rich.console import Console

from paceline.config import LearningSection
from paceline.errors import StoreError
from paceline.learning.dataset import TRAINED, UNKNOWN, Dataset, build_dataset
from paceline.learning.evaluation import (
    Contender,
    Evaluator,
    evaluate_chooser,
    in_other_words,
    unseen_part,
)
from paceline.learning.evaluation.tables import show_report
from paceline.selection.choosers import FixedChooser

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.costs import CostTable
    from paceline.store.records import CollectedPrompt

ARMS = ("none", "code", "math")


@pytest.fixture
def make(
    collected: Callable[..., CollectedPrompt], cost_table: Callable[[Sequence[str]], CostTable]
) -> Callable[..., Dataset]:
    """Build prompts on which `code` gets three tokens per round where it was trained, else one."""

    def build(num: int, num_seen: int, records: Mapping[str, bool] | None = None) -> Dataset:
        prompts = []
        for i in range(num):
            seen = i < num_seen
            known = {"code": seen, "math": False} if records is None else records
            accepted = {"code": 3 if seen else 1, "math": 2 if i % 2 else 1}
            features = np.full(7, i / num)
            prompts.append(
                collected(f"p{i}", accepted, features, f"task {i % 2}", trained_on=known)
            )
        return build_dataset(prompts, ARMS, cost_table(ARMS[1:]), LearningSection())[0]

    return build


def judge(data: Dataset, arm: str = "code") -> Contender:
    return Contender(arm, (FixedChooser(ARMS, arm),))


def test_headline_figures_are_those_of_unseen_prompts(make: Callable[..., Dataset]) -> None:
    data = make(40, 15)
    code = FixedChooser(ARMS, "code")

    report = evaluate_chooser(data, data, code)
    alone = evaluate_chooser(data, data.rows(np.arange(15, 40)), code)

    assert report.overall.num_prompts == 25
    # the choice's own time is measured again, so figures without a policy are compared
    for name in ("best single", "per task", "oracle", "random"):
        assert report.overall.strategies[name] == alone.overall.strategies[name]
    assert report.overall.arms == alone.overall.arms
    assert report.by_domain.keys() == alone.by_domain.keys()
    assert sum(part.num_prompts for part in report.by_domain.values()) == 25
    assert (alone.seen, alone.exposure.seen) == (None, 0)
    assert report.seen is not None
    assert report.seen.num_prompts == 15
    seen, unseen = report.seen.arms["code"].speedup, report.overall.arms["code"].speedup
    assert seen.value > 1.2 * unseen.value
    of_seen = data.rows(np.arange(15)).seconds
    assert seen.value == pytest.approx(of_seen[:, 0].sum() / of_seen[:, 1].sum())
    assert report.headline()["oracle"] == alone.headline()["oracle"]
    assert (report.exposure.unseen, report.exposure.seen) == (25, 15)
    assert report.exposure.by_drafter == {"code": 15}
    assert report.exposure.seen_by_policies == 15  # the same prompts here
    assert alone.exposure.sentences() == [
        "15 of the prompts that policies learned from were in a drafter's training, where the drafter "
        "is faster than on new prompts"
    ]
    assert json.loads(report.to_json())["seen"]["num_prompts"] == 15
    assert report.by_seed["policy"][0] == pytest.approx(
        report.overall.strategies["policy"].speedup.value
    )


def test_too_few_unseen_prompts_are_refused(make: Callable[..., Dataset]) -> None:
    code = FixedChooser(ARMS, "code")
    refused = (
        r"of 20 prompts to judge on, 7 are new to all drafters \(code were trained on the others\)"
    )
    with pytest.raises(StoreError, match=refused + ", at least 8"):
        evaluate_chooser(make(20, 13), make(20, 13), code)
    with pytest.raises(StoreError, match="prompts that no drafter was trained on"):
        unseen_part(make(20, 20))
    assert len(unseen_part(make(20, 12))) == 8
    # without seen prompts a smaller part may be judged on
    few = make(20, 0).rows(np.arange(3))
    assert evaluate_chooser(few, few, code).overall.num_prompts == 3
    assert len(unseen_part(few)) == 3


def test_drafters_whose_training_is_unknown_are_named(make: Callable[..., Dataset]) -> None:
    data = make(20, 0, {"math": False})
    assert data.trained.tolist() == [[UNKNOWN, 0]] * 20
    report = evaluate_chooser(data, data, FixedChooser(ARMS, "code"))
    assert report.exposure.unknown == {"code": 20}
    assert report.overall.num_prompts == 20
    (said,) = report.exposure.sentences()
    assert said.endswith("so that all count as unseen: code")

    some = data.trained.copy()
    some[:5, 0] = 0
    some[5:8, 1] = TRAINED
    exposure = evaluate_chooser(
        data, replace(data, trained=some), FixedChooser(ARMS, "code")
    ).exposure
    assert exposure.sentences() == [
        "judged on 17 prompts that no drafter was trained on; on the other 3 some were (math on 3)",
        "it is not known which prompts these drafters were trained on, so that all count as unseen: "
        "code (15 of 20)",
    ]
    assert (
        evaluate_chooser(make(9, 0), make(9, 0), FixedChooser(ARMS, "code")).exposure.sentences()
        == []
    )


def test_a_prompt_trained_on_is_seen_in_any_wording(make: Callable[..., Dataset]) -> None:
    data, other = make(30, 12), make(40, 0)  # the same ids and ten more, in other words

    marked = in_other_words(data, other)

    assert [marked.groups[i] for i in np.flatnonzero(marked.seen)] == sorted(
        (f"p{i}" for i in range(12)), key=marked.groups.index
    )
    assert not other.seen.any()
    evaluator = Evaluator(data.rows(np.arange(0, 30, 5)), lambda tokens: "", 0)
    section = evaluator.elsewhere("words", marked, [judge(data)])
    # six were trained on by the policy, three of them by a drafter as well
    assert section.report.exposure.seen == 12 - 3
    assert section.report.overall.num_prompts == 40 - 6 - 9


@pytest.mark.parametrize("width", [80, 120])
def test_both_columns_are_shown_with_their_counts(make: Callable[..., Dataset], width: int) -> None:
    data = make(40, 15)
    report = evaluate_chooser(data, data, FixedChooser(ARMS, "code"))
    console = Console(file=io.StringIO(), width=width)

    show_report(console, report)

    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= width or "- judged on" in shown
    words = " ".join(shown.split())
    assert "25 unseen" in words
    assert "on 15 seen" in words
    assert "judged on 25 prompts that no drafter was trained on" in words
    seen = report.seen.arms["code"].speedup  # type: ignore[union-attr]
    assert f"{seen.value:.2f} ({seen.low:.2f}-{seen.high:.2f})" in shown
