"""The decision log: what each request got, why, and how it went, one JSON line when it ends.

Written while serving, read by learning. A line is appended by one write when its request is over, so
a killed process leaves at most one torn line at a file's end; nothing waits for the disk, so a power
cut may cost the last seconds. No text is ever written, and token ids only where that was asked for.
Features are a policy's view of the prompt: less than its text, but not nothing. Knows no policy and
no engine.
"""

from __future__ import annotations

import base64
import json
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from paceline.contracts import SamplingParams, Seconds
from paceline.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.contracts import Completion, FinishReason, Request

SCHEMA_VERSION: Final = 1
MAX_FILE_BYTES: Final = 64 * 2**20
_KIND: Final = "paceline decisions"
_PATTERN: Final = "decisions-*.jsonl"

LoggedTokens = Literal["off", "ids"]


@dataclass(frozen=True, slots=True)
class LogHeader:
    """What the decisions of a file were made with. `drafters` and `encoders`: identity lines, `none`
    included; the features are the encoders', side by side.
    """

    target: str
    tokenizer: str
    drafters: dict[str, str]
    encoders: dict[str, str]
    tokens: LoggedTokens


@dataclass(frozen=True, slots=True, eq=False)
class LoggedDecision:
    """One request as it was served.

    `switches` are (tokens emitted before, arm from there on). `features` and `rows_in_flight` are
    what the policy saw; None where it was not asked.
    """

    header: LogHeader
    time: float  # seconds since 1970, when the request ended
    request_id: str
    policy: str
    arm: str
    propensity: float
    scores: dict[str, float]
    features: np.ndarray | None  # [F] float32
    rows_in_flight: int | None
    sampling: SamplingParams
    has_rules: bool  # whether logit rules changed the target's distribution
    max_new_tokens: int
    num_prompt: int
    num_output: int
    rounds: np.ndarray  # [R, 2] int64: drafted, accepted
    switches: tuple[tuple[int, str], ...]
    seconds: Seconds
    seconds_total: float
    finish_reason: FinishReason
    prompt_tokens: tuple[int, ...] | None
    output_tokens: tuple[int, ...] | None


class LoadedDecisions(NamedTuple):
    """Decisions in the order of writing, and a note on whatever could not be read."""

    decisions: list[LoggedDecision]
    notes: list[str]


class DecisionLog:
    """The writing end. A failing disk costs lines, which are counted, and never a request."""

    def __init__(
        self, folder: Path, header: LogHeader, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self.folder = Path(folder)
        self.num_lost = 0
        self._tokens = header.tokens
        self._head = _line({"kind": _KIND, "schema": SCHEMA_VERSION, **asdict(header)})
        self._max_bytes = max_file_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self._unfinished()
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: decisions cannot be logged here ({error}); change log.folder"
            ) from error

    def write(
        self,
        request: Request,
        completion: Completion,
        features: np.ndarray | None,
        rows_in_flight: int | None,
    ) -> None:
        """Append one line for a request that has ended."""
        row = _row(request, completion, features, rows_in_flight)
        if self._tokens == "ids":
            row["prompt_tokens"] = list(request.prompt_tokens)
            row["output_tokens"] = completion.token_ids
        try:
            self._append(_line(row))
        except OSError as error:
            self.num_lost += 1
            if self.num_lost == 1:
                warnings.warn(
                    f"{self.folder}: decisions are lost ({error}): nothing is logged of request "
                    f"'{request.id}' and of those that follow, until this folder can be written again; "
                    "requests go on. Make room, or restore the folder and its permissions; for another "
                    "one change log.folder",
                    stacklevel=2,
                )

    def _append(self, data: bytes) -> None:
        if self._path is not None:
            try:
                full = self._path.stat().st_size + len(data) > self._max_bytes
            except FileNotFoundError:  # cleared away by someone
                full = True
            if full:
                self._path = None
        if self._path is None:
            self._path = self._new_file()
        # opened for each line: a few microseconds, and nothing to close, flush or inherit
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(handle, data) < len(data):
                self._path = None  # what follows must not be glued to half a line
                raise OSError("the disk took a part of a line only")
        finally:
            os.close(handle)

    def _unfinished(self) -> Path | None:
        """The newest file, if what it holds was made with the same and ends with a whole line."""
        paths = _files(self.folder)
        if not paths or paths[-1].stat().st_size < len(self._head):
            return None
        with paths[-1].open("rb") as file:
            same = file.read(len(self._head)) == self._head
            file.seek(-1, os.SEEK_END)
            return paths[-1] if same and file.read(1) == b"\n" else None

    def _new_file(self) -> Path:
        paths = _files(self.folder)
        number = 1 + max((int(path.stem.rpartition("-")[2]) for path in paths), default=0)
        while True:
            path = self.folder / f"decisions-{number:06d}.jsonl"
            try:
                file = path.open("xb")
            except FileExistsError:  # another process was faster
                number += 1
                continue
            try:
                with file:
                    file.write(self._head)
            except OSError:
                path.unlink()  # else a full disk gets one empty file per request
                raise
            return path


def _row(
    request: Request,
    completion: Completion,
    features: np.ndarray | None,
    rows_in_flight: int | None,
) -> dict[str, Any]:
    """Everything but tokens. Of those only their number is looked at here."""
    decision = completion.decision
    return {
        "time": round(time.time(), 3),
        "request_id": request.id,
        "policy": decision.policy,
        "arm": decision.arm,
        "propensity": decision.propensity,
        "scores": decision.scores,
        "features": None if features is None else _encode(features),
        "rows_in_flight": rows_in_flight,
        "sampling": asdict(request.sampling),
        "has_rules": request.rules is not None,
        "max_new_tokens": request.max_new_tokens,
        "num_prompt": completion.num_prompt_tokens,
        "num_output": len(completion.token_ids),
        "rounds": [(r.drafted, r.accepted) for r in completion.rounds],
        "switches": completion.switches,
        "seconds": asdict(completion.seconds),
        "seconds_total": completion.seconds_total,
        "finish_reason": completion.finish_reason,
    }


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _encode(features: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(features, dtype="<f4").tobytes()).decode()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(_PATTERN) if path.stem.rpartition("-")[2].isdigit())


# --- reading --------------------------------------------------------------------------------------


def read_decisions(folder: Path | str) -> LoadedDecisions:
    """All decisions logged in a folder; a line that cannot be read is left out and noted.

    Raises StoreError if nothing was logged there, or by another version.
    """
    paths = _files(Path(folder))
    if not paths:
        raise StoreError(f"{folder}: no decisions were logged here; set log.folder and serve")
    loaded = LoadedDecisions([], [])
    for path in paths:
        for decision in _read_file(path, loaded.notes):
            loaded.decisions.append(decision)
    return loaded


def _read_file(path: Path, notes: list[str]) -> Iterator[LoggedDecision]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    if len(lines) == 1:
        notes.append(f"{path}: left out, it ends within its first line")
        return
    header = _header(path, lines[0])
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        try:
            yield _decision(header, json.loads(line))
        except (ValueError, KeyError, TypeError):
            torn = "torn" if number == len(lines) else "damaged"
            notes.append(f"{path}:{number}: a {torn} line was left out")


def _header(path: Path, line: bytes) -> LogHeader:
    try:
        raw = json.loads(line)
        if raw.pop("kind") != _KIND:
            raise KeyError("kind")
        schema = raw.pop("schema")
        if schema == SCHEMA_VERSION:
            return LogHeader(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: not a decision log ({error}); move it elsewhere") from error
    raise StoreError(
        f"{path}: schema {schema}, this version of paceline reads {SCHEMA_VERSION}; use the version "
        "that wrote it"
    )


def _decision(header: LogHeader, raw: dict[str, Any]) -> LoggedDecision:
    features = raw.pop("features")
    prompt, output = raw.pop("prompt_tokens", None), raw.pop("output_tokens", None)
    return LoggedDecision(
        header=header,
        features=None if features is None else np.frombuffer(base64.b64decode(features), "<f4"),
        sampling=SamplingParams(**raw.pop("sampling")),
        rounds=np.array(raw.pop("rounds"), dtype=np.int64).reshape(-1, 2),
        switches=tuple((int(at), str(arm)) for at, arm in raw.pop("switches")),
        seconds=Seconds(**raw.pop("seconds")),
        prompt_tokens=None if prompt is None else tuple(prompt),
        output_tokens=None if output is None else tuple(output),
        **raw,
    )
