"""The verbs with a cascade in the configuration: collected by its parts, priced, learned and served."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

import paceline
from paceline.cli import main
from paceline.drafting.cascade.calibration import CALIBRATION_FILE, load_calibration
from paceline.drafting.cascade.drafter import Cascade
from paceline.store.layout import REPLAYS, list_names, store_folder

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = ("spam", "eggs", "code", "text", "one", "two", "three", "round")
SETTINGS = {"parts": ["near", "suffix"], "num_draft_tokens": 6}


@pytest.fixture(scope="module", autouse=True)
def _short_trainings(short_trainings: None) -> None:
    """For every test of this file."""


@pytest.fixture(scope="module")
def folder(
    save_tiny_models: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with a configuration and prompts."""
    models, folder = save_tiny_models(128), tmp_path_factory.mktemp("cascade")
    near = {"model": str(models / "near"), "num_draft_tokens": 4}
    raw = {
        "target": {"model": str(models / "target")},
        "drafters": {
            "near": {"kind": "draft_model", "settings": near},
            "suffix": {"kind": "suffix_lookup"},
            "both": {"kind": "cascade", "settings": SETTINGS},
        },
    }
    (folder / "paceline.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    lines = [
        json.dumps({"id": f"p{i}", "domain": WORDS[i % 2], "prompt": f"{WORDS[i % 8]} {i}: " * 2})
        for i in range(32)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Return the exit code of `paceline ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_cascade_passes_through_all_verbs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("-c", folder / "paceline.yaml")

    def said(*arguments: str | Path) -> str:
        capsys.readouterr()
        code = run(monkeypatch, *arguments)
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    assert "assumed prices" in str(paceline.load(folder / "paceline.yaml").notes)
    assert "both" in said("doctor", *given)
    memory = said("drafters", *given, "--memory")
    assert "cascade" in memory and "both" in memory
    said("collect", folder / "prompts.jsonl", *given, "--max-new-tokens", "40")
    config = paceline.load_config(folder / "paceline.yaml")
    assert list_names(config.paths.store, REPLAYS) == ["near", "suffix"]  # rounds of `both` follow

    unpriced = json.loads(said("data", *given, "--json"))
    assert "both" not in unpriced["acceptance"]
    said("profile", *given)
    assert "assumed prices" not in str(paceline.load(folder / "paceline.yaml").notes)

    found = json.loads(said("data", *given, "--json"))
    assert found["notes"] == []
    assert found["acceptance"]["both"]["all"]["tokens_per_round"] > 1.0
    assert "both" in said("doctor", *given)
    assert "predicted speed-up" in said("learn", *given)

    parts, chances = load_calibration(config.paths.policy)["both"]
    assert parts == ("suffix", "near")
    report = json.loads(said("evaluate", *given, "--json"))
    arms = report["sections"][0]["report"]["overall"]["arms"]
    assert {"suffix", "both"} <= set(arms)

    pace = paceline.load(folder / "paceline.yaml")
    both = pace.parts.drafters["both"]
    assert isinstance(both, Cascade)
    assert both.chances.tables.tolist() == chances.tables.tolist()
    texts = {
        json.loads(said("generate", "spam 3: ", *given, "-d", arm, "--json"))["text"]
        for arm in ("none", "both", "auto")
    }
    assert len(texts) == 1
    assert "both" in said("evaluate", *given, "--compare", "acceptance", "--rows", "1,4")


def test_mistakes_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the test above: a damaged calibration, and a collection of an older version."""
    path = folder / "paceline.yaml"
    config = paceline.load_config(path)
    calibration = config.paths.policy / CALIBRATION_FILE
    good = calibration.read_text()
    calibration.write_text(good[:-40])
    (note,) = [n for n in paceline.load(path).notes if CALIBRATION_FILE in n]
    assert "run `paceline learn` again" in note
    calibration.write_text(good)

    manifests = list(store_folder(config.paths.store, REPLAYS, "suffix").glob("*.json"))
    assert manifests
    for manifest in manifests:
        content = json.loads(manifest.read_text())
        content["columns"] = [
            c for c in content["columns"] if c not in ("evidence", "parents", "kept")
        ]
        manifest.write_text(json.dumps(content))
    capsys.readouterr()
    for verb in ("learn", "data"):
        assert run(monkeypatch, verb, "-c", path) == 2
        error = capsys.readouterr().err.strip()
        assert "evidence" in error and "collect into a new folder" in error, error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["near"], "none of its parts near is a suffix_lookup"),
        (["suffix", "later"], "its part 'later' is not a drafter configured before it"),
        (["suffix", "suffix"], "a part is named twice"),
        (["suffix", "dear"], "its part 'dear' (draft_model) cannot be a part"),
    ],
)
def test_wrong_parts_end_a_command_with_one_line(
    folder: Path,
    tmp_path: Path,
    parts: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = yaml.safe_load((folder / "paceline.yaml").read_text())
    raw["drafters"] = {
        "near": raw["drafters"]["near"],
        "suffix": raw["drafters"]["suffix"],
        "dear": {
            "kind": "draft_model",
            "settings": raw["drafters"]["near"]["settings"] | {"stop": "expected"},
        },
        "both": {"kind": "cascade", "settings": {"parts": parts}},
    }
    path = tmp_path / "paceline.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    capsys.readouterr()

    assert run(monkeypatch, "generate", "spam", "-c", path, "-d", "both") == 2

    error = capsys.readouterr().err.strip()
    assert words in " ".join(error.split())
