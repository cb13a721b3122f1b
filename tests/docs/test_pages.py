"""The code of the pages runs as printed, and their lists are complete."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import BaseModel

import paceline
from paceline.drafting.base import BuildContext, Needs
from paceline.drafting.catalog import CATALOG
from paceline.integrations.generation_settings import _REFUSED, _REFUSED_HERE
from paceline.requests import RequestSettings

ROOT = Path(__file__).parents[2]
COMING = (ROOT / "docs" / "coming-from-assistant-model.md").read_text(encoding="utf-8")
OWN = (ROOT / "docs" / "drafters" / "your_own.md").read_text(encoding="utf-8")


def test_the_page_for_those_who_come_from_assistant_model_runs_from_top_to_bottom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", COMING, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    exec(compile("\n".join(blocks), "coming-from-assistant-model.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_it_names_every_setting_that_is_refused() -> None:
    refused = COMING.partition("## What is refused")[2]
    for name in (*_REFUSED, *_REFUSED_HERE):
        assert f"`{name}`" in refused, name


def test_the_index_of_drafters_has_every_kind() -> None:
    index = (ROOT / "docs" / "drafters" / "README.md").read_text(encoding="utf-8")
    for kind in CATALOG:
        assert re.search(rf"^\| \[`{kind}`\]\({kind}\.md\) \|", index, flags=re.MULTILINE), kind


def test_what_a_drafter_of_ones_own_is_told_to_use_is_public() -> None:
    words = ("Drafts", "pad_drafts", "SimulatedReplay", "Needs", "BuildContext", "ConfigError")
    for name in (*words, "Drafter", "RowView", "DraftReplay"):
        assert name in paceline.__all__
    for name in words:
        assert f"`{name}" in OWN, name
    assert {f.name for f in fields(BuildContext)} >= {"target", "tokenizer", "drafters"}
    assert fields(Needs)
    for kind in CATALOG.values():
        assert issubclass(kind.Settings, BaseModel)


def test_the_page_of_requests_lists_every_setting_as_it_is_checked() -> None:
    page = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, flags=re.MULTILINE))
    fields = RequestSettings.model_fields
    assert {name: listed.get(name) for name in fields} == {
        n: f.description for n, f in fields.items()
    }
