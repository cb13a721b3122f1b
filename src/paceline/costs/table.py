"""The cost table: measured seconds of every piece of work, read, saved and interpolated.

This module knows no model and no clock. The work, by (subject, operation):

    target, prefill   tokens = prompt length, of a request of one token, the host's part included
    target, forward   tokens = 1 + drafted by all rows together; unembedding and judging included
    <arm>, start      tokens = prompt length: the drafter's own prefill
    <arm>, propose    tokens = drafted by each row; with what it adds to the forward after it
    engine, round     host seconds per round that are not in the lines above, tokens = 0

`context` is the number of tokens cached before the work, `rows` the number of requests that share it;
`seconds` are those of all rows together. A forward of R rows packs R - 1 + tokens. Arms have the names
of their drafters in the configuration; `none` has no cost of its own.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, overload

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from paceline.config import explain
from paceline.contracts import NONE
from paceline.errors import ArtefactError
from paceline.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

FORMAT_VERSION: Final = 3
TARGET: Final = "target"
ENGINE: Final = "engine"
PREFILL: Final = "prefill"
FORWARD: Final = "forward"
START: Final = "start"
PROPOSE: Final = "propose"
ROUND: Final = "round"
_AGAIN: Final = "run `paceline profile`"
_INTERRUPTED: Final = 2.0  # work that takes this many times as long as more of it was interrupted
_OF_EVERY_ARM: Final = (START, PROPOSE)
_OF_THE_ENGINE: Final = ((TARGET, PREFILL), (TARGET, FORWARD), (ENGINE, ROUND))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured cell; the module's docstring defines the fields."""

    subject: str
    operation: str
    tokens: int
    context: int
    rows: int
    seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class CostTable:
    """Measured seconds and their circumstances.

    `fingerprint` has the machine, the target and the drafters, one comparable line per entry; arm X is
    under "arm X", and the forward that runs model Y under "forward of Y". Raises ArtefactError for a
    cell that occurs twice.
    """

    def __init__(self, fingerprint: Mapping[str, str], measurements: Iterable[Measurement]) -> None:
        self.fingerprint = dict(fingerprint)
        self.measurements = tuple(measurements)
        cells: dict[tuple[str, str], dict[int, dict[tuple[int, int], float]]] = {}
        for m in self.measurements:
            cell = cells.setdefault((m.subject, m.operation), {}).setdefault(m.rows, {})
            if (m.context, m.tokens) in cell:
                raise ArtefactError(
                    f"cost table: {m.subject} {m.operation} of {m.tokens} tokens at context "
                    f"{m.context} is there twice; {_AGAIN} again"
                )
            cell[m.context, m.tokens] = m.seconds
        self._surfaces = {
            key: {rows: _Surface(cell) for rows, cell in sorted(by_rows.items())}
            for key, by_rows in cells.items()
        }

    @overload
    def seconds(
        self, subject: str, operation: str, tokens: int, context: int = 0, rows: int = 1
    ) -> float: ...
    @overload
    def seconds(
        self,
        subject: str,
        operation: str,
        tokens: NDArray[Any],
        context: NDArray[Any] | int = 0,
        rows: int = 1,
    ) -> NDArray[np.float64]: ...
    def seconds(
        self,
        subject: str,
        operation: str,
        tokens: int | NDArray[Any],
        context: int | NDArray[Any] = 0,
        rows: int = 1,
    ) -> float | NDArray[np.float64]:
        """Return the seconds of work; arrays of tokens and contexts are broadcast.

        Prices are linear between measured tokens, contexts and rows. Beyond the grid its last segment is
        extended, but never below the smallest measured value. Work that was measured for a single
        number of rows is priced per row. Raises ArtefactError for work that was not measured.
        """
        by_rows = self._surfaces.get((subject, operation))
        if by_rows is None:
            raise ArtefactError(f"cost table: no '{operation}' of '{subject}' in it; {_AGAIN}")
        priced = _at_rows(by_rows, tokens, context, rows)
        return priced if priced.ndim else float(priced)

    def grid(self, subject: str, operation: str) -> tuple[list[int], list[int]]:
        """Return (tokens, contexts) that were measured at any number of rows, ascending."""
        own = [m for m in self.measurements if (m.subject, m.operation) == (subject, operation)]
        return sorted({m.tokens for m in own}), sorted({m.context for m in own})

    def doubt(self) -> str | None:
        """Return the reason why the figures may be wrong, or None.

        Work that took clearly longer than more of the same work was interrupted by another process.
        """
        inversions = [
            (*worst, f"{subject} {operation}")
            for (subject, operation), by_rows in self._surfaces.items()
            for surface in by_rows.values()
            if (worst := surface.worst_inversion()) is not None and worst[0] > _INTERRUPTED
        ]
        if not inversions:
            return None
        factor, fewer, more, work = max(inversions)
        others = f", and {len(inversions) - 1} more like it" if len(inversions) > 1 else ""
        return (
            f"the machine was busy with something else meanwhile: {work} of {fewer} tokens took "
            f"{factor:.1f} times as long as of {more}{others}; {_AGAIN} again when it is not"
        )

    def check(
        self,
        arms: Iterable[str],
        identities: Mapping[str, str] | None = None,
        target: str | None = None,
        forwards: Mapping[str, str] | None = None,
    ) -> None:
        """Raise ArtefactError unless target, engine and these arms are priced.

        identities: arm -> its configured identity line, which must be the measured one. target: the
        fingerprint that must be the measured one. forwards: `target` or arm -> the forward that runs
        it, which must be the measured one.
        """
        measured_with = self.fingerprint.get("target", target)
        if target is not None and measured_with != target:
            raise ArtefactError(
                f"cost table: was measured with the target {measured_with}, it is now {target}; "
                f"{_AGAIN}"
            )
        wanted = [*_OF_THE_ENGINE]
        wanted += [(arm, operation) for arm in arms if arm != NONE for operation in _OF_EVERY_ARM]
        missing = list(dict.fromkeys(s for s, o in wanted if (s, o) not in self._surfaces))
        if missing:
            raise ArtefactError(f"cost table: {', '.join(missing)} not measured; {_AGAIN}")
        now = {arm: (f"arm {arm}", line) for arm, line in (identities or {}).items()}
        self._check_lines(now)
        self._check_lines({n: (f"forward of {n}", line) for n, line in (forwards or {}).items()})

    def _check_lines(self, lines: Mapping[str, tuple[str, str]]) -> None:
        """Raise ArtefactError unless the lines (entry, present line) by name are those measured."""
        for name, (entry, line) in lines.items():
            measured = self.fingerprint.get(entry, line)
            if measured != line:
                raise ArtefactError(
                    f"cost table: '{name}' was measured as ({measured}), it is now ({line}); "
                    f"{_AGAIN}"
                )

    def hash(self) -> str:
        """Return a short hash of circumstances and figures."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()[:16]

    def save(self, path: Path | str) -> None:
        """Write the table as JSON, atomically. Raises ArtefactError if the file cannot be written."""
        try:
            write_atomically(Path(path), self._to_json().encode())
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be written ({error})") from error

    def _to_json(self) -> str:
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "measurements": [asdict(m) for m in self.measurements],
            },
            indent=1,
        )

    @classmethod
    def load(cls, path: Path | str) -> CostTable:
        """Read a saved table. Raises ArtefactError if it is missing, damaged or of another format."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtefactError(f"{path}: no cost table here; {_AGAIN}") from error
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path}: cannot be read ({error}); {_AGAIN} again") from error
        if not isinstance(raw, dict):
            raise ArtefactError(f"{path}: not a cost table; {_AGAIN} again")
        if raw.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(
                f"{path}: cost table of format {raw.get('format_version')}, this version of "
                f"paceline reads {FORMAT_VERSION}; {_AGAIN} again"
            )
        try:
            file = _CostFile.model_validate(raw)
        except ValidationError as error:
            reason = explain(_CostFile, error)
            raise ArtefactError(f"{path}: damaged cost table ({reason}); {_AGAIN} again") from error
        return cls(file.fingerprint, file.measurements)


class _CostFile(BaseModel):
    """The JSON file of a cost table, but for its format version."""

    fingerprint: dict[str, str]
    measurements: list[Measurement]


def _at_rows(
    by_rows: Mapping[int, _Surface], tokens: ArrayLike, context: ArrayLike, rows: int
) -> NDArray[np.float64]:
    """Return the seconds for any number of rows, from the surfaces of the measured ones, ascending."""
    if rows in by_rows:
        return by_rows[rows].seconds(tokens, context)
    measured = list(by_rows)
    if len(measured) == 1:
        return by_rows[measured[0]].seconds(tokens, context) * (rows / measured[0])
    upper = min(bisect(measured, rows), len(measured) - 1) or 1
    few, many = measured[upper - 1], measured[upper]
    low = by_rows[few].seconds(tokens, context)
    high = by_rows[many].seconds(tokens, context)
    weight = (rows - few) / (many - few)
    return np.maximum((1.0 - weight) * low + weight * high, np.minimum(low, high))


class _Surface:
    """Seconds over tokens and context: a curve over tokens for each measured context."""

    def __init__(self, cells: Mapping[tuple[int, int], float]) -> None:
        curves: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for (context, tokens), seconds in sorted(cells.items()):
            curves[context].append((tokens, seconds))
        self._contexts = np.array(list(curves), dtype=np.float64)  # [C]
        self._curves = [_columns(points) for points in curves.values()]
        self._least = min(cells.values())

    def worst_inversion(self) -> tuple[float, int, int] | None:
        """Return (factor, fewer, more) where `fewer` tokens took longest against `more` tokens.

        Both are at the same context. None without such a pair.
        """
        pairs = [
            (float(ys[i] / ys[j]), int(xs[i]), int(xs[j]))
            for xs, ys in self._curves
            for i, j in combinations(range(len(xs)), 2)
            if ys[j] > 0
        ]
        return max(pairs, default=None)

    def seconds(self, tokens: ArrayLike, context: ArrayLike) -> NDArray[np.float64]:
        tokens, context = np.broadcast_arrays(
            np.asarray(tokens, dtype=np.float64), np.asarray(context, dtype=np.float64)
        )
        # [C, ...]: each measured context has a curve with tokens of its own
        at_contexts = np.stack([_along(xs, ys, tokens) for xs, ys in self._curves])
        return np.maximum(_along(self._contexts, at_contexts, context), self._least)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[NDArray[Any], NDArray[Any]]:
    xs, ys = zip(*points, strict=True)
    return np.array(xs, dtype=np.float64), np.array(ys, dtype=np.float64)


def _along(xs: NDArray[Any], ys: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float64]:
    """Interpolate xs [n], ys [n] or [n, ...] at x [...] linearly, also beyond the ends."""
    if len(xs) == 1:
        return np.broadcast_to(ys[0], x.shape).astype(np.float64)
    left = np.clip(np.searchsorted(xs, x, side="right") - 1, 0, len(xs) - 2)
    weight = (x - xs[left]) / (xs[left + 1] - xs[left])
    if ys.ndim == 1:
        low, high = ys[left], ys[left + 1]
    else:
        low = np.take_along_axis(ys, left[None], axis=0)[0]
        high = np.take_along_axis(ys, left[None] + 1, axis=0)[0]
    # this form returns the grid's own values exactly
    result: NDArray[np.float64] = (1.0 - weight) * low + weight * high
    return result
