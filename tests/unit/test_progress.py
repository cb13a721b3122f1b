"""Progress where the output is not a terminal: lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from paceline.cli.progress import progress


def test_a_log_gets_a_line_a_minute_between_the_ends_of_a_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 59.0, 61.0, 62.0, 122.0, 130.0, 131.0])
    monkeypatch.setattr("paceline.cli.progress.perf_counter", lambda: next(clock))
    written = io.StringIO()
    with progress(Console(file=written, width=80)) as report:
        for done in (0, 10, 20, 30, 40, 100, 100):
            report("align", done, 100, "loss 1.5" if done else "")
    assert written.getvalue().splitlines() == [
        "align ...",
        "align: 20 of 100, 61 s, loss 1.5",
        "align: 40 of 100, 122 s, loss 1.5",
        "align: 100 in 130.0 s",
    ]
