"""The decision log: decisions are read back, survive a kill, and have token ids only on request."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

from paceline.contracts import (
    Completion,
    Decision,
    LogitRules,
    Request,
    RoundStats,
    SamplingParams,
    Seconds,
)
from paceline.errors import ConfigError, StoreError
from paceline.store import DecisionLog, LogHeader, read_decisions

if TYPE_CHECKING:
    from pathlib import Path

OFF = LogHeader(
    "target-1", "tokens-1", {"none": "kind=none", "math": "kind=x"}, {"words": "v=1"}, "off"
)
IDS = replace(OFF, tokens="ids")
PROMPT = (48611, 48612, 48613)
OUTPUT = [39101, 39102]
TEXT = "the secret answer"
FEATURES = np.array([1.5, -0.25, np.float32(0.1)], dtype=np.float32)


def request(**changes: Any) -> Request:
    sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=3, method="residual")
    return replace(Request("r1", PROMPT, 40, sampling, frozenset(), (TEXT,)), **changes)


def completion(**changes: Any) -> Completion:
    done = Completion(
        request_id="r1",
        token_ids=list(OUTPUT),
        text=TEXT,
        finish_reason="length",
        drafter="math",
        decision=Decision("math", 0.9, {"none": 0.1, "math": 0.9}, "learned:1"),
        rounds=[RoundStats(4, 2), RoundStats(3, 0)],
        seconds=Seconds(prefill=0.5, choose=0.25),
        seconds_total=1.5,
        num_prompt_tokens=3,
        seed=3,
        error=TEXT,
        logprobs=[-0.5, -0.25],
        switches=[(7, "none")],
    )
    return replace(done, **changes)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, IDS)
    log.write(request(), completion(), FEATURES, 2)
    log.write(request(id="r2", rules=LogitRules()), completion(), None, None)
    (first, second), notes = read_decisions(tmp_path)

    assert notes == []
    assert first.header == IDS
    assert (first.request_id, first.policy, first.arm) == ("r1", "learned:1", "math")
    assert (first.propensity, first.scores) == (0.9, {"none": 0.1, "math": 0.9})
    assert first.features is not None and first.features.tobytes() == FEATURES.tobytes()
    assert first.rows_in_flight == 2
    assert first.sampling == request().sampling
    assert (first.max_new_tokens, first.num_prompt, first.num_output) == (40, 3, 2)
    assert first.rounds.tolist() == [[4, 2], [3, 0]]
    assert first.switches == ((7, "none"),)
    assert first.seconds == Seconds(prefill=0.5, choose=0.25) and first.seconds_total == 1.5
    assert first.finish_reason == "length"
    assert (first.prompt_tokens, first.output_tokens) == (PROMPT, tuple(OUTPUT))
    assert not first.has_rules and second.has_rules
    assert second.request_id == "r2" and second.features is None and second.rows_in_flight is None
    assert first.time <= second.time


class _Untouchable(tuple[int, ...]):
    """Tokens that may be counted but not read."""

    def __iter__(self) -> NoReturn:
        raise AssertionError("a token was looked at")

    __getitem__ = __reversed__ = __contains__ = __iter__  # type: ignore[assignment]


def test_without_ids_no_token_is_looked_at_and_no_text_written(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, OFF)
    prompt, output = _Untouchable(PROMPT), _Untouchable(OUTPUT)
    log.write(request(prompt_tokens=prompt), completion(token_ids=output), FEATURES, 1)

    written = only_file(tmp_path).read_text()
    for token in (*PROMPT, *OUTPUT):
        assert str(token) not in written
    assert TEXT not in written and "secret" not in written
    line = json.loads(written.splitlines()[1])
    assert not {"prompt_tokens", "output_tokens", "text", "logprobs", "error"} & line.keys()
    (decision,), _ = read_decisions(tmp_path)
    assert (decision.num_prompt, decision.num_output) == (3, 2)
    assert decision.prompt_tokens is None and decision.output_tokens is None

    with pytest.raises(AssertionError, match="looked at"):
        DecisionLog(tmp_path, IDS).write(
            request(prompt_tokens=prompt), completion(), FEATURES, 1
        )  # the trap works
    DecisionLog(tmp_path / "ids", IDS).write(request(), completion(), FEATURES, 1)
    assert "48611,48612,48613" in only_file(tmp_path / "ids").read_text()
    assert "secret" not in only_file(tmp_path / "ids").read_text()


def test_a_torn_line_is_left_out_and_never_continued(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, OFF)
    for id in ("a", "b"):
        log.write(request(id=id), completion(), FEATURES, 1)
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])

    DecisionLog(tmp_path, OFF).write(request(id="c"), completion(), FEATURES, 1)
    decisions, notes = read_decisions(tmp_path)

    assert [d.request_id for d in decisions] == ["a", "c"]
    assert notes == [f"{path}:3: a torn line was left out"]


def test_a_damaged_line_costs_itself_only(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, OFF)
    for id in ("a", "b", "c"):
        log.write(request(id=id), completion(), FEATURES, 1)
    path = only_file(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\0" * 30
    path.write_bytes(b"\n".join(lines))

    decisions, notes = read_decisions(tmp_path)
    assert [d.request_id for d in decisions] == ["a", "c"]
    assert notes == [f"{path}:3: a damaged line was left out"]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_decisions as t
log = t.DecisionLog(Path(sys.argv[1]), t.OFF)
i = 0
while True:
    log.write(t.request(id=str(i)), t.completion(), t.FEATURES, 1)
    if i == 50:
        print("many", flush=True)
    i += 1
"""


def test_a_killed_writer_loses_nothing_that_was_written(tmp_path: Path) -> None:
    here = str(os.path.dirname(__file__))  # noqa: PTH120 - for the child's path
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), here], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "many\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()

    decisions, notes = read_decisions(tmp_path)
    assert len(decisions) > 50
    assert [d.request_id for d in decisions] == [str(i) for i in range(len(decisions))]
    assert all("torn" in note for note in notes) and len(notes) <= 1


def test_files_are_rotated_by_size_and_continued_when_made_with_the_same(tmp_path: Path) -> None:
    for id in range(10):  # ten processes, one after the other
        log = DecisionLog(tmp_path, OFF, max_file_bytes=3000)
        log.write(request(id=str(id)), completion(), FEATURES, 1)
    paths = sorted(tmp_path.iterdir())

    assert 2 <= len(paths) <= 5
    assert all(path.stat().st_size <= 3000 for path in paths)
    assert [d.request_id for d in read_decisions(tmp_path)[0]] == [str(i) for i in range(10)]

    other = replace(OFF, target="target-2")
    DecisionLog(tmp_path, other).write(request(id="10"), completion(), FEATURES, 1)
    decisions, _ = read_decisions(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(paths) + 1
    assert [d.header for d in decisions] == [OFF] * 10 + [other]


def test_two_writers_in_one_folder_lose_nothing(tmp_path: Path) -> None:
    logs = [DecisionLog(tmp_path, OFF, max_file_bytes=4000) for _ in range(2)]
    for i in range(30):
        logs[i % 2].write(request(id=str(i)), completion(), FEATURES, 1)

    decisions, notes = read_decisions(tmp_path)
    assert sorted(int(d.request_id) for d in decisions) == list(range(30)) and not notes


def test_a_failing_disk_costs_lines_and_no_request(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    log = DecisionLog(folder, OFF)
    log.write(request(id="a"), completion(), FEATURES, 1)
    saved = only_file(folder).read_bytes()
    only_file(folder).unlink()
    folder.rmdir()
    with pytest.warns(UserWarning, match="decisions are lost"):
        log.write(request(id="b"), completion(), FEATURES, 1)
    log.write(request(id="c"), completion(), FEATURES, 1)  # warned only once
    assert log.num_lost == 2

    folder.mkdir()
    (folder / "decisions-000007.jsonl").write_bytes(saved)
    log.write(request(id="d"), completion(), FEATURES, 1)
    assert [d.request_id for d in read_decisions(folder)[0]] == ["a", "d"]


def test_no_line_continues_half_a_line(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, OFF)
    log.write(request(id="a"), completion(), FEATURES, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (only_file(tmp_path).stat().st_size + 50, before[1]))
    try:
        with pytest.warns(UserWarning, match="a part of a line"):
            log.write(request(id="b"), completion(), FEATURES, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(request(id="c"), completion(), FEATURES, 1)

    decisions, notes = read_decisions(tmp_path)
    assert [d.request_id for d in decisions] == ["a", "c"]
    assert len(notes) == 1 and notes[0].endswith(":3: a torn line was left out")


def test_a_full_disk_gains_no_file_for_every_request(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, OFF)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.warns(UserWarning, match="request 'a' and those after it are not logged"):
            log.write(request(id="a"), completion(), FEATURES, 1)
        log.write(request(id="b"), completion(), FEATURES, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []

    log.write(request(id="c"), completion(), FEATURES, 1)
    decisions, notes = read_decisions(tmp_path)
    assert ([d.request_id for d in decisions], notes, log.num_lost) == (["c"], [], 2)


def test_nothing_is_created_before_the_first_decision(tmp_path: Path) -> None:
    DecisionLog(tmp_path, OFF)

    with pytest.raises(StoreError, match=r"no decisions were logged here; set log\.folder"):
        read_decisions(tmp_path)


def test_what_is_no_log_or_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decisions-000001.jsonl"
    for text in ('{"kind": "x"}\n', "[]\n", "text\n"):
        path.write_text(text)
        with pytest.raises(StoreError, match="not a decision log"):
            read_decisions(tmp_path)
    path.write_text('{"kind": "paceline decisions", "schema": 99, "more": 1}\n')
    with pytest.raises(StoreError, match="schema 99, this version of paceline reads 1"):
        read_decisions(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"change log\.folder"):
        DecisionLog(tmp_path / "file" / "log", OFF)
