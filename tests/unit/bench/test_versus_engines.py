"""The facts and the ratios of benchmarks/versus_engines.py, on calls made up by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
OPTIONS = {"threads": 2}


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module("engines_facts", monkeypatch)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    return _module("engines_report", monkeypatch)


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for module in ("engines_facts", "engines_report", "peers", "peers.catalog", "peers.worker"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


def calls_of(facts: Any, peer: str, mode: str, seconds: float, answer: list[int]) -> list[Any]:
    """Return two prompts in three turns; in the last turn the machine was twice as slow."""
    return [
        facts.Call("decode", "zoo bfloat16, 1 row", peer, mode, turn, prompt, spent, 4, outputs)
        for prompt, outputs in (("a", [answer]), ("b", [answer]))
        for turn, spent in enumerate((seconds, seconds, 2 * seconds))
    ]


def test_a_killed_run_continues_after_its_last_whole_line(facts: Any, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    written = facts.Facts(path, OPTIONS, resume=False)
    for call in calls_of(facts, "vLLM", "plain", 1.0, [1, 2, 3, 4]):
        written.add(call)
    path.write_text(path.read_text()[:-20])
    resumed = facts.Facts(path, OPTIONS, resume=True)
    assert resumed.calls == written.calls[:-1]
    assert resumed.has(written.calls[0].key)
    assert not resumed.has(written.calls[-1].key)
    resumed.add(written.calls[-1])
    assert facts.Facts(path, OPTIONS, resume=True).calls == written.calls


def test_calls_with_other_options_do_not_mix(facts: Any, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    facts.Facts(path, OPTIONS, resume=False)
    with pytest.raises(ValueError, match="was made with"):
        facts.Facts(path, {"threads": 1}, resume=True)


def test_a_slow_turn_that_slows_all_leaves_the_ratio(facts: Any, report: Any) -> None:
    calls = [
        *calls_of(facts, "paceline", "none", 0.5, [1, 2, 3, 4]),
        *calls_of(facts, "llama.cpp native", "plain", 1.0, [1, 2, 9, 4]),
        facts.Call("read", "zoo, read", "torch", "sum 0", 0, "", 1.0, 100),
    ]
    tables = report.summarise(calls, {"zoo bfloat16": 10.0})
    ours, theirs = tables["methods"]
    assert ours["tokens_per_second"] == 8.0
    assert ours["over_yardstick"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert ours["share_of_bandwidth"] == pytest.approx(0.8)
    assert (theirs["equal_texts"], theirs["equal_tokens"], theirs["reference_tokens"]) == (0, 4, 8)


def test_a_method_that_stopped_halfway_is_in_no_table(facts: Any, report: Any) -> None:
    whole = calls_of(facts, "paceline", "none", 0.5, [1, 2, 3, 4])
    part = calls_of(facts, "vLLM", "plain", 0.5, [1, 2, 3, 4])[:-1]
    assert [s.peer for s in report.series_of([*part, *whole])] == ["paceline"]


def test_a_peer_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = _module("peers.worker", monkeypatch)
    command = [sys.executable, "-c", "import sys; sys.exit('the weights are missing')"]
    with pytest.raises(worker.PeerError, match=r"^the weights are missing$"):
        worker.Worker(command, tmp_path / "log", threads=1)


def test_what_an_engine_prints_is_not_taken_for_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = _module("peers.worker", monkeypatch)
    script = tmp_path / "engine.py"
    script.write_text(
        "from line_protocol import serve\n"
        "def decode(request):\n"
        "    print('decoding')\n"
        "    return {'tokens': request['ids']}\n"
        "serve(lambda: print('loading') or decode)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS / "peers"))
    peer = worker.Worker([sys.executable, str(script)], tmp_path / "log", threads=1)
    answer = peer.ask(ids=[[1, 2]])
    peer.stop()
    assert answer["tokens"] == [[1, 2]]
    assert 0.0 <= answer["seconds"] < 60.0
