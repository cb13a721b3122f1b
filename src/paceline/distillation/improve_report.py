"""The result of a drafter's improvement, as a record and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from paceline.distillation.comparison import MeasureIntervals
from paceline.intervals import Interval


@dataclass(frozen=True, slots=True)
class ImproveReport:
    """The result of an improvement.

    out: the folder with the new weights, None if they were not adopted. kept: the folder with the
    weights before. counts: answers to train on (`training`), of them from prompt files (`data`), to
    validate on and held out; conversations of the log. left_out: reason -> number of logged requests.
    The intervals are of the held-out requests.
    """

    drafter: str
    num_draft_tokens: int
    out: Path | None
    kept: Path | None
    counts: dict[str, int]
    before: MeasureIntervals
    after: MeasureIntervals
    rise: MeasureIntervals
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_adopted(self) -> bool:
        """Whether the new weights replaced the old ones or were written to a folder of their own."""
        return self.out is not None

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> ImproveReport:
        """Return the report that `to_json` wrote."""
        raw = json.loads(text)
        for name in ("before", "after", "rise"):
            figures = {k: v and Interval(**v) for k, v in raw[name].items()}
            raw[name] = MeasureIntervals(**figures)
        for name in ("out", "kept"):
            raw[name] = raw[name] and Path(raw[name])
        return cls(**raw)
