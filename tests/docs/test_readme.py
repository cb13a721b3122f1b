"""The README's Python runs as printed, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import paceline
from paceline.experiments.demo_prompts import load_written

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
BLOCKS = [text for language, text in FENCED if language == "python"]
SHELL = "".join(text for language, text in FENCED if language == "")
COMMANDS = sorted(set(re.findall(r"^paceline ([\w-]+)", SHELL, flags=re.MULTILINE)))


pytestmark = pytest.mark.usefixtures("short_trainings")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the bundled configuration, two of its drafters, and a few prompts."""
    raw = yaml.safe_load((ROOT / "paceline.yaml").read_text())
    raw["target"]["model"] = str(ROOT / raw["target"]["model"])
    raw["drafters"] = {name: raw["drafters"][name] for name in ("math", "lookup")}
    settings = raw["drafters"]["math"]["settings"]
    settings["model"] = str(ROOT / settings["model"])
    (tmp_path / "paceline.yaml").write_text(yaml.safe_dump(raw))
    records = [*load_written("math")[:12], *load_written("translation")[:12]]
    lines = [json.dumps({"id": r.id, "domain": r.domain, "prompt": r.prompt}) for r in records]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_python_blocks_and_commands_to_run() -> None:
    assert len(BLOCKS) == 3
    assert {*COMMANDS} == {
        *("doctor", "collect", "profile", "learn", "evaluate", "generate", "distill"),
        *("layer-search", "drafters", "data", "experiment", "route"),
    }


@pytest.mark.parametrize("block", BLOCKS, ids=["generate", "main job", "transformers"])
def test_python_of_the_readme_runs(
    block: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("verb", COMMANDS)
def test_commands_of_the_readme_are_python_calls_too(verb: str) -> None:
    from paceline.cli.app import app

    name = verb.replace("-", "_")
    assert name in {command.callback.__name__ for command in app.registered_commands}
    if verb != "generate":  # in Python it belongs to what `load` returns
        assert callable(getattr(paceline, {"layer-search": "search_layers"}.get(verb, name)))
