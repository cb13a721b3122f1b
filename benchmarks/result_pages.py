"""The pages and figures that the benchmark programs share: tables, speeds by task, result files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

from paceline.bench.circumstances import circumstances, headline
from paceline.bench.timed import num_equal_outputs, select, tokens_per_second
from paceline.contracts import NONE
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from paceline.bench.timed import Timing
    from paceline.contracts import Completion


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Return the lines of a Markdown table. columns: heading -> template of a cell, for str.format."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (template.format(**row) for template in columns.values())
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def by_task(row: Mapping[str, Any], key: str) -> dict[str, str]:
    """Return a column of `table` per task. key: of a row's figures by task."""
    return {task: f"{{{key}[{task}]:.2f}}" for task in row[key]}


def describe_run(setting: str) -> dict[str, Any]:
    """Return the circumstances of this run, with its setting."""
    return {**circumstances(), "setting": setting}


def page(title: str, facts: Mapping[str, Any], *packages: str) -> list[str]:
    """Return the first lines of a page: title, circumstances, setting."""
    return [f"# {title}", "", f"{headline(facts, *packages)} {facts['setting']}", ""]


def save(out: Path, name: str, text: str, result: Mapping[str, Any]) -> None:
    """Write NAME.md and NAME.json, and print the page."""
    write_atomically(out / f"{name}.md", text.encode())
    write_atomically(out / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def speeds(timings: Sequence[Timing], method: str) -> dict[str, Any]:
    """Return a method's speed, its speed-up over `none` in all and by task, and its equal texts."""
    own = select(timings, method)

    def speed_up(domain: str | None) -> float:
        plain = select(timings, NONE, domain)
        return tokens_per_second(select(own, domain=domain)) / tokens_per_second(plain)

    domains = dict.fromkeys(timing.domain for timing in timings)
    return {
        "tokens_per_second": tokens_per_second(own),
        "over_none": speed_up(None),
        "over_none_by_task": {domain: speed_up(domain) for domain in domains},
        "equal_to_none": num_equal_outputs(timings, method, NONE),
        "prompts": len(own),
        "tokens": sum(len(timing.output_tokens) for timing in own),
    }


def count_drafts(completions: Iterable[Completion]) -> tuple[int, int, int]:
    """Return (rounds, drafted tokens, accepted tokens)."""
    rounds = [r for completion in completions for r in completion.rounds]
    return len(rounds), sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
