"""`paceline experiment`: by name, as a list, and recipes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from paceline.cli import main
from paceline.experiments.assistant_selection.timings import COLUMNS
from paceline.experiments.catalog import EXPERIMENTS

RECIPES = Path(__file__).parents[2] / "experiments" / "recipes"
RECIPE = RECIPES / "direct-alignment-llama-2-7b.yaml"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Return the exit code of `paceline experiment ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["paceline", "experiment", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PACELINE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [",".join(COLUMNS)]
    rows += [f"run,big,{d},task,0,{i},{ms}" for d, ms in (("", 10), ("small", 5)) for i in range(4)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "published_timings.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def test_the_list_has_every_experiment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in EXPERIMENTS)


def test_an_experiment_runs_by_name(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PACELINE_DATA", str(data))
    assert run(monkeypatch, "published-timings", "--out", "here") == 0
    shown = capsys.readouterr().out
    assert "2.00x" in shown and "here/published-timings.png" in shown
    assert len(list((tmp_path / "here").iterdir())) == 3


def test_a_smoke_run_writes_into_folders_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "published-timings", "--data", data, "--smoke") == 0
    assert not (tmp_path / "docs").exists()
    assert (tmp_path / "runs/experiments-smoke/reports/published-timings.md").is_file()
    assert run(monkeypatch, "published-timings", "--data", data) == 0
    assert (tmp_path / "docs/experiments/assistant-selection/published-timings.md").is_file()


def test_a_recipe_is_tried_without_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--recipe", RECIPE, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "6,738 M" in shown
    assert "predicted, not measured" in shown
    assert "not confirmed by us" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("published-timing",), "did you mean 'published-timings'"),
        (("published-timings",), "--data or PACELINE_DATA"),
        ((), "name is missing"),
        (("published-timings", "--dry-run"), "--recipe is missing"),
        (("--recipe", "absent.yaml", "--dry-run"), "no such recipe"),
        (("--recipe", RECIPE), "the weights of meta-llama/Llama-2-7b-chat-hf"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert len(shown.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("vocab_size", 32_016, "a vocabulary of 32016 tokens, the target's has 32000"),
        ("intermediate_size", 9_000_000, "does not fit: weights and caches need"),
        ("num_hiden_layers", 2, "has no 'num_hiden_layers' in its configuration"),
    ],
)
def test_a_planted_mistake_in_a_recipe_is_one_line_and_exit_code_2(
    place: str,
    value: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = yaml.safe_load(RECIPE.read_text())
    drafter = raw["drafters"]["pretrained"]
    raw["drafters"] = {"pretrained": drafter}
    del drafter["millions"]
    drafter["shape"][place] = value
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(raw))
    assert run(monkeypatch, "--recipe", "bad.yaml", "--dry-run") == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.strip().splitlines()) == 1
