"""The workbench makes files once, reuses them, and never learns from timed prompts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from support.prompt_files import ids_of_part, write_task

from paceline.config import DrafterSection, load_config
from paceline.errors import ConfigError
from paceline.experiments import workbench
from paceline.experiments.prompt_files import read_tasks
from paceline.experiments.workbench import SMOKE, Sizes, Workbench
from paceline.store import TrainedOn, part_of, read_prompts

if TYPE_CHECKING:
    from pathlib import Path


def ids(prompts: list[Any]) -> set[str]:
    return {prompt.id for prompt in prompts}


def test_a_larger_number_of_prompts_has_the_smaller_one_in_it(
    config: Path, data: Path, tmp_path: Path
) -> None:
    small, large = (
        Workbench(config, tmp_path, data, Sizes(prompts=n, timed=3)).prompts for n in (2, 9)
    )
    assert len(small.collected) == 8 and len(large.collected) == 36
    assert ids(small.collected) < ids(large.collected)
    assert ids(small.timed) == ids(large.timed)
    assert not ids(large.collected) & ids(large.timed)
    assert {prompt.domain for prompt in small.timed} == {"translation", "math", "code", "summary"}


def test_too_many_prompts_or_a_missing_task_is_one_line(
    config: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"translation.jsonl: 11 prompts of the part 'collection' .* has 10;"
    ):
        _ = Workbench(config, tmp_path, data, Sizes(prompts=11, timed=3)).prompts
    with pytest.raises(ConfigError, match=r"translation.jsonl: 7 .* 'judging' .* has 6; add"):
        _ = Workbench(config, tmp_path, data, Sizes(prompts=10, timed=7)).prompts
    (data / "math.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no math\.jsonl in this data folder"):
        _ = Workbench(config, tmp_path, data, Sizes(prompts=2, timed=1)).prompts
    with pytest.raises(ConfigError, match=r"only .* exist; name a folder with more prompts"):
        _ = Workbench("unused.yaml", tmp_path, None, Sizes(prompts=500)).prompts


def test_without_a_folder_the_demo_gives_the_prompts(tmp_path: Path) -> None:
    found = Workbench("unused.yaml", tmp_path, None, SMOKE).prompts
    assert (len(found.collected), len(found.timed)) == (32, 4)


def test_prompts_that_are_elsewhere_are_neither_collected_nor_timed(data: Path) -> None:
    collected, timed, _ = read_tasks(data, 2, 3)
    elsewhere = ids(timed) | ids(collected)
    others, later, num_left_out = read_tasks(data, 2, 3, elsewhere)
    assert len(others) == 8 and len(later) == 12 and num_left_out == 0
    assert not (ids(others) | ids(later)) & elsewhere


def all_prompts(data: Path, task: str) -> list[str]:
    return [record.prompt for record in read_prompts([data / f"{task}.jsonl"])]


def test_prompts_that_a_drafter_was_trained_on_are_left_out_and_counted(
    config: Path, data: Path, tmp_path: Path
) -> None:
    """Code has 7 prompts left to collect, fewer than the other tasks, and 5 to time."""
    raw = yaml.safe_load(config.read_text())
    trained = tmp_path / "trained"
    shutil.copytree(raw["drafters"]["near"]["settings"]["model"], trained)
    of_code = all_prompts(data, "code")  # 10 to collect, 6 to time
    seen = [*of_code[:3], of_code[-1]]
    TrainedOn.of([f"  {seen[0]}", *seen[1:]]).save(trained)
    raw["drafters"]["trained"] = {"kind": "draft_model", "settings": {"model": str(trained)}}
    config.write_text(yaml.safe_dump(raw))

    bench = Workbench(config, tmp_path / "work", data, Sizes(prompts=8, timed=3))
    every = {
        prompt.prompt for kind in (bench.prompts.collected, bench.prompts.timed) for prompt in kind
    }
    assert len(every) == 3 * 11 + 10
    assert not every & set(seen)
    settings = bench.settings()
    assert settings["prompts left out because a drafter was trained on them"] == 4
    assert settings["prompts per task"] == "translation 8, math 8, code 7, summary 8"

    for learned, left, part in ((of_code[:10], "0 of the 10", "coll"), (of_code[12:], "2", "jud")):
        TrainedOn.of(learned).save(trained)
        bench = Workbench(config, tmp_path / "work", data, Sizes(prompts=8, timed=3))
        with pytest.raises(
            ConfigError, match=rf"code.jsonl: .* trained on all but {left} .* part '{part}"
        ):
            _ = bench.prompts


def test_collected_and_timed_prompts_are_of_their_parts_and_share_no_text(data: Path) -> None:
    """The file of math also has a prompt that translation times, with an id to collect."""
    for task in ("translation", "code", "summary"):
        write_task(data, task, num_collection=11)
    (twin,) = read_tasks(data, 0, 1).timed[:1]
    extra = {"id": ids_of_part("collection", 11, "math")[-1], "prompt": f" {twin.prompt}"}
    with (data / "math.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(extra) + "\n")

    found = read_tasks(data, 10, 6)
    assert {part_of(r.id) for r in found.collected} == {"collection"}
    assert {part_of(r.id) for r in found.timed} == {"judging"}
    assert len(found.collected) == 40 and len(found.timed) == 24
    with pytest.raises(ConfigError, match=r"math.jsonl: 11 .* but it has 10;"):
        read_tasks(data, 11, 6)


def test_spec_bench_is_read_by_first_turns(data: Path, tmp_path: Path) -> None:
    found = Workbench("unused.yaml", tmp_path, data).spec_bench
    assert [(p.id, p.domain, p.prompt) for p in found][3] == ("spec_bench/3", "qa", "what is 3?")
    with (data / "spec_bench.jsonl").open("a") as file:
        file.write('{"question_id": 9, "category": "qa", "turns": []}\n')
    with pytest.raises(ConfigError, match=r"spec_bench\.jsonl:25: not a Spec-Bench question"):
        _ = Workbench("unused.yaml", tmp_path, data).spec_bench


def test_what_one_experiment_made_the_next_one_finds(
    config: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    sizes = Sizes(prompts=2, timed=1, max_new_tokens=6, profile_seconds=0.0)

    def bench(prompts: int) -> Workbench:
        stages.clear()
        on_progress = lambda stage, done, total: stages.append(stage)  # noqa: E731
        return Workbench(
            config, tmp_path / "work", data, replace(sizes, prompts=prompts), on_progress
        )

    first = bench(2)
    assert {p.id for p in first.collection.prompts} == ids(first.prompts.collected)
    assert set(first.collection.prompts[0].replays) == {"near", "lookup"}
    first.costs.check(["near", "lookup"])
    assert {"decode", "profile"} <= set(stages)

    more = bench(4)
    assert len(more.collection.prompts) == 16
    assert more.costs.hash() == first.costs.hash()
    assert "profile" not in stages
    fewer = bench(2)  # the folder holds more by now
    assert {p.id for p in fewer.collection.prompts} == ids(fewer.prompts.collected)
    assert "decode" not in stages

    monkeypatch.setattr(workbench, "cpu_model", lambda: "another machine")
    assert bench(2).costs.hash() != first.costs.hash()
    assert "profile" in stages


def test_everything_lies_in_its_folder_and_no_prefill_is_spared(
    config: Path, tmp_path: Path
) -> None:
    """Clocked arms decode the same prompts, and each must pay for its own prefill."""
    found = Workbench(config, tmp_path / "work").config
    assert found.engine.prefix_positions == 0
    assert {path.parent for path in (found.paths.store, found.paths.costs, found.paths.policy)} == {
        tmp_path / "work"
    }


def test_drafters_use_the_answers_of_the_workbenchs_own_collection(
    config: Path, tmp_path: Path
) -> None:
    """Others may hold the prompts that are timed."""
    suffix = DrafterSection(kind="suffix_lookup", settings={"answers": "elsewhere"})
    other = load_config(config).model_copy(update={"drafters": {"suffix": suffix}})
    for store in (None, tmp_path / "given"):
        found = Workbench(other, tmp_path / "work", store=store).config
        assert found.paths.store == (store or tmp_path / "work" / "collection")
        assert found.drafters["suffix"].settings["answers"] == str(found.paths.store)


def test_settings_say_when_figures_mean_nothing(config: Path, tmp_path: Path) -> None:
    assert "smoke run" in Workbench(config, tmp_path, None, replace(SMOKE, prompts=3)).settings()
    found = Workbench(config, tmp_path, None, Sizes()).settings()
    assert found["dtype"] == "float32" and "smoke run" not in found
