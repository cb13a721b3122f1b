"""An evaluation as tables and sentences for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.contracts import NONE
from paceline.learning.evaluation.ceilings import CEILINGS
from paceline.learning.evaluation.strategies import ORACLE
from paceline.terminal import BandedTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from paceline.intervals import Interval
    from paceline.learning.evaluation.figures import Chosen, Figures
    from paceline.learning.evaluation.report import EvaluationReport
    from paceline.learning.evaluation.sections import Evaluation, Section

_MOST_NAMED: Final = 4  # drafters, and draft lengths


def show(console: Console, evaluation: Evaluation) -> None:
    """Print the first section in full, a row for each section, then all findings in words."""
    first, *others = evaluation.sections
    show_report(console, first.report, f"predicted speed-up over {NONE}: {first.title}")
    if others:
        console.print(_sections(evaluation.sections))
    for sentence in evaluation.sentences():
        console.print(f"- {sentence}", markup=False, highlight=False)
    notes = dict.fromkeys(note for s in evaluation.sections for note in s.report.notes)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    facts = ", ".join(f"{name} {value}" for name, value in evaluation.circumstances.items())
    if facts:
        console.print(f"({facts})", markup=False, highlight=False)


def show_report(
    console: Console,
    report: EvaluationReport,
    title: str = f"predicted speed-up over {NONE}, held-out prompts",
) -> None:
    """Print all strategies over all prompts, the strategies by task, and the policies' choices.

    The figures are those of prompts that no drafter was trained on. If there are others, a column has
    their speed-ups.
    """
    console.print(_strategies(report, title))
    for sentence in report.exposure.sentences():
        console.print(f"- {sentence}", markup=False, highlight=False)
    if len(report.by_domain) > 1:
        console.print(_by_task(report))
    for policy in report.policies:
        chosen = report.overall.chosen[policy]
        console.print(f"{policy} chose {_shares(chosen)}", markup=False, highlight=False)
        for name, interval in report.over[policy].items():
            console.print(f"{policy} over {name}: {interval}", markup=False, highlight=False)


def _strategies(report: EvaluationReport, title: str) -> BandedTable:
    overall, seen = report.overall, report.seen
    shown = BandedTable(title=title)
    shown.add_column(f"{overall.num_prompts} {'prompts' if seen is None else 'unseen prompts'}")
    names = ["speed-up (95%)", "of oracle", "regret ms", "fastest", "within 2%", "slowest task"]
    if seen is not None:  # next to the speed-up on unseen prompts
        names.insert(1, f"on {seen.num_prompts} seen in training")
    for name in names:
        shown.add_column(name, justify="right")

    def cells(figures: Figures, on_seen: Figures | None) -> list[str]:
        first, *others = _cells(figures)
        return [first, *([] if on_seen is None else [_interval(on_seen.speedup)]), *others]

    for name, figures in overall.arms.items():
        shown.add_row(name, *cells(figures, None if seen is None else seen.arms[name]), "")
    shown.add_section()
    for name, figures in overall.strategies.items():
        slowest = report.slowest[name]
        shown.add_row(
            _shown(name, report),
            *cells(figures, None if seen is None else seen.strategies[name]),
            f"{slowest.task} {_interval(slowest.speedup)}".strip(),
            style="bold green" if name in report.policies else "",
        )
    return shown


def _shown(policy: str, report: EvaluationReport) -> str:
    """Return a policy's name, with the range over its trainings."""
    by_seed = report.by_seed.get(policy, ())
    if len(by_seed) < 2:
        return policy
    return f"{policy}, {len(by_seed)} seeds {min(by_seed):.2f} to {max(by_seed):.2f}"


def _cells(figures: Figures) -> list[str]:
    return [
        _interval(figures.speedup),
        f"{figures.of_oracle:.1%}",
        f"{1e3 * figures.regret_seconds.value:.1f}",
        "" if figures.accuracy is None else f"{figures.accuracy:.0%}",
        "" if figures.near is None else f"{figures.near:.0%}",
    ]


def _interval(figure: Interval) -> str:
    return f"{figure.value:.2f} ({figure.low:.2f}-{figure.high:.2f})"


def _by_task(report: EvaluationReport) -> BandedTable:
    shown = BandedTable(title=f"speed-up over {NONE} by task")
    shown.add_column("prompts")
    for task, part in report.by_domain.items():
        shown.add_column(f"{part.num_prompts} {task}", justify="right")
    for name in report.overall.strategies:
        speeds = [part.strategies[name].speedup.value for part in report.by_domain.values()]
        style = "bold green" if name in report.policies else ""
        shown.add_row(name, *(f"{speed:.2f}" for speed in speeds), style=style)
    return shown


def _sections(sections: Sequence[Section]) -> BandedTable:
    names = list(dict.fromkeys(n for s in sections for n in s.report.overall.strategies))
    last = [name for name in (ORACLE, *CEILINGS) if name in names]
    names = [*(name for name in names if name not in last), *last]
    some_seen = any(section.report.seen is not None for section in sections)
    policies = {policy for section in sections for policy in section.report.policies}
    shown = BandedTable(title=f"speed-up over {NONE} by section")
    shown.add_column("section")
    shown.add_column("unseen" if some_seen else "prompts", justify="right")
    if some_seen:
        shown.add_column("seen", justify="right")
    for name in names:
        shown.add_column(name, justify="right", style="bold green" if name in policies else "")
    for section in sections:
        overall, exposure = section.report.overall, section.report.exposure
        counts = [str(overall.num_prompts), *([str(exposure.seen)] if some_seen else [])]
        cells = (_speed(overall.strategies, name, name in policies) for name in names)
        shown.add_row(section.title, *counts, *cells)
    return shown


def _speed(strategies: Mapping[str, Figures], name: str, with_interval: bool) -> str:
    if name not in strategies:
        return ""
    speedup = strategies[name].speedup
    return _interval(speedup) if with_interval else f"{speedup.value:.2f}"


def _shares(chosen: Chosen) -> str:
    """Return text such as `math 40%, code 35%; draft lengths 3: 60%, own: 40%`."""
    lengths = ", ".join(f"{name}: {share:.0%}" for name, share in _most(chosen.lengths))
    drafters = ", ".join(f"{name} {share:.0%}" for name, share in _most(chosen.drafters))
    return f"{drafters}; draft lengths {lengths}"


def _most(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return [(name, share) for name, share in ordered if share > 0][:_MOST_NAMED]
