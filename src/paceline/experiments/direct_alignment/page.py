"""The page of the comparison, written from the lines of results alone, and its figure.

The text between the two marks of the page is replaced; the rest stays. A folder without a page gets one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paceline.errors import ConfigError
from paceline.experiments.direct_alignment.claims import claims, remarks
from paceline.experiments.direct_alignment.outcome import Outcome
from paceline.experiments.direct_alignment.panels import panels
from paceline.experiments.direct_alignment.plan import Plan
from paceline.experiments.direct_alignment.results import SHARED, Results, read_lines
from paceline.experiments.direct_alignment.tables import tables
from paceline.experiments.findings import Findings
from paceline.experiments.marked_pages import replace_between
from paceline.experiments.report import table_lines, write_figure
from paceline.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.experiments.direct_alignment.plan import Budget

NAME: Final = "direct-alignment"
TITLE: Final = "Losses and data for a drafter"
RESULTS: Final = "results.jsonl"
BEGIN: Final = "<!-- found: `paceline experiment direct-alignment` writes what stands here -->"
END: Final = "<!-- end of what was found -->"


def write_page(folder: Path, budget: Budget) -> tuple[Findings, list[Path]]:
    """Write the page next to a folder of results, FOLDER.md, and the figure in it; return their paths.

    Of several materials in the results those of the budget's last line are used. Raises ConfigError if
    the results lack a run of the budget, or if the page lacks the marks.
    """
    path = folder / RESULTS
    shared = [
        line
        for line in read_lines(path)
        if line["kind"] == SHARED and line["budget"] == budget.name
    ]
    if not shared:
        raise ConfigError(f"{path}: no results of the budget '{budget.name}'; run the experiment")
    outcome = Outcome(Plan(budget), Results(path, shared[-1]["materials"]))
    found = Findings(tables(outcome), panels(outcome), {}, remarks(outcome))
    figure = folder / f"{NAME}.png"
    page = folder.with_name(f"{folder.name}.md")
    lines = table_lines(claims(outcome))
    lines += [*(f"- {remark}" for remark in found.remarks), ""]
    lines += [
        f"![{TITLE}]({folder.name}/{figure.name})",
        "",
        _circumstances(outcome, folder.name),
        "",
    ]
    lines += [line for table in found.tables for line in table_lines(table)]
    if not page.exists():
        write_atomically(page, f"# {TITLE}\n\n{BEGIN}\n{END}\n".encode())
    replace_between(page, BEGIN, END, "\n".join(lines))
    write_figure(found.panels, TITLE, figure)
    return found, [page, figure, path]


def _circumstances(outcome: Outcome, folder: str) -> str:
    """Return a paragraph on the models, the texts and the machine."""
    shared, budget = outcome.shared, outcome.plan.budget
    runs = [line for line in outcome.results.lines if line["kind"] == "run" and "seconds" in line]
    where = shared["circumstances"]
    seconds = sum(line["seconds"] for line in runs)
    numbers = ", ".join(f"{task} {num:,}" for task, num in shared["num_answers"].items())
    settings = shared["settings"]
    return (
        f"Budget `{budget.name}`: {len(runs)} runs of {budget.tokens:,} tokens, "
        f"{seconds / 3600:.1f} hours of training in all. Target {shared['target']} "
        f"({shared['dtype']}); student of {shared['num_parameters']:,} parameters. Answers to "
        f"train on: {numbers}. Judged on {len(shared['judged_tasks'])} answers "
        f"({sum(shared['judged_tokens']):,} tokens) to prompts that take part in no training and "
        f"no choice. Batches of {settings['batch_tokens']:,} tokens, weight "
        f"{settings['prompt_weight']:g} on the prompt's tokens, the target's "
        f"{settings['teacher_top_k']} most probable tokens and the rest; weights of the best "
        "validation, saved in bfloat16. Predicted speed-ups use the prices of rounds on this "
        f"machine: {where['cpu']}, {where['threads']} threads, torch {where['torch']}, paceline "
        f"{where['paceline']}, commit {where['commit']}, {where['date']}. `{where['command']}`. "
        f"Every run has a line in [{RESULTS}]({folder}/{RESULTS})."
    )
