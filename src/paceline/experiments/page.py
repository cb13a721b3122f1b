"""The experiments' page, assembled from the reports of the runs, so that no figure is typed by hand.

The text between the two marks of the page is replaced; the rest stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from paceline.experiments.catalog import ALIGNMENT_OUT, EXPERIMENTS, OUT
from paceline.experiments.direct_alignment.page import write_page
from paceline.experiments.direct_alignment.plan import find_budget
from paceline.experiments.marked_pages import replace_between

if TYPE_CHECKING:
    from paceline.experiments.findings import Experiment

BEGIN: Final = "<!-- found: `paceline experiment --collect-docs` writes what stands here -->"
END: Final = "<!-- end of what was found -->"
_OURS: Final = "none; the question is our own"


def collect_docs(out: Path | str = OUT) -> Path:
    """Write the reports of a folder into the page next to it, FOLDER.md, and return the page.

    Raises ConfigError if the page is missing or lacks the marks.
    """
    folder = Path(out)
    page = folder.with_name(f"{folder.name}.md")
    reports = {name: folder / f"{name}.md" for name in EXPERIMENTS}
    found = {n: r.read_text(encoding="utf-8") if r.is_file() else "" for n, r in reports.items()}
    parts = [_overview(found)]
    parts += [
        _section(EXPERIMENTS[name], text, folder.name) for name, text in found.items() if text
    ]
    replace_between(page, BEGIN, END, "\n".join(parts))
    return page


def collect_alignment(out: Path | str = ALIGNMENT_OUT, budget: str = "small") -> Path:
    """Write the page of `direct-alignment` again from a folder of its results, and return the page.

    Raises ConfigError if results of the budget are missing.
    """
    _, files = write_page(Path(out), find_budget(budget))
    return files[0]


def _overview(found: dict[str, str]) -> str:
    lines = ["| experiment | the paper's claim | result |", "|---|---|---|"]
    for name, text in found.items():
        experiment = EXPERIMENTS[name]
        shown = f"[{name}](#{_anchor(experiment.title)})" if text else name
        remarks = _remarks(text)
        first = remarks[0].removeprefix("- ") if remarks else "not run yet"
        lines.append(f"| {shown} | {experiment.claim or _OURS} | {first} |")
    return "\n".join(lines) + "\n"


def _section(experiment: Experiment, text: str, folder: str) -> str:
    """Return an experiment's question, circumstances, first table, remarks and figure, with links."""
    head, *tables = text.split("\n## ")
    _, _, preamble = head.partition("\n")  # claim and circumstances
    table = "\n".join(line for line in tables[0].split("\n") if line and not line.startswith("- "))
    title, _, body = table.partition("\n")
    explanation, _, rows = body.partition("\n")
    rows = "\n".join(line for line in rows.split("\n") if line.startswith("|"))
    more = f"{len(tables)} tables" if len(tables) > 1 else "The table"
    links = f"{more}: [{experiment.name}.md]({folder}/{experiment.name}.md); everything: "
    return "\n".join(
        [
            f"## {experiment.title}\n",
            preamble.strip() + "\n",
            *_remarks(text),
            "",
            f"![{experiment.title}]({folder}/{experiment.name}.png)\n",
            f"**{title}.** {explanation}\n",
            rows + "\n",
            f"{links}[{experiment.name}.json]({folder}/{experiment.name}.json).\n",
        ]
    )


def _remarks(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith("- ")]


def _anchor(title: str) -> str:
    """Return GitHub's anchor of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
