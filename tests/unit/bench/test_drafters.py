"""The list of drafters: kinds, problems and the memory of each arm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.bench.doctor import model_facts
from paceline.bench.drafters import ConfiguredDrafter, DrafterList, drafters
from paceline.cli import main
from paceline.config import Config, ModelSection, parse
from paceline.drafting.catalog import CATALOG

ZOO = Path(__file__).parents[3] / "zoo"


def config(**drafting: Any) -> Config:
    target = {"model": str(ZOO / "target"), "dtype": "float32", "device": "cpu"}
    return parse(Config, {"target": target, "drafters": drafting}, "test")


def draft_model(name: str, **settings: Any) -> dict[str, Any]:
    return {
        "kind": "draft_model",
        "settings": {"model": str(ZOO / name), "dtype": "float32"} | settings,
    }


def arms(found: DrafterList) -> dict[str, ConfiguredDrafter]:
    return {arm.name: arm for kind in found.kinds for arm in kind.arms}


def test_without_a_configuration_every_kind_of_the_catalogue_is_described() -> None:
    found = drafters()

    assert [kind.kind for kind in found.kinds] == list(CATALOG)
    assert all(len(kind.summary) > 20 and "\n" not in kind.summary for kind in found.kinds)
    by_name = {kind.kind: kind for kind in found.kinds}
    assert by_name["draft_model"].needs == ["same vocabulary"]
    assert by_name["draft_model"].required == ["model"]
    assert by_name["prompt_lookup"].settings["num_draft_tokens"] == "8"
    assert by_name["none"].arms == [ConfiguredDrafter("none")]
    assert found.target is None


def test_arms_are_listed_with_their_kind_and_problem() -> None:
    lookup = {"kind": "prompt_lookup", "settings": {"min_ngram": 9, "max_ngram": 2}}
    strange = {"kind": "promt_lookup"}
    found = drafters(config(math=draft_model("draft-math"), bad=lookup, odd=strange), memory=True)

    by_name = {kind.kind: [arm.name for arm in kind.arms] for kind in found.kinds}
    assert by_name["draft_model"] == ["math"]
    assert by_name["prompt_lookup"] == ["bad"]
    assert by_name["promt_lookup"] == ["odd"]
    assert len(found.problems) == 2
    assert "min_ngram 9 is above max_ngram 2" in found.problems[0]
    assert "did you mean 'prompt_lookup'?" in found.problems[1]
    assert arms(found)["math"].weight_bytes is None  # nothing is loaded where something is wrong


def test_memory_is_weights_plus_one_row() -> None:
    found = drafters(
        config(
            math=draft_model("draft-math"),
            wide=draft_model("target"),
            lookup={"kind": "prompt_lookup"},
        ),
        memory=True,
    )
    held = arms(found)
    for arm, name in (("math", "draft-math"), ("wide", "target")):
        facts = model_facts(ModelSection(model=str(ZOO / name), dtype="float32"))
        assert facts.packed_bytes >= facts.weight_bytes  # of the tied models too
        assert held[arm].weight_bytes == facts.weight_bytes + facts.packed_bytes
        per_row = held[arm].row_bytes or 0
        # the cache grows in blocks and ahead of the text
        assert found.row_tokens * facts.cache_bytes_per_token <= per_row
        assert per_row <= (found.row_tokens + 512) * facts.cache_bytes_per_token
    assert (held["none"].weight_bytes, held["none"].row_bytes) == (0, 0)


def test_the_command_prints_a_table_and_json_and_needs_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["paceline", "drafters", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run() == 0
    shown = capsys.readouterr().out
    assert "prompt_lookup" in shown
    assert "no configuration" in shown
    assert run("--memory") == 2
    assert "--memory needs a configuration" in capsys.readouterr().err

    raw = config(math=draft_model("draft-math")).model_dump(mode="json")
    (tmp_path / "paceline.yaml").write_text(yaml.safe_dump(raw))
    assert run("--memory") == 0
    shown = capsys.readouterr().out
    assert "held when loaded" in shown
    assert "MiB" in shown
    assert run("--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"math"} == {arm["name"] for k in listed["kinds"] if k["needs"] for arm in k["arms"]}

    raw["drafters"]["math"]["settings"]["num_draft_tokens"] = 0
    (tmp_path / "paceline.yaml").write_text(yaml.safe_dump(raw))
    assert run() == 2
    assert "problem: drafter 'math'" in capsys.readouterr().out
