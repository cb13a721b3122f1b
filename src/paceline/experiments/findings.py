"""An experiment and its findings: tables, the panels of one figure, remarks. Knows no file format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.experiments.claims import Claim
    from paceline.experiments.workbench import Workbench

Value = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column's head, and how its numbers are written; texts stay as they are, None is a dash."""

    name: str
    form: str = "{}"

    def text(self, value: Value) -> str:
        if value is None:
            return "–"
        return value if isinstance(value, str) else self.form.format(value)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns; what their words mean stands above."""

    title: str
    explanation: str
    columns: list[Column]
    rows: list[list[Value]]

    def texts(self) -> list[list[str]]:
        """The rows as they are written."""
        return [
            [column.text(value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True, slots=True)
class Series:
    """One line or one colour of bars; low and high are the ends of intervals, where there are any."""

    label: str
    x: list[float] | list[str]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the pictures beside each other. baseline: a dashed level, such as 1 for plain decoding."""

    title: str
    y_label: str
    series: list[Series]
    kind: Literal["lines", "bars"] = "lines"
    x_label: str = ""
    baseline: float | None = None
    log_x: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """The first table is the one that answers the question.

    settings: what a reader must know of how it was found; facts: what else belongs into the JSON.
    """

    tables: list[Table]
    panels: list[Panel]
    settings: dict[str, str | int]
    remarks: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Experiment:
    """A question, the paper's answer (None: the paper does not ask), and the function that answers."""

    name: str
    title: str
    claim: Claim | None
    run: Callable[[Workbench], Findings]
