"""The parts of the comparison: its plan, intervals, results and gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from paceline.distillation.batches import Example
from paceline.distillation.comparison import MEAN, compare
from paceline.distillation.measures import AnswerMatches
from paceline.errors import ConfigError
from paceline.experiments.direct_alignment import training
from paceline.experiments.direct_alignment.gradients import measure_noise
from paceline.experiments.direct_alignment.intervals import rises
from paceline.experiments.direct_alignment.plan import (
    BUDGETS,
    SMOKE,
    Plan,
    Run,
    Tuned,
    balance,
)
from paceline.experiments.direct_alignment.results import Results, pack, read_lines, unpack
from paceline.experiments.prompt_files import TASKS
from paceline.models.language_model import LanguageModel
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import NUM_TOKENS

if TYPE_CHECKING:
    from pathlib import Path

LENGTH = 3


# --- plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [*BUDGETS.values(), SMOKE], ids=lambda b: b.name)
def test_a_run_of_several_parts_is_planned_once(budget: object) -> None:
    plan = Plan(budget)  # type: ignore[arg-type]
    own = plan.budget
    tuned = Tuned(dict.fromkeys(own.losses, own.rates[0]), "kl")
    data = plan.of_data(tuned)
    assert len(set(data)) == len(data)
    # the generalist and the run on all answers are runs of the losses
    assert plan.with_answers(tuned, own.answers[-1], 0) in plan.of_losses(tuned)
    # so is the sweep's run at the chosen rate
    assert set(plan.of_losses(tuned)) & set(plan.sweep())
    every = {*plan.sweep(), *plan.of_losses(tuned), *data}
    assert len({run.id for run in every}) == len(every)
    # all trainings on answers read the same number of tokens
    assert {run.tokens for run in every if run.phase == "align"} == {own.tokens}


def test_the_full_budget_compares_the_stated_numbers_of_answers() -> None:
    assert BUDGETS["full"].answers == (1_000, 2_000, 5_000, 10_000, 20_000)
    for budget in BUDGETS.values():
        assert len(budget.losses) == 8 and len(budget.rates) == 3 and budget.seeds == 3
        assert budget.sampled in budget.answers


def test_numbers_per_task_are_as_equal_as_there_are_prompts() -> None:
    assert balance({"a": 9, "b": 2, "c": 9}, 12) == {"a": 5, "b": 2, "c": 5}
    assert balance({"a": 1, "b": 2}, 12) == {"a": 1, "b": 2}
    assert balance({"a": 9, "b": 9, "c": 9}, 7) == {"a": 2, "b": 2, "c": 3}
    small = balance({"a": 9, "b": 2, "c": 9}, 6)
    large = balance({"a": 9, "b": 2, "c": 9}, 9)
    assert all(small[task] <= large[task] for task in small)


def test_a_task_left_out_is_in_no_training_of_its_run() -> None:
    plan = Plan(SMOKE)
    tuned = Tuned(dict.fromkeys(SMOKE.losses, 1e-3), "kl")
    for task in TASKS:
        run = plan.without_task(tuned, "kl", task, 0)
        assert task not in run.tasks and len(run.tasks) == 3
        assert plan.specialist(tuned, task, 0).tasks == (task,)


def test_an_alignment_begins_with_the_pretrained_student_of_its_seed(tmp_path: Path) -> None:
    context: Any = SimpleNamespace(student=lambda name: tmp_path / name)
    (tmp_path / "pretrained-2").mkdir()
    plan = Plan(SMOKE)
    assert training._start(plan.pretrained(2), context) == tmp_path / "new-2"
    assert training._start(plan.of_loss("kl", 1e-3, 2), context) == tmp_path / "pretrained-2"
    with pytest.raises(ConfigError, match="pre-trained student is missing"):
        training._start(plan.of_loss("kl", 1e-3, 1), context)
    assert {run.seed for run in plan.pretrainings()} == set(range(SMOKE.seeds))


# --- intervals ------------------------------------------------------------------------------------


def drafter(rate: float, seed: int, num: int = 60, noise: int = 0) -> AnswerMatches:
    """Return random matches of two tasks; answers are of different difficulty, the same for all."""
    difficulty = np.random.default_rng(5).normal(0, 0.15, 2 * num)
    lengths = np.random.default_rng(6).integers(5, 40, 2 * num)
    random = np.random.default_rng([seed, noise])
    shares = np.clip(rate + difficulty, 0.02, 0.98)
    matches = [random.random(n) < share for n, share in zip(lengths, shares, strict=True)]
    overlaps = [
        np.clip(random.normal(s, 0.1, n), 0, 1) for n, s in zip(lengths, shares, strict=True)
    ]
    return AnswerMatches.of(matches, ["a"] * num + ["b"] * num, overlaps)


def test_one_seed_has_the_interval_of_the_paired_bootstrap() -> None:
    before, after = drafter(0.5, 1), drafter(0.6, 2)
    expected, found = compare(before, after, LENGTH), rises([before], [after], LENGTH)
    for task in ("a", "b", MEAN):
        for name in ("match_rate", "acceptance", "block_efficiency"):
            wanted, own = getattr(expected[task], name), getattr(found[task], name)
            assert own.value == pytest.approx(wanted.value)
            width = wanted.high - wanted.low
            assert own.low == pytest.approx(wanted.low, abs=0.08 * width)
            assert own.high == pytest.approx(wanted.high, abs=0.08 * width)


def test_the_difficulty_of_answers_cancels() -> None:
    """Without pairing, the interval of equal drafters would be as wide as that of one drafter."""
    same = rises([drafter(0.5, 1)], [drafter(0.5, 1)], LENGTH)[MEAN].match_rate
    assert same.low == same.high == 0
    other = drafter(0.5, 2)
    order = np.r_[np.random.default_rng(0).permutation(60), 60 + np.arange(60)]
    parts = [slice(other.starts[i], other.starts[i + 1]) for i in order]
    assert other.overlap is not None
    # the same matches, cut at the lengths of other answers: pairs are lost
    shuffled = replace(
        other,
        match=np.concatenate([other.match[p] for p in parts]),
        overlap=np.concatenate([other.overlap[p] for p in parts]),
    )
    far = rises([drafter(0.5, 1)], [shuffled], LENGTH)["a"].match_rate
    near = rises([drafter(0.5, 1)], [drafter(0.5, 2)], LENGTH)["a"].match_rate
    assert far.high - far.low > 1.1 * (near.high - near.low)


def test_seeds_that_disagree_widen_the_interval() -> None:
    """Answers alone would call the luck of a seed a gain."""
    rates = (0.42, 0.50, 0.64)
    before = [drafter(0.5, 10 + seed) for seed in range(3)]
    steady = [drafter(0.52, 20 + seed) for seed in range(3)]
    shaky = [drafter(rate, 20 + seed) for seed, rate in enumerate(rates)]
    narrow = rises(before, steady, LENGTH)[MEAN].match_rate
    wide = rises(before, shaky, LENGTH)[MEAN].match_rate
    assert wide.low < 0 < wide.high
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_the_interval_covers_the_truth_at_its_rate() -> None:
    """Of 200 comparisons of equal drafters, about 10 may call a difference."""
    outside = 0
    for i in range(200):
        before = [drafter(0.5, 3 * i + seed, 30) for seed in range(3)]
        after = [drafter(0.5, 3 * i + seed, 30, noise=1) for seed in range(3)]
        own = rises(before, after, LENGTH)[MEAN].block_efficiency
        outside += own.low > 0 or own.high < 0
    assert outside <= 18


def test_drafters_on_other_answers_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="on the same answers"):
        rises([drafter(0.5, 1)], [drafter(0.5, 1, num=50)], LENGTH)
    with pytest.raises(ConfigError, match="as many seeds"):
        rises([drafter(0.5, 1)], [drafter(0.5, 1), drafter(0.5, 2)], LENGTH)


# --- results --------------------------------------------------------------------------------------


def a_run(**changes: object) -> Run:
    plain = {"loss": "kl", "learning_rate": 1e-3, "seed": 0, "num_answers": 8, "tokens": 100}
    return Run.model_validate({**plain, **changes})


def test_matches_survive_packing() -> None:
    random = np.random.default_rng(0)
    matches = [random.random(n) < 0.5 for n in (3, 8, 13)]
    assert np.array_equal(unpack(pack(matches), 24), np.concatenate(matches))


def test_a_line_is_of_one_run_and_one_set_of_materials(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path, "first")
    results.add("run", {"run": a_run().model_dump(mode="json"), "validation": 1.5})
    assert Results(path, "first").of(a_run())["validation"] == 1.5
    for other in (a_run(seed=1), a_run(tokens=101), a_run(tasks=("math",)), a_run(answers="both")):
        assert results.find(other) is None
    assert Results(path, "second").find(a_run()) is None
    Results(path, "second").add("run", {"run": a_run().model_dump(mode="json"), "validation": 2.0})
    assert [line["materials"] for line in read_lines(path)] == ["first", "second"]
    assert Results(path, "first").of(a_run())["validation"] == 1.5


# --- gradients ------------------------------------------------------------------------------------


def test_more_samples_have_less_noise_and_standardised_rewards_the_least() -> None:
    torch.manual_seed(0)
    target = tiny_model(std=0.3, context=64)
    student = perturbed(target, 0.2)
    random = np.random.default_rng(0)
    texts = [
        Example(f"{i}", "ab"[i % 2], random.integers(0, NUM_TOKENS, 40), num_prompt=5)
        for i in range(4)
    ]
    found = measure_noise(LanguageModel(target, "target"), student, texts, draws=24)
    first, middle, last = found["rows"]
    assert found["positions"] == 4 * 35
    for name in ("tvd", "tvd++"):
        assert first[name]["noise"] == pytest.approx(16 * last[name]["noise"], rel=0.25)
        assert first[name]["cosine"] < middle[name]["cosine"] < last[name]["cosine"]
    # the reward's mean is noise that standardising removes: E[r^2] against Var[r]
    for row in found["rows"]:
        assert row["tvd++"]["noise"] < 0.9 * row["tvd"]["noise"]
