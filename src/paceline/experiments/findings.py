"""An experiment, a paper's claim and the findings: tables, panels of one figure, remarks.

Knows no file format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from paceline.config import Section

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.experiments.workbench import Workbench

Value = str | int | float | None
SPEED: Final = "{:.2f}x"
SHARE: Final = "{:.0%}"
Source = Literal["abstract", "code", "notes", "summary"]
SOURCES: Final[dict[Source, str]] = {
    "abstract": "the paper's abstract",
    "code": "the authors' released code",
    "notes": "third parties' notes that cite the paper's sections; not confirmed by us",
    "summary": "a third party's published summary; not confirmed by us",
}


class Claim(Section):
    """One claim of a paper; `source` is where it was read."""

    text: str
    source: Source

    def __str__(self) -> str:
        return f"{self.text} (from {SOURCES[self.source]})"


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column and the format of its numbers; texts stay as they are, None is a dash."""

    name: str
    form: str = "{}"

    def text(self, value: Value) -> str:
        """Return a value as it is shown."""
        if value is None:
            return "–"
        return value if isinstance(value, str) else self.form.format(value)


def columns(*heads: str | tuple[str, str]) -> list[Column]:
    """Return columns: each a head, or a head and the format of its numbers."""
    return [Column(head) if isinstance(head, str) else Column(*head) for head in heads]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns; the explanation defines their words."""

    title: str
    explanation: str
    columns: list[Column]
    rows: list[list[Value]]

    def texts(self) -> list[list[str]]:
        """Return the rows as they are shown."""
        return [
            [column.text(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True, slots=True)
class Series:
    """One line or one colour of bars; low and high are the ends of the intervals, if there are any."""

    label: str
    x: list[float] | list[str]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of the figure. baseline: a dashed level, such as 1 for plain decoding."""

    title: str
    y_label: str
    series: list[Series]
    kind: Literal["lines", "bars"] = "lines"
    x_label: str = ""
    baseline: float | None = None
    log_x: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of an experiment; the first table answers the question.

    settings: the conditions that a reader must know; facts: further contents of the JSON file.
    """

    tables: list[Table]
    panels: list[Panel]
    settings: dict[str, str | int]
    remarks: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """The question of an experiment, and the paper's answer (None: the paper does not ask)."""

    name: str
    title: str
    claim: Claim | None


@dataclass(frozen=True, slots=True)
class Experiment(Question):
    """A question, and the function that answers it."""

    run: Callable[[Workbench], Findings]
