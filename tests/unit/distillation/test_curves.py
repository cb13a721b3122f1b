"""The course of a training: every figure of the history is drawn and logged, at its step."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paceline.distillation.curves import EventLog, plot_curves, points, scalars, write_events
from paceline.distillation.measures import AnswerMatches, measure
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

TASKS = ("code", "math")


def entry(step: int, phase: str = "answers", overlap: bool = False) -> dict[str, Any]:
    random = np.random.default_rng(step)
    tasks = [TASKS[i % 2] for i in range(8)]
    bits = [random.random(30) < 0.4 + 0.3 * (task == "code") + step / 1000 for task in tasks]
    overlaps = [np.full(30, 0.5)] * 8 if overlap else None
    found = measure(AnswerMatches.of(bits, tasks, overlaps), 0.05).to_history()
    for place, task in enumerate(TASKS):
        found["domains"][task]["loss"] = 2.0 - step / 200 + place
    figures = {"train_loss": 3.0 - step / 100, "tokens_per_second": 900.0}
    return {"step": step, "phase": phase, **figures, **found}


HISTORY = [entry(20, "text"), entry(40, "text"), entry(60), entry(80, overlap=True), entry(100)]


# --- the figure -----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []

    class Kept(Figure):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            figures.append(self)

    monkeypatch.setattr("paceline.distillation.curves.import_figure", lambda extra: Kept)
    return figures


def curves_of(figure: Figure) -> list[dict[str, list[tuple[float, float]]]]:
    """Return the named curves of every panel as points."""
    return [
        {
            str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True))
            for line in axes.get_lines()
            if not str(line.get_label()).startswith("_")
        }
        for axes in figure.axes
    ]


def test_every_figure_is_drawn_by_task_at_its_step(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "new" / "curves.png"
    plot_curves(HISTORY, path, "draft-general")
    loss, acceptance, efficiency, speedup = curves_of(drawn[0])
    length = str(HISTORY[-1]["num_draft_tokens"])

    assert loss["training"] == [(e["step"], e["train_loss"]) for e in HISTORY]
    assert acceptance["mean over tasks"] == [(e["step"], e["match_rate"]) for e in HISTORY]
    assert acceptance["mean under sampling"] == [(80, 0.5)]
    for task in TASKS:
        own = [(e["step"], e["domains"][task]) for e in HISTORY]
        assert loss[task] == [(step, e["loss"]) for step, e in own]
        assert acceptance[task] == [(step, e["match_rate"]) for step, e in own]
        assert efficiency[task] == [(step, e["block_efficiency"][length]) for step, e in own]
        assert speedup[task] == [(step, e["predicted_speedup"]) for step, e in own]
    assert "parameters only" in drawn[0].axes[3].get_title()
    assert [text.get_text().strip() for text in drawn[0].axes[0].texts] == ["text", "answers"]
    assert imread(path).shape[:2] == (840, 1320)


def test_a_task_has_one_colour_in_all_panels_also_where_one_lacks_another(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    history = [entry(20), entry(40)]
    for one in history:
        del one["domains"]["code"]["loss"]
    plot_curves(history, tmp_path / "curves.png")
    colours = {
        line.get_color()
        for axes in drawn[0].axes
        for line in axes.get_lines()
        if line.get_label() == "math"
    }
    assert len(colours) == 1


def test_a_single_validation_is_visible(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_curves(HISTORY[:1], tmp_path / "curves.png")
    named = [line for line in drawn[0].axes[1].get_lines() if line.get_label() in TASKS]
    assert [line.get_marker() for line in named] == ["o", "o"]


def test_an_entry_without_a_figure_has_no_point() -> None:
    history = [
        {"step": 1, "acceptance": None},
        {"step": 2, "acceptance": float("nan")},
        {"step": 3},
    ]
    history += [{"step": 4, "acceptance": 0.25, "domains": {"a": {"acceptance": 0.5}}}]
    assert points(history, "acceptance") == ([4], [0.25])
    assert points(history, "acceptance", task="a") == ([4], [0.5])
    assert points(history, "acceptance", "4") == ([], [])


def test_there_is_no_figure_without_a_validation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no validation yet"):
        plot_curves([], tmp_path / "curves.png")


# --- TensorBoard ----------------------------------------------------------------------------------


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_every_figure(tmp_path: Path) -> None:
    write_events(HISTORY, tmp_path)
    events = read_events(tmp_path)

    assert set(events) == set(scalars(HISTORY[3]))
    for name, own in (("mean", None), *((task, task) for task in TASKS)):
        entries = [e if own is None else e["domains"][own] for e in HISTORY]
        for tag, values in {
            f"match_rate/{name}": [e["match_rate"] for e in entries],
            f"predicted_speedup/{name}": [e["predicted_speedup"] for e in entries],
            f"block_efficiency_4/{name}": [e["block_efficiency"]["4"] for e in entries],
            f"mbsu_8/{name}": [e["mbsu"]["8"] for e in entries],
        }.items():
            assert [step for step, _ in events[tag]] == [20, 40, 60, 80, 100]
            assert [value for _, value in events[tag]] == pytest.approx(values, rel=1e-6)
    assert events["acceptance/mean"] == [(80, 0.5)]
    assert [step for step, _ in events["loss/training"]] == [20, 40, 60, 80, 100]


def test_a_continued_training_hides_the_steps_that_it_repeats(tmp_path: Path) -> None:
    """A killed run has validated at step 60 but its checkpoint is of step 40."""
    killed = EventLog(tmp_path)
    for one in HISTORY[:3]:
        killed.add(one)
    killed.close()
    continued = EventLog(tmp_path, first_step=41)
    for one in HISTORY[2:]:
        continued.add(one)
    continued.close()

    assert [step for step, _ in read_events(tmp_path)["match_rate/mean"]] == [20, 40, 60, 80, 100]


# --- missing packages -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "write"),
    [("tensorboard", write_events), ("matplotlib", plot_curves)],
    ids=["events", "figure"],
)
def test_a_missing_package_is_named_with_its_install_line(
    missing: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == missing or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'paceline\[train\]'"):
        write(HISTORY, tmp_path / "made")
