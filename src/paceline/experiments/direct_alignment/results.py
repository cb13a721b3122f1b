"""The results of a comparison as JSON lines: one per finished run, which is never made again.

A line of kind `run` holds the run's configuration, its measures per task, and whether each position of
the judged answers matched, from which intervals are computed. Lines of other kinds hold what all runs
share. The file is replaced as a whole, so that a killed program leaves no part of a line.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.distillation.measures import AnswerMatches
from paceline.errors import ConfigError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.experiments.direct_alignment.plan import Run

Line = dict[str, Any]
RUN, SHARED = "run", "shared"


class Results:
    """The lines of one file that were made with the same materials."""

    def __init__(self, path: Path, materials: str) -> None:
        """materials: their `name`. Raises ConfigError if the file cannot be read."""
        self.path, self.materials = path, materials
        self._all = read_lines(path)

    @property
    def lines(self) -> list[Line]:
        """The lines of these materials."""
        return [line for line in self._all if line["materials"] == self.materials]

    def find(self, run: Run) -> Line | None:
        """Return the line of a run, or None if it is not finished."""
        wanted = run.model_dump(mode="json")
        return next((x for x in self.lines if x["kind"] == RUN and x["run"] == wanted), None)

    def of(self, run: Run) -> Line:
        """Return the line of a run. Raises ConfigError if it is not finished, or if it diverged."""
        found = self.find(run)
        if found is None:
            raise ConfigError(
                f"{self.path}: the run of {run.loss} with seed {run.seed} ({run.id}) is missing; run "
                "the experiment again, which continues"
            )
        if found.get("diverged"):
            raise ConfigError(
                f"{self.path}: the run of {run.loss} at rate {run.learning_rate:g} with seed "
                f"{run.seed} ({run.id}) diverged, so it has no measures"
            )
        return found

    def of_kind(self, kind: str) -> Line | None:
        """Return the line of a kind that has one line per materials, or None."""
        return next((line for line in self.lines if line["kind"] == kind), None)

    def add(self, kind: str, facts: Mapping[str, Any]) -> Line:
        """Append a line to the file."""
        line = {"kind": kind, "materials": self.materials, **facts}
        self._all = [*read_lines(self.path), line]  # with those of other materials
        text = "".join(
            json.dumps(own, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
            for own in self._all
        )
        write_atomically(self.path, text.encode())
        return line

    def matches(self, line: Line) -> AnswerMatches:
        """Return a run's matches at the judged answers; an answer's acceptance is at all positions."""
        shared = self.of_kind(SHARED)
        assert shared is not None  # the first line of these materials
        lengths = np.array(shared["judged_tokens"])
        match = unpack(line["match"], int(lengths.sum()))
        ends = np.cumsum(lengths)
        return AnswerMatches(
            match,
            np.concatenate([[0], ends]),
            tuple(shared["judged_tasks"]),
            np.repeat(np.array(line["accepted"]), lengths),
        )


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file, none if it is missing. Raises ConfigError if it cannot be read."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            line["kind"], line["materials"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}:{number}: not a line of results; restore the file, or delete it to run "
                "everything again"
            ) from error
        lines.append(line)
    return lines


def pack(matches: Sequence[np.ndarray]) -> str:
    """Return the bits of all answers, one after the other, as base64."""
    return base64.b64encode(np.packbits(np.concatenate(matches)).tobytes()).decode("ascii")


def unpack(text: str, count: int) -> np.ndarray:
    """Return the bits [count] that `pack` wrote."""
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)
