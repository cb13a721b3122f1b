"""Gains on timings with known answers, and on the published ones if they are at hand."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

import paceline
from paceline.errors import ConfigError
from paceline.experiments.assistant_selection.timings import (
    COLUMNS,
    TaskRun,
    TaskTimings,
    gains,
    read_timings,
    repeated,
    whole_groups,
)

RUN, TARGET = "2025-01-01_00-00-00_abc", "org/big"
PUBLISHED = Path(os.environ.get("PACELINE_DATA", "")) / "published_timings.csv"

# milliseconds a token, prompt by prompt: none, a, b
TASKS = {
    "code": [(10, 5, 20), (10, 5, 20), (10, 5, 20), (10, 5, 20)],
    "text": [(10, 20, 8), (10, 20, 8), (10, 4, 8), (10, 20, 8)],
    "chat": [(10, 12, 30), (10, 12, 30), (10, 12, 30), (10, 12, 30)],
}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "new_toks"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows(run: str = RUN, temperature: str = "0") -> list[dict[str, object]]:
    return [
        {
            "run": run,
            "target": TARGET,
            "drafter": drafter,
            "dataset_path": f"hub/{task}",
            "temperature": temperature,
            "example_id": str(i),
            "tpot_ms": ms[arm],
            "new_toks": 9,
        }
        for task, prompts in TASKS.items()
        for i, ms in enumerate(prompts)
        for arm, drafter in enumerate(("", "org/a", "org/b"))
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "published_timings.csv", rows())
    return tmp_path


def test_gains_are_those_computed_by_hand(data: Path) -> None:
    (group,) = whole_groups(read_timings(data / "published_timings.csv"))
    found = gains(group)

    assert group.arms == ["none", "org/a", "org/b"]
    # means of code, text, chat: none 10 10 10; a 5 16 12; b 20 8 30
    assert found.random == pytest.approx(10 / ((5 + 16 + 12 + 20 + 8 + 30) / 6))
    assert (found.best_arm, found.best_single) == ("none", pytest.approx(1.0))
    assert found.per_task_arms == {"hub/code": "org/a", "hub/text": "org/b", "hub/chat": "none"}
    assert found.per_task == pytest.approx(10 / ((5 + 8 + 10) / 3))
    # text: the third prompt is faster with a
    assert found.per_prompt == pytest.approx(10 / ((5 + (8 + 8 + 4 + 8) / 4 + 10) / 3))


def test_a_choice_by_one_outlier_is_only_fair_on_other_prompts() -> None:
    """Drafter a is better on three prompts of four; the fourth is so slow that the mean favours b."""
    group = whole_groups(
        {
            TaskRun(RUN, TARGET, "0", "code"): _timed(
                [[10, 5, 8], [10, 5, 8], [10, 5, 8], [10, 18, 8]],
            )
        }
    )[0]
    found = gains(group)
    assert (found.best_arm, found.best_single) == ("b", pytest.approx(10 / 8))
    # the half without the outlier chooses a and is scored where it is: (5 + 18) / 2; else b
    assert found.best_single_fair == pytest.approx(10 / ((11.5 + 8) / 2), abs=1e-9)
    assert found.per_task_fair == pytest.approx(found.best_single_fair)


def _timed(ms: list[list[float]]) -> TaskTimings:
    return TaskTimings(
        ["none", "a", "b"], [str(i) for i in range(len(ms))], np.array(ms, dtype=float)
    )


def test_a_second_measurement_takes_the_noise_off_the_oracle() -> None:
    """Prompt 0 is better with a in both measurements, prompt 1 only in one."""
    one = np.array([[10.0, 5.0, 8.0], [10.0, 5.0, 8.0]])
    other = np.array([[10.0, 5.0, 8.0], [10.0, 12.0, 8.0]])
    found = repeated([(one, other)])

    assert found.num_prompts == 2
    assert found.same_choice == 0.5
    assert found.by_chance == pytest.approx(1.0 * 0.5)
    seen = ((5 + 5) / 2 + (5 + 8) / 2) / 2
    there = ((5 + 12) / 2 + (5 + 8) / 2) / 2  # one -> other, then other -> one
    assert found.per_prompt_seen == pytest.approx(10 / seen)
    assert found.per_prompt == pytest.approx(10 / there)
    # per task: one says a (5 against 8), which costs 8.5 in the other; the other says b (8 against 8.5)
    assert found.per_task == pytest.approx(10 / ((8.5 + 8) / 2))


def test_arms_are_compared_within_one_run_only(data: Path) -> None:
    """A drafter of another run is not an arm, and a target measured in parts is not a group."""
    path = data / "published_timings.csv"
    elsewhere = [r for r in rows("later") if r["dataset_path"] != "hub/chat"]
    lonely = [r | {"drafter": "org/c"} for r in rows("no-plain") if r["drafter"] == "org/a"]
    missing = [r for r in rows() if (r["drafter"], r["dataset_path"]) != ("org/b", "hub/text")]
    write(path, [*missing, *elsewhere, *lonely])

    cells = read_timings(path)
    assert not [cell for cell in cells if cell.run == "no-plain"]
    (group,) = whole_groups(cells)
    assert (group.run, group.arms) == (RUN, ["none", "org/a"])


@pytest.mark.parametrize("bad", ["", "nan", "-1", "0", "soon", "inf"])
def test_a_time_that_is_none_is_named_by_its_line(data: Path, bad: str) -> None:
    broken = rows()
    broken[4]["tpot_ms"] = bad
    path = write(data / "published_timings.csv", broken)
    with pytest.raises(ConfigError, match=r"published_timings\.csv:6: tpot_ms must be a positive"):
        read_timings(path)


def test_a_prompt_timed_twice_or_a_missing_column_is_an_error(data: Path) -> None:
    path = write(data / "published_timings.csv", [*rows(), rows()[0]])
    with pytest.raises(ConfigError, match="timed twice"):
        read_timings(path)
    path.write_text("run,target\n1,2\n")
    with pytest.raises(ConfigError, match="no column 'drafter'"):
        read_timings(path)


def test_the_experiment_leaves_a_table_a_figure_and_json(data: Path, tmp_path: Path) -> None:
    write(data / "published_timings.csv", [*rows(), *rows(temperature="1"), *rows("later")])
    out = tmp_path / "out"
    done = paceline.experiment("published-timings", out=out, data=data)

    assert [path.name for path in done.files] == [
        f"published-timings.{suffix}" for suffix in ("md", "json", "png")
    ]
    table = (out / "published-timings.md").read_text()
    assert "| big | 0 | 2025-01-01 | 3 | 0.66x | 1.00x | none |" in table
    assert "![" in table and "## Where `none` is best" in table
    assert "another run, T = 0 | 12 |" in table
    assert "| big | 0 | chat | 2025-01-01 | 3 | 100% | a | 0.83x |" in table
    found = json.loads((out / "published-timings.json").read_text())
    assert found["facts"]["gains"][0]["per_task"] == pytest.approx(10 / ((5 + 8 + 10) / 3))
    assert found["circumstances"]["commit"]
    # equal timings: whatever was chosen once is as good again
    assert found["facts"]["measured twice"]["another run, T = 0"]["same_choice"] == 1.0
    assert (out / "published-timings.png").read_bytes()[:4] == b"\x89PNG"


def test_without_the_file_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: no published_timings.csv"):
        paceline.experiment("published-timings", out=tmp_path, data=tmp_path)
    with pytest.raises(ConfigError, match="--data or PACELINE_DATA"):
        paceline.experiment("published-timings", out=tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'published-timings'"):
        paceline.experiment("publishd-timings", out=tmp_path)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs published_timings.csv in PACELINE_DATA")
def test_the_published_timings_say_what_they_said_before() -> None:
    """Compare random drafter, best single, per task and per prompt with figures of independent code."""
    found = {
        (group.target.rpartition("/")[2], group.temperature): gains(group)
        for group in whole_groups(read_timings(PUBLISHED))
        if "Qwen-14B" not in group.target  # a single drafter, measured in two runs
    }
    assert {
        name: tuple(round(x, 2) for x in (g.random, g.best_single, g.per_task, g.per_prompt))
        for name, g in found.items()
    } == {
        ("Mixtral-8x22B-Instruct-v0.1", "0"): (1.31, 1.51, 1.77, 1.94),
        ("Mixtral-8x22B-Instruct-v0.1", "1"): (1.45, 1.50, 1.60, 1.65),
        ("gemma-2-9b-it", "0"): (1.60, 1.65, 1.88, 1.94),
        ("gemma-2-9b-it", "1"): (1.62, 1.62, 1.70, 1.73),
        ("DeepSeek-R1-Distill-Llama-70B", "0"): (1.27, 1.27, 1.32, 1.37),
        ("DeepSeek-R1-Distill-Llama-70B", "1"): (1.64, 1.69, 1.69, 1.72),
        ("Llama-3.1-70B-Instruct", "0"): (1.83, 2.52, 2.52, 2.69),
        ("Llama-3.1-70B-Instruct", "1"): (1.93, 2.48, 2.48, 2.64),
        ("Llama-3.1-8B-Instruct", "0"): (0.75, 1.58, 1.58, 1.65),
        ("Llama-3.1-8B-Instruct", "1"): (1.23, 1.54, 1.55, 1.58),
    }
