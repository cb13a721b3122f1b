"""Sections: training and test prompts are disjoint, and sentences state the findings."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from rich.console import Console

from paceline.config import LearningSection
from paceline.contracts import no_progress
from paceline.costs import CostTable, Measurement
from paceline.errors import ConfigError, StoreError
from paceline.learning.dataset import Dataset, build_dataset, split
from paceline.learning.evaluation import (
    POLICY,
    Contender,
    Evaluation,
    Evaluator,
    evaluate_chooser,
    parse_encoders,
    train_contenders,
)
from paceline.learning.evaluation.contenders import with_encoders
from paceline.learning.evaluation.plot import plot
from paceline.learning.evaluation.strategies import BEST_SINGLE, FIRST_LINE, ORACLE
from paceline.learning.evaluation.tables import show
from paceline.selection.choosers import FixedChooser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from paceline.store.records import CollectedPrompt

ARMS = ("none", "code", "lookup")
SETTINGS = LearningSection(held_out=0.3, max_epochs=60)
LINES = {"a": "Add these.", "b": "Bring that.", "c": "Call them."}


def table(code_at_8_rows: float = 0.5) -> CostTable:
    """Build prices: a round costs 1.5 s, and 0.5 s for a drafter; with 8 rows `code` may cost more."""
    figures = [("target", "prefill", 2.0), ("target", "forward", 1.0), ("engine", "round", 0.5)]
    for arm in ("code", "lookup"):
        figures += [(arm, "start", 0.25), (arm, "propose", 0.5)]
    cells = [
        Measurement(
            s, o, 1, 0, rows, code_at_8_rows if (s, o, rows) == ("code", "propose", 8) else t
        )
        for s, o, t in figures
        for rows in (1, 8)
    ]
    return CostTable({}, cells)


@pytest.fixture
def make(collected: Callable[..., CollectedPrompt]) -> Callable[..., Dataset]:
    """Build prompts whose first hidden feature of 4 tells whether `code` or `lookup` is better.

    Tasks are independent of that, and every task has its own first line.
    """

    def build(
        num: int = 90,
        tasks: str = "abc",
        seed: int = 0,
        first_id: int = 0,
        line_tells: bool = False,
        costs: CostTable | None = None,
    ) -> Dataset:
        rng = np.random.default_rng(seed)
        prompts = []
        for i in range(num):
            task = tasks[i % len(tasks)]
            codes = task == tasks[0] if line_tells else bool(rng.integers(0, 2))
            hidden = rng.normal(size=4) * 0.3
            hidden[0] += 2.0 if codes else -2.0
            accepted = {"code": 4 if codes else 0, "lookup": 0 if codes else 3}
            text = f"{LINES.get(task, task)}\nText {first_id + i}."
            prompts.append(
                collected(
                    f"p{first_id + i}",
                    accepted,
                    np.concatenate([hidden, rng.normal(size=6)]),
                    domain=task,
                    prompt_tokens=tuple(map(ord, text)),
                )
            )
        return build_dataset(prompts, ARMS, costs or table(), SETTINGS)[0]

    return build


def decode(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def trained(data: Dataset, *learners: str, encoders: str = "", seeds: int = 1) -> list[Contender]:
    seen = parse_encoders(encoders) if encoders else [None]
    return train_contenders(data, learners or ("knn",), seen, SETTINGS, seeds, no_progress)


def test_what_features_are_worth_shows(make: Callable[..., Dataset]) -> None:
    train, held_out = split(make(), SETTINGS.held_out)
    contenders = trained(train, encoders="target_hidden,text_stats;target_hidden;text_stats;none")

    (section,) = Evaluator(train, decode, 0).held_out(held_out, contenders, [1])

    speed = {n: f.speedup.value for n, f in section.report.overall.strategies.items()}
    both, hidden, stats, nothing = (f"knn ({n})" for n in (
        "target_hidden + text_stats", "target_hidden", "text_stats", "no features"
    ))  # fmt: skip
    assert section.report.policies == (both, hidden, stats, nothing)
    assert speed[hidden] > 0.98 * speed[ORACLE]
    assert speed[hidden] > speed[both] > speed[stats]  # the statistics are noise here
    assert speed[stats] < 0.8 * speed[ORACLE]
    distribution = contenders[3].distributions(held_out)[0]
    assert (
        distribution == distribution[0]
    ).all()  # nothing is known, so every prompt gets the same arm


def test_an_encoders_block_is_its_own(make: Callable[..., Dataset]) -> None:
    data = make(20)
    swapped = with_encoders(data, ("text_stats", "target_hidden"))
    assert np.array_equal(swapped.features[:, :6], data.features[:, 4:])
    assert np.array_equal(swapped.features[:, swapped.spans["target_hidden"]], data.features[:, :4])
    assert with_encoders(data, None) is data
    with pytest.raises(ConfigError, match="no features of the encoder 'text_stat'; did you mean"):
        with_encoders(data, ("text_stat",))
    assert parse_encoders("a,b; a ;none") == [("a", "b"), ("a",), ()]
    with pytest.raises(ConfigError, match="names encoders, or is none"):
        parse_encoders("a;;b")


def test_several_seeds_are_several_trainings(make: Callable[..., Dataset]) -> None:
    train, held_out = split(make(), SETTINGS.held_out)
    (contender,) = trained(train, "reinforce", seeds=3)
    assert len(contender.choosers) == 3
    weights = [chooser.arrays()["0.w1"] for chooser in contender.choosers]
    assert not np.array_equal(weights[0], weights[1])
    report = Evaluator(train, decode, 0).held_out(held_out, [contender], [1])[0].report
    assert len(report.by_seed["reinforce"]) == 3
    with pytest.raises(ConfigError, match="unknown learner 'reinforc'; did you mean 'reinforce'"):
        trained(train, "reinforc")


def test_one_chooser_alone_has_the_figures_it_has_among_others(
    make: Callable[..., Dataset],
) -> None:
    train, held_out = split(make(), SETTINGS.held_out)
    (contender,) = trained(train)
    alone = evaluate_chooser(train, held_out, contender.choosers[0])
    among = Evaluator(train, decode, 0).held_out(held_out, [contender], [1])[0].report
    same = among.overall.strategies["knn"].accuracy
    assert alone.overall.strategies[POLICY].accuracy == same
    assert FIRST_LINE not in alone.over[POLICY]


def test_a_prompt_trained_on_is_not_tested_on_in_other_words(make: Callable[..., Dataset]) -> None:
    train, _ = split(make(90), SETTINGS.held_out)
    other = make(120, seed=5)  # the same ids and 30 more, other texts
    evaluator = Evaluator(train, decode, 0)

    section = evaluator.elsewhere("other words", other, trained(train))

    expected = set(other.groups) - set(train.groups)
    assert section.report.overall.num_prompts == len(expected)
    assert section.report.notes == (
        f"{len(set(train.groups))} of 'other words' left out: they were trained on",
    )
    with pytest.raises(
        StoreError, match="'again': every prompt has the id of one that was trained"
    ):
        evaluator.elsewhere("again", train, trained(train))


def test_a_task_left_out_is_nowhere_in_training(make: Callable[..., Dataset]) -> None:
    data = make()
    seen: list[set[str]] = []

    def train(part: Dataset) -> list[Contender]:
        seen.append(set(part.domains))
        return trained(part)

    sections = Evaluator(split(data, 0.3)[0], decode, 0).left_out(data, train)

    assert [section.task for section in sections] == ["a", "b", "c"]
    assert seen == [{"b", "c"}, {"a", "c"}, {"a", "b"}]
    for section in sections:
        assert list(section.report.by_domain) == [section.task]
        assert section.report.overall.num_prompts == 30
        assert section.report.num_train == 60
        assert section.report.known_first_lines == 0.0
    one = make(30, tasks="a")
    with pytest.raises(StoreError, match="all prompts are of one task"):
        Evaluator(one, decode, 0).left_out(one, train)
    few = make(12, tasks="aaaab")
    with pytest.raises(StoreError, match="without the task 'a' 2 prompts are left, at least 8"):
        Evaluator(few, decode, 0).left_out(few, train)


def test_under_load_another_arm_is_the_better_one(make: Callable[..., Dataset]) -> None:
    """`code` is slow with 8 rows in flight: a portable policy sees its price and avoids it."""
    data = make(costs=table(code_at_8_rows=40.0))
    data = replace(data, objective="throughput")
    train, held_out = split(data, SETTINGS.held_out)

    alone, loaded = Evaluator(train, decode, 0).held_out(held_out, trained(train), [1, 8])

    assert (alone.title, loaded.title) == ("held-out prompts", "held-out prompts, 8 rows")
    assert alone.report.overall.chosen["knn"].drafters["code"] > 0.3
    assert loaded.report.overall.chosen["knn"].drafters["code"] == 0.0
    assert loaded.report.overall.strategies["knn"].of_oracle > 0.95
    # rewards are of the same load as the seconds: the mean saving is the share of all seconds
    for section in (alone, loaded):
        oracle = section.report.overall.strategies["oracle"]
        assert oracle.reward == pytest.approx(1.0 - 1.0 / oracle.speedup.value)


def test_a_policy_that_knows_the_first_line_only_is_told_so(make: Callable[..., Dataset]) -> None:
    """Where the line tells the best arm, a table of lines is as good as any policy."""
    fixed = Contender("code for all", (FixedChooser(ARMS, "code"),))
    for line_tells, expected in ((True, "ties with a table of first lines"), (False, "is ")):
        data = make(120, tasks="ab", line_tells=line_tells)
        train, held_out = split(data, SETTINGS.held_out)
        (policy,) = trained(train, encoders="target_hidden")
        (section,) = Evaluator(train, decode, 0).held_out(held_out, [policy], [1])
        assert section.report.known_first_lines == 1.0
        said = section.sentence(policy.name)
        assert f"held-out prompts: {policy.name} {expected}" in said
        assert (section.report.over[policy.name][FIRST_LINE].low > 1.02) is not line_tells
        assert "below 0.98" not in said
    # where the line tells it, one arm for all is slow on the task of the other
    data = make(120, tasks="ab", line_tells=True)
    train, held_out = split(data, SETTINGS.held_out)
    (section,) = Evaluator(train, decode, 0).held_out(held_out, [fixed], [1])
    assert section.report.over["code for all"][FIRST_LINE].high < 1.0
    said = section.sentence("code for all")
    assert "slowest on b" in said and "below 0.98" in said


def test_unseen_tasks_are_summed_up_in_a_sentence(make: Callable[..., Dataset]) -> None:
    """Without a task's prompts in training, the arm of the other task is the wrong one."""
    data = make(120, tasks="ab", line_tells=True)
    evaluator = Evaluator(data, decode, 0)
    one_arm = Evaluation(tuple(evaluator.left_out(data, lambda part: trained(part, "fixed"))))
    (said,) = one_arm.sentences()
    assert said.startswith("tasks never seen: fixed is too slow on a, b: a 0.")
    none = Contender("plain", (FixedChooser(ARMS, "none"),))
    safe = Evaluation(tuple(evaluator.left_out(data, lambda part: [none])))
    assert safe.sentences()[0].startswith("tasks never seen: plain is nowhere below 0.98: a 1.000")


def test_an_evaluation_is_shown_drawn_and_written(
    make: Callable[..., Dataset], tmp_path: Path
) -> None:
    data = make()
    train, held_out = split(data, SETTINGS.held_out)
    evaluator = Evaluator(train, decode, 0, ["mind this"])
    sections = evaluator.held_out(held_out, trained(train), [1, 8])
    sections += evaluator.left_out(data, trained)
    found = Evaluation(tuple(sections), {"cost table": "abc"})
    console = Console(file=io.StringIO(), width=200, record=True)

    show(console, found)
    text = console.export_text()

    for words in ("held-out prompts", "8 rows", "b, never seen", "best single", "cost table abc"):
        assert words in text
    assert text.count("note: mind this") == 1
    raw = json.loads(found.to_json())
    assert [section["title"] for section in raw["sections"]] == [s.title for s in sections]
    assert raw["sentences"] == found.sentences()
    plot(found, tmp_path / "made" / "e.png")
    assert (tmp_path / "made" / "e.png").read_bytes().startswith(b"\x89PNG")
    assert BEST_SINGLE in text
