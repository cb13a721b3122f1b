"""The command line: the main job verb by verb, and every mistake as one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support import HANGS

from paceline.cli import main
from paceline.experiments.demo_prompts import load_written
from paceline.store.collection import load_collection

ZOO = Path(__file__).parents[2] / "zoo"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a configuration of the bundled models that writes into the test's own folder."""
    path = tmp_path / "paceline.yaml"
    raw = {
        "target": {"model": str(ZOO / "target"), "dtype": "float32"},
        "drafters": {
            "math": {
                "kind": "draft_model",
                "settings": {"model": str(ZOO / "draft-math"), "dtype": "float32"},
            },
            "lookup": {"kind": "prompt_lookup", "settings": {"num_draft_tokens": 6}},
        },
        "learning": {"max_epochs": 40},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records = [*load_written("math")[:16], *load_written("translation")[:16]]
    lines = [json.dumps({"id": r.id, "domain": r.domain, "prompt": r.prompt}) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Return the exit code of `paceline ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_main_job_runs_verb_by_verb(
    config: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    limit = ("--max-new-tokens", "24")
    assert run(monkeypatch, "doctor", "-c", config) == 0
    assert "paceline profile" in capsys.readouterr().out  # nothing is priced yet
    assert run(monkeypatch, "collect", prompts, "-c", config, *limit) == 0
    assert run(monkeypatch, "doctor", "-c", config) == 0
    capsys.readouterr()
    assert run(monkeypatch, "data", "-c", config) == 0
    shown = capsys.readouterr().out
    assert "greedy 32" in shown and "paceline profile" in shown
    assert run(monkeypatch, "profile", "-c", config) == 0
    capsys.readouterr()
    figure = config.parent / "data.png"
    assert run(monkeypatch, "data", "-c", config, "--json", "--plot", figure) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"]["all"]["num_rows"] == 32 and found["notes"] == []
    assert found["acceptance"]["math"]["math"]["match"] > 0.3
    assert sum(found["oracle"]["all"]["shares"].values()) == pytest.approx(1.0)
    assert figure.stat().st_size > 5000
    assert run(monkeypatch, "doctor", "-c", config) == 0
    assert "x none on 32 prompts" in capsys.readouterr().out
    assert run(monkeypatch, "learn", "-c", config) == 0
    assert "predicted speed-up" in capsys.readouterr().out
    assert run(monkeypatch, "evaluate", "-c", config, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    (section,) = report["sections"]
    overall = section["report"]["overall"]
    assert overall["arms"]["none"]["speedup"]["value"] == pytest.approx(1.0)
    assert overall["strategies"]["policy"]["regret"]["value"] >= 0.0
    assert "first line" in overall["strategies"]
    prompt = load_written("math")[20].prompt
    texts = {}
    for drafter in ("none", "auto", "math", "lookup"):
        arguments = ("generate", prompt, "-c", config, "-d", drafter, *limit, "--json")
        assert run(monkeypatch, *arguments) == 0
        completion = json.loads(capsys.readouterr().out)
        texts[drafter] = completion["text"]
        assert drafter in (completion["drafter"], "auto")
    assert len(set(texts.values())) == 1
    assert run(monkeypatch, "generate", prompt, "-c", config, *limit, "--stats") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == texts["none"].strip()
    assert "block efficiency" in shown.err

    # another machine's costs: the policy is priced with them
    costs = config.parent / "runs/costs.json"
    table = json.loads(costs.read_text())
    for measured in table["measurements"]:
        measured["seconds"] *= 2.0 if measured["subject"] == "target" else 1.0
    costs.write_text(json.dumps(table))
    assert run(monkeypatch, "evaluate", "-c", config, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["circumstances"]["cost table"] != report["circumstances"]["cost table"]

    # a policy is served by the encoders it was learned with, whatever the configuration says now
    raw = yaml.safe_load(config.read_text())
    chosen = {**raw, "selection": {"encoders": ["hashed_ngrams", "text_stats"]}}
    config.write_text(yaml.safe_dump(chosen))
    assert run(monkeypatch, "learn", "-c", config) == 0
    config.write_text(yaml.safe_dump(raw))
    path = config.parent / "runs/policy/policy.json"
    card = json.loads(path.read_text())
    assert list(card["encoders"]) == ["hashed_ngrams", "text_stats"]
    assert run(monkeypatch, "evaluate", "-c", config) == 0
    assert run(monkeypatch, "generate", prompt, "-c", config, *limit) == 0
    card["encoders"]["text_stats"] = "version=0, features=6"
    path.write_text(json.dumps(card))
    capsys.readouterr()
    assert run(monkeypatch, "generate", prompt, "-c", config, *limit) == 0
    assert "another encoder 'text_stats'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--top-p", "0.9"), "need a --temperature above 0"),
        (("--temperature", "0.5", "--temperature", "0.5"), "a temperature is given twice"),
        (("--temperature", "-1"), "temperature must be"),
        (("--outputs", "name"), "give NAME=FILE"),
        (("--outputs", "a=x", "--outputs", "a=y"), "'a' is given twice"),
        (("--workers", "0"), "workers must be at least 1"),
    ],
)
def test_flags_of_collect_that_cannot_be_are_refused(
    config: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(monkeypatch, "collect", prompts, "-c", config, *flags) == 2
    assert message in capsys.readouterr().err


def test_collect_leaves_out_broken_lines_only_when_told(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "abc"}\n{"text": \n{"text": "abd"}\n')
    command = ("collect", path, "-c", config, "--max-new-tokens", "2", "--prompt-field", "text")

    assert run(monkeypatch, *command) == 2
    assert "some.jsonl:2: not a JSON object" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "1 broken rows were left out" in said and "some.jsonl:2" in said
    assert "2 prompts in" in said


BAD_YAML = [
    ("targets: {model: x}\n", "did you mean 'target'"),
    ("target: {model: x}\ndrafters: {a: {kind: draft_modle}}\n", "did you mean 'draft_model'"),
    (
        "target: {model: x}\ndrafters: {a: {kind: prompt_lookup, settings: {max_ngrams: 3}}}\n",
        "did you mean 'max_ngram'",
    ),
    ("target: {model: /no/such/folder}\n", "no such folder"),
    ("target: {model: x, dtype: float8}\n", "dtype"),
    ("target: [\n", "not valid YAML"),
    ("just text\n", "expected a mapping"),
]


@pytest.mark.parametrize(("text", "expected"), BAD_YAML)
@pytest.mark.parametrize("verb", [("generate", "hello"), ("doctor",)])
def test_a_mistake_in_the_configuration_is_one_line_and_exit_code_2(
    text: str,
    expected: str,
    verb: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "paceline.yaml"
    path.write_text(text)
    monkeypatch.setenv("COLUMNS", "400")
    # a drafter's own mistake must show although the target of these files does not exist
    if "drafters" in text:
        text = text.replace("model: x", f"model: {ZOO / 'target'}")
        path.write_text(text)
    code = run(monkeypatch, *verb, "-c", path)
    shown = capsys.readouterr()
    assert code == 2
    assert expected in shown.err + shown.out
    assert "Traceback" not in shown.err + shown.out
    if verb[0] == "generate":
        assert shown.err.startswith("paceline: ") and len(shown.err.strip().splitlines()) == 1


BAD_REQUESTS = [
    (("generate", ""), "prompt is empty"),
    (
        ("generate", "hello", "--max-new-tokens", "0"),
        "max_new_tokens must be a whole number, at least 1",
    ),
    (
        ("generate", "hello", "--max-new-tokens", "-3"),
        "max_new_tokens must be a whole number, at least 1",
    ),
    (("generate", "hello", "--top-p", "0.5"), "top_p given with temperature 0"),
    (("generate", "hello", "--temperature", "-1"), "temperature must be"),
    (("generate", "hello", "-d", "maths"), "unknown drafter 'maths'"),
    (("generate", "hello", "--policy", "nowhere"), "paceline learn"),
    (("generate", "hello", "--sampling", "magic"), "sampling must be"),
    (("generate", "word " * 1100, "-d", "none"), "context holds 1024"),
    (("collect", "no-such.jsonl"), "no-such.jsonl"),
    (("learn",), "paceline collect"),
    (("evaluate",), "paceline learn"),
    (("learn", "--reward", "fun"), "reward"),
    (("distill", "no-such.jsonl", "--out", "made"), "no-such.jsonl"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_REQUESTS)
def test_a_request_that_cannot_be_served_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    expected: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(config.parent)
    # an empty prompt is only empty without the chat template around it
    raw = ("--raw",) if arguments == ("generate", "") else ()
    assert run(monkeypatch, *arguments, *raw, "-c", config) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("paceline: ") and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "a", "prompt": ', "prompts.jsonl:2: not a JSON object"),
        ('{"id": "a"}', "prompts.jsonl:2: key 'prompt' is missing"),
        ('{"id": "first", "prompt": "b"}', "prompts.jsonl:2: id 'first' occurs twice"),
        ('{"id": "a", "prompt": ""}', "prompts.jsonl:2: the prompt is empty"),
    ],
)
def test_a_broken_line_of_prompts_is_named(
    line: str,
    expected: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config.parent / "prompts.jsonl"
    path.write_text('{"id": "first", "prompt": "a"}\n' + line + "\n")
    monkeypatch.setenv("COLUMNS", "400")
    assert run(monkeypatch, "collect", path, "-c", config) == 2
    assert expected in capsys.readouterr().err


def test_ctrl_c_while_collecting_loses_nothing_that_was_finished(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "many.jsonl"
    texts = [r.prompt for domain in ("math", "translation") for r in load_written(domain)]
    lines = [json.dumps({"id": f"p{i}", "prompt": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-c", "from paceline.cli import main; main()"]
    arguments = ["collect", str(path), "-c", str(config), "--max-new-tokens", "24"]
    process = subprocess.Popen(
        [*command, *arguments],
        env={**os.environ, "COLUMNS": "200"},
        stderr=subprocess.PIPE,
        # where the tests run in the background, a shell lets them ignore it, and they hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first_shard = tmp_path / "runs/collection/trajectories/shard-00000.parquet"
    deadline = time.monotonic() + HANGS
    while not first_shard.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert b"Traceback" not in error and b"interrupted" in error
    kept = len(list(first_shard.parent.glob("shard-*.parquet")))
    assert 1 <= kept < 5  # 144 prompts are five shards; the rest was still to come
    assert run(monkeypatch, *arguments) == 0
    collection = load_collection(tmp_path / "runs/collection")
    assert sorted(p.id for p in collection.prompts) == sorted(f"p{i}" for i in range(len(texts)))
