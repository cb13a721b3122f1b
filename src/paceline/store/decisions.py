"""The decision log: one JSON line per request with the arm it got, why, and how it went.

The line is written when the request ends, and read by learning. One write appends it, so a killed
process leaves at most one torn line at a file's end. Nothing waits for the disk, so a power cut may
cost the last seconds. Text is never written, token ids only where the configuration asks for them.
Features are a policy's view of the prompt: less than its text, but not nothing. Knows no policy and no
engine.
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
    """The models that made the decisions of one file.

    `drafters` and `encoders` map names to identity lines; the drafters include `none`. The features of
    a decision are those of the encoders, concatenated.
    """

    target: str
    tokenizer: str
    drafters: dict[str, str]
    encoders: dict[str, str]
    tokens: LoggedTokens


@dataclass(frozen=True, slots=True, eq=False)
class LoggedDecision:
    """One served request.

    `switches` are pairs (tokens emitted before, arm used from there on). `features` and
    `rows_in_flight` are the policy's inputs; None where no policy was asked.
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

    def why_no_text(self, target: str, tokenizer: str, context: int) -> str | None:
        """Return the reason why this is no whole text of a target, as words after a number of requests.

        target: its fingerprint; tokenizer: its hash; context: positions that the prompt must not fill.
        """
        if self.header.target != target:
            return "were served by another target"
        if self.header.tokenizer != tokenizer:
            return "were served with another tokenizer"
        if self.prompt_tokens is None or not self.output_tokens:
            return "have no token ids (log.tokens: ids keeps them)"
        if self.finish_reason not in ("stop", "length"):
            return "did not finish"
        if self.num_prompt >= context:
            return "fill the context with the prompt"
        return None


class LoadedDecisions(NamedTuple):
    """Decisions in the order of writing, and a note on each part that could not be read."""

    decisions: list[LoggedDecision]
    notes: list[str]


class DecisionLog:
    """A writer of decisions. A failing disk loses lines, which are counted, and never a request."""

    def __init__(
        self, folder: Path, header: LogHeader, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        """Open the folder; continue its newest file if the same models wrote it.

        Raises ConfigError if the folder cannot be written.
        """
        self.folder = Path(folder)
        self.num_lost = 0
        self._tokens = header.tokens
        self._head = _encode_line({"kind": _KIND, "schema": SCHEMA_VERSION, **asdict(header)})
        self._max_bytes = max_file_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self._find_resumable()
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
        row = _to_row(request, completion, features, rows_in_flight)
        if self._tokens == "ids":
            row["prompt_tokens"] = list(request.prompt_tokens)
            row["output_tokens"] = completion.token_ids
        try:
            self._append(_encode_line(row))
        except OSError as error:
            self.num_lost += 1
            if self.num_lost == 1:
                warnings.warn(
                    f"{self.folder}: decisions are lost ({error}): request '{request.id}' and those "
                    "after it are not logged until this folder can be written again; requests "
                    "continue. Free space, restore the folder and its permissions, or change "
                    "log.folder",
                    stacklevel=2,
                )

    def _append(self, data: bytes) -> None:
        if self._path is not None:
            try:
                is_full = self._path.stat().st_size + len(data) > self._max_bytes
            except FileNotFoundError:  # someone deleted the file
                is_full = True
            if is_full:
                self._path = None
        if self._path is None:
            self._path = self._create_file()
        # opened for each line: a few microseconds, and nothing to close, flush or inherit
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(handle, data) < len(data):
                self._path = None  # the next line must not continue half a line
                raise OSError("the disk took only a part of a line")
        finally:
            os.close(handle)

    def _find_resumable(self) -> Path | None:
        """Return the newest file if it has the same header and ends with a whole line."""
        paths = _log_files(self.folder)
        if not paths or paths[-1].stat().st_size < len(self._head):
            return None
        with paths[-1].open("rb") as file:
            has_same_head = file.read(len(self._head)) == self._head
            file.seek(-1, os.SEEK_END)
            return paths[-1] if has_same_head and file.read(1) == b"\n" else None

    def _create_file(self) -> Path:
        numbers = (int(path.stem.rpartition("-")[2]) for path in _log_files(self.folder))
        number = 1 + max(numbers, default=0)
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


def _to_row(
    request: Request,
    completion: Completion,
    features: np.ndarray | None,
    rows_in_flight: int | None,
) -> dict[str, Any]:
    """Return everything but tokens, which are only counted here."""
    decision = completion.decision
    encoded = None
    if features is not None:
        encoded = base64.b64encode(features.astype("<f4").tobytes()).decode()
    return {
        "time": round(time.time(), 3),
        "request_id": request.id,
        "policy": decision.policy,
        "arm": decision.arm,
        "propensity": decision.propensity,
        "scores": decision.scores,
        "features": encoded,
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


def _encode_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _log_files(folder: Path) -> list[Path]:
    paths = folder.glob(_PATTERN)
    return sorted(path for path in paths if path.stem.rpartition("-")[2].isdigit())


# --- reading --------------------------------------------------------------------------------------


def read_decisions(folder: Path | str) -> LoadedDecisions:
    """Return all decisions logged in a folder; lines that cannot be read are left out and noted.

    Raises StoreError if the folder holds no decisions, or decisions of another version.
    """
    paths = _log_files(Path(folder))
    if not paths:
        raise StoreError(f"{folder}: no decisions were logged here; set log.folder and serve")
    notes: list[str] = []
    decisions = [decision for path in paths for decision in _read_file(path, notes)]
    return LoadedDecisions(decisions, notes)


def _read_file(path: Path, notes: list[str]) -> Iterator[LoggedDecision]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error
    if len(lines) == 1:
        notes.append(f"{path}: left out, it ends within its first line")
        return
    header = _decode_header(path, lines[0])
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        try:
            yield _decode_decision(header, json.loads(line))
        except (ValueError, KeyError, TypeError):
            state = "torn" if number == len(lines) else "damaged"
            notes.append(f"{path}:{number}: a {state} line was left out")


def _decode_header(path: Path, line: bytes) -> LogHeader:
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


def _decode_decision(header: LogHeader, raw: dict[str, Any]) -> LoggedDecision:
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
