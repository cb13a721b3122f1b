"""A drafter outside the project: from the YAML to the text, and the mistakes of its user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import paceline
from paceline.cli import main
from paceline.replay import replay

ROOT = Path(__file__).parents[2]
PROMPT = "Translate English to French:\nThe list is empty. The list is full. The list is empty."


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def configuration(folder: Path, kind: str = "bigram_drafter:Bigram", **settings: Any) -> Path:
    raw = {
        "target": {"model": str(ROOT / "zoo" / "target"), "dtype": "float32"},
        "drafters": {"bigram": {"kind": kind, "settings": settings}},
    }
    path = folder / "paceline.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_its_text_is_that_of_none_and_its_rounds_are_those_of_the_replay(folder: Path) -> None:
    pace = paceline.load(configuration(folder, num_draft_tokens=6))
    drafter = pace.parts.drafters["bigram"]

    plain = pace.complete(PROMPT, drafter="none", max_new_tokens=48)
    helped = pace.complete(PROMPT, drafter="bigram", max_new_tokens=48)

    assert helped.token_ids == plain.token_ids
    assert helped.block_efficiency > 1.1
    assert max(r.drafted for r in helped.rounds) == 6
    foreseen = replay(drafter, pace.encode(PROMPT), plain.token_ids, 48).rounds
    assert foreseen.tolist() == [[r.drafted, r.accepted] for r in helped.rounds]
    assert not drafter._followers
    seeded = {"temperature": 0.8, "seed": 3, "max_new_tokens": 24}
    texts = {pace.complete(PROMPT, drafter=arm, **seeded).text for arm in pace.drafters}
    assert len(texts) == 1


def test_the_command_line_runs_and_lists_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configuration(folder)
    assert run(monkeypatch, "generate", "hello", "-c", path, "-d", "bigram", "--stats") == 0
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert "bigram" in shown.err
    assert run(monkeypatch, "drafters", "-c", path) == 0
    listed = capsys.readouterr().out
    assert "bigram_drafter:Bigram" in listed
    assert "A drafter of bigrams" in listed


OTHER_FILES = {
    "a_plain_class": "class Thing:\n    pass\n",
    "without_settings": (
        "from paceline import Drafter\n"
        "class Thing(Drafter):\n"
        "    def propose(self, rows, limits): ...\n"
        "    def would_accept(self, prompt, trajectory, p): ...\n"
    ),
    "broken": "import a_package_that_is_not_there\n",
}
MISTAKES = [
    (
        "bigram_drafter:Bigram",
        {"num_draft_token": 3},
        "unknown key 'num_draft_token'; did you mean 'num_draft_tokens'?",
    ),
    ("bigram_drafter:Bigram", {"num_draft_tokens": 0}, "'num_draft_tokens': input should be"),
    ("bigram_drafter:Bigrams", {}, "cannot import kind 'bigram_drafter:Bigrams'"),
    ("bigram_draft:Bigram", {}, "No module named 'bigram_draft'"),
    ("a_plain_class:Thing", {}, "is not a subclass of paceline.Drafter"),
    ("without_settings:Thing", {}, "has no `Settings`, a pydantic model"),
    ("broken:Thing", {}, "No module named 'a_package_that_is_not_there'"),
    ("bigram", {}, "one of your own is named package.module:Class"),
]


@pytest.mark.parametrize(("kind", "settings", "says"), MISTAKES)
@pytest.mark.parametrize("verb", [("generate", "hello"), ("drafters",)])
def test_a_mistake_is_one_line_and_exit_code_2(
    kind: str,
    settings: dict[str, Any],
    says: str,
    verb: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in OTHER_FILES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    path = configuration(folder, kind, **settings)

    assert run(monkeypatch, *verb, "-c", path) == 2
    shown = capsys.readouterr()
    assert says in shown.err + shown.out
    assert "Traceback" not in shown.err + shown.out
    if verb[0] == "generate":
        assert shown.err.startswith("paceline: drafter 'bigram': ")
        assert len(shown.err.strip().splitlines()) == 1
