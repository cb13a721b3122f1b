"""Tables that are too wide are printed in bands: no cell is cut or lost, no line is too wide."""

from __future__ import annotations

import pytest
from rich.console import Console

from paceline.experiments.demo_job import ALL_TASKS, ORACLE, DemoResult, MethodFigures
from paceline.experiments.demo_report import accepted_table, chosen_table, table
from paceline.terminal import PROSE, BandedTable

NAMES = ("none", "a-drafter-with-a-long-name@12", "auto")
HEADS = ("translation", "one token over 5 tokens", "math", "a_long_word_of_a_header")


def shown(what: BandedTable, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as caught:
        console.print(what)
    return caught.get().splitlines()


def cells(lines: list[str]) -> list[list[str]]:
    """Return the rows of all bands, with each line of a wrapped sentence as a row."""
    return [[c.strip() for c in line.strip("│").split("│")] for line in lines if line[:1] == "│"]


@pytest.mark.parametrize("width", [58, 64, 80, 120, 300])
def test_cells_are_whole_at_any_width(width: int) -> None:
    what = BandedTable(title="what this is", caption="more of it")
    what.add_column("drafter")
    for head in HEADS:
        what.add_column(head, justify="right")
    for name in NAMES:
        what.add_row(name, *(f"1.23 ({name[:2]}, {head[:4]})" for head in HEADS))
    lines = shown(what, width)
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    assert sum("what this is" in line for line in lines) == 1
    assert sum("more of it" in line for line in lines) == 1
    found = cells(lines)
    num_bands = sum(line[:1] == "┏" for line in lines)
    assert [row[0] for row in found] == [*NAMES] * num_bands
    for name in NAMES:
        own = [cell for row in found if row[0] == name for cell in row[1:]]
        assert own == [f"1.23 ({name[:2]}, {head[:4]})" for head in HEADS]
    assert (num_bands == 1) == (width >= 120)


def test_sentences_are_wrapped_before_names() -> None:
    what = BandedTable()
    what.add_column("kind")
    what.add_column("what it does", overflow=PROSE)
    sentence = "drafts what followed the last tokens where they stood before " * 3
    what.add_row("a-drafter-with-a-long-name", sentence)
    found = cells(shown(what, 80))
    assert found[0][0] == "a-drafter-with-a-long-name" and len(found) > 2
    assert " ".join(row[1] for row in found) == sentence.strip()


def test_a_table_without_room_for_two_columns_is_wrapped() -> None:
    what = BandedTable()
    what.add_column("drafter")
    what.add_column("speed")
    what.add_row("a-drafter-with-a-long-name", "1.23 of none")
    lines = shown(what, 30)
    assert all(len(line) <= 30 for line in lines)
    assert "".join(row[0] for row in cells(lines)) == "a-drafter-with-a-long-name"


@pytest.mark.parametrize("width", [80, 120])
def test_the_demo_has_a_row_for_each_arm(width: int) -> None:
    arms = ["none", *(f"general-{i}m@{i}" for i in range(1, 13)), "random", "auto", ORACLE]
    tasks = ("translation", "math", "code", "summary", ALL_TASKS)
    cell = MethodFigures(812.3, 2.104, 3.412, 7, 8)
    result = DemoResult(
        circumstances={},
        settings={},
        cells={task: dict.fromkeys(arms, cell) for task in tasks},
        chosen={task: dict.fromkeys(arms, 1) for task in tasks},
        best_single="random",
        auto_over_best_single=1.0,
        auto_over_oracle=1.0,
        predicted={},
        stage_seconds={},
    )
    found = cells(shown(table(result), width))
    assert found == [[arm, *["812 2.10x"] * len(tasks)] for arm in arms]
    found = cells(shown(accepted_table(result), width))
    assert found == [[arm, *["3.41 7/8"] * len(tasks)] for arm in arms if arm != ORACLE]
    lines = shown(chosen_table(result), width)
    assert all(f"{arm} (1)" in " ".join(c[-1] for c in cells(lines)) for arm in arms)
