"""The page has the reports between its marks, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paceline.bench.circumstances import circumstances
from paceline.errors import ConfigError
from paceline.experiments.catalog import EXPERIMENTS
from paceline.experiments.findings import Column, Findings, Panel, Series, Table
from paceline.experiments.page import BEGIN, END, collect_docs
from paceline.experiments.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

NAME = "two-specialists"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one experiment's report, and the page next to it."""
    found = Findings(
        [
            Table(
                "First", "What it is.", [Column("way"), Column("speed", "{:.2f}x")], [["a", 1.5]]
            ),
            Table("Second", "More.", [Column("x")], [[7]]),
        ],
        [Panel("p", "y", [Series("s", [1.0, 2.0], [1.0, 2.0])])],
        {"dtype": "float32"},
        ["It holds.", "And more."],
    )
    folder = tmp_path / "choice"
    write_report(EXPERIMENTS[NAME], found, circumstances(), folder)
    (tmp_path / "choice.md").write_text(f"# Page\n\n{BEGIN}\nold figures 9.99x\n{END}\n\n## Tail\n")
    return folder


def test_what_was_found_stands_between_the_marks(folder: Path) -> None:
    page = collect_docs(folder)
    text = page.read_text()
    assert page == folder.with_name("choice.md")
    assert text.startswith("# Page\n") and text.endswith(f"{END}\n\n## Tail\n")
    assert "9.99x" not in text
    assert "| a | 1.50x |" in text and "**First.** What it is." in text
    assert (
        "| 7 |" not in text and "2 tables: [two-specialists.md](choice/two-specialists.md)" in text
    )
    assert f"![{EXPERIMENTS[NAME].title}](choice/{NAME}.png)" in text
    assert f"[{NAME}](#learning-to-choose-between-two-domain-specialists)" in text
    assert text.count("- It holds.\n- And more.\n") == 1
    assert text.count("not run yet") == len(EXPERIMENTS) - 1
    assert "| It holds. |" in text
    assert collect_docs(folder).read_text() == text


def test_a_page_without_marks_is_left_alone(folder: Path) -> None:
    page = folder.with_name("choice.md")
    page.write_text("# mine\n")
    with pytest.raises(ConfigError, match="it must have the lines"):
        collect_docs(folder)
    assert page.read_text() == "# mine\n"
    with pytest.raises(ConfigError, match="cannot be read"):
        collect_docs(folder / "nowhere")
