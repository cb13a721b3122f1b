"""Each served request writes one line to the log, with the policy's features and without text."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml

import paceline
from paceline.assembly import Pace, build, build_from_objects, open_log
from paceline.cli import main
from paceline.config import Config, LogSection, ModelSection, load_config
from paceline.contracts import Context, Decision, identity_of_arms
from paceline.costs.table import CostTable, Measurement
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.experiments.demo_prompts import load_written
from paceline.selection import feature_vector
from paceline.selection.drift import TrainingRange
from paceline.store import read_decisions
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

ZOO = Path(__file__).parents[2] / "zoo"
PROMPT = "quite a secret prompt, quite a secret one"


def serving(folder: Path, tokens: str, choose: Callable[[Context], Decision]) -> Pace:
    log = LogSection.model_validate({"folder": folder, "tokens": tokens})
    config = Config(target=ModelSection(model="in memory"), log=log)
    lookup = PromptLookup("lookup", PromptLookupSettings(min_ngram=1))
    parts = build_from_objects(
        tiny_model(std=0.1, context=96), byte_tokenizer(), {"lookup": lookup}, config
    )
    return Pace(parts, choose, on_complete=open_log(parts))


@pytest.mark.parametrize("tokens", ["off", "ids"])
def test_a_line_for_every_request(tmp_path: Path, tokens: str) -> None:
    seen: dict[str, Context] = {}

    def choose(context: Context) -> Decision:
        seen[context.request_id] = context
        scores = {"none": 0.25, "lookup": 0.75}
        return Decision("lookup", 0.75, scores, "mine", feature_vector(context))

    pace = serving(tmp_path, tokens, choose)
    done = pace.generate([PROMPT, PROMPT + "!"], max_new_tokens=12, ignore_eos=True)
    named = pace.complete(PROMPT, drafter="none", max_new_tokens=5, temperature=0.5, seed=1)
    ticket = pace.engine.submit(pace.request(PROMPT, id="given up", max_new_tokens=40))
    pace.engine.step()
    pace.engine.cancel(ticket)
    pace.engine.step()
    decisions, notes = read_decisions(tmp_path)

    assert notes == []
    by_id = {d.request_id: d for d in decisions[:2]}
    for completion in done:
        line, context = by_id[completion.request_id], seen[completion.request_id]
        assert (line.arm, line.policy, line.propensity) == ("lookup", "mine", 0.75)
        assert line.features is not None
        assert np.array_equal(line.features, feature_vector(context))
        assert line.rows_in_flight == context.rows_in_flight == 2
        assert line.rounds.tolist() == [[r.drafted, r.accepted] for r in completion.rounds]
        assert line.seconds == completion.seconds
        assert line.seconds_total == completion.seconds_total
        assert (line.num_output, line.max_new_tokens) == (12, 12)
        assert line.header.target == pace.parts.target.fingerprint()
        assert list(line.header.drafters) == ["none", "lookup"]
        assert line.header.encoders == {}  # nobody said whose features these are
        expected = tuple(completion.token_ids) if tokens == "ids" else None
        assert line.output_tokens == expected
    assert decisions[2].features is None and decisions[2].arm == "none"
    assert decisions[2].num_output == len(named.token_ids)
    assert decisions[2].sampling.temperature == 0.5
    assert (decisions[3].request_id, decisions[3].finish_reason) == ("given up", "cancelled")
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in written
    ids = ",".join(map(str, pace.encode(PROMPT)))
    assert (ids in written) == (tokens == "ids")


def test_the_configuration_turns_it_on(tmp_path: Path) -> None:
    raw = {"target": {"model": str(ZOO / "target")}, "log": {"folder": "served"}}
    path = tmp_path / "paceline.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load_config(path).log == LogSection(folder=tmp_path / "served", tokens="off")

    pace = paceline.load(path)
    assert not list((tmp_path / "served").iterdir())
    pace.complete("hello", drafter="none", max_new_tokens=3)
    pace.complete("hello", max_new_tokens=3)  # without a policy
    named, untrained = read_decisions(tmp_path / "served").decisions
    assert (named.arm, untrained.arm, untrained.policy) == ("none", "suffix", "untrained")
    # the header names what is configured, so that a drafter that was added makes no difference
    assert list(untrained.header.drafters) == ["none"]


@pytest.fixture
def configured(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that serves sixteen prompts with a log and returns the configuration's path."""

    def serve(tokens: str) -> Path:
        raw = {
            "target": {"model": str(ZOO / "target"), "dtype": "float32"},
            "drafters": {"lookup": {"kind": "prompt_lookup"}},
            "learning": {"max_epochs": 5},
            "log": {"folder": "served", "tokens": tokens},
        }
        path = tmp_path / "paceline.yaml"
        path.write_text(yaml.safe_dump(raw))
        pace = paceline.load(path)
        for record in [*load_written("math")[:8], *load_written("translation")[:8]]:
            message = [{"role": "user", "content": record.prompt}]
            pace.complete(message, drafter="lookup", max_new_tokens=10)
        return path

    return serve


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_policy_is_learned_from_a_log_with_ids(
    configured: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = configured("ids")
    figures = [("target", "prefill", 2.0), ("target", "forward", 1.0), ("engine", "round", 0.5)]
    figures += [("lookup", "start", 0.1), ("lookup", "propose", 0.1)]
    parts = build(load_config(path))
    lines = identity_of_arms({n: d.identity() for n, d in parts.drafters.items()})
    costs = CostTable(
        {f"arm {n}": line for n, line in lines.items()},
        [Measurement(s, o, 1, 0, 1, x) for s, o, x in figures],
    )
    costs.save(load_config(path).paths.costs)

    assert run(monkeypatch, "learn", "-c", path, "--from-log") == 0
    said = capsys.readouterr().out
    assert "predicted speed-up over none" in said and "written: " in said
    assert paceline.load(path).complete("hello", max_new_tokens=3).token_ids

    before = (load_config(path).paths.policy / "policy.json").read_bytes()
    assert run(monkeypatch, "learn", "-c", path, "--from-log", "--seed", "1") == 0
    said = capsys.readouterr().out
    assert "too little evidence" in said and "kept: " in said and "written" not in said
    assert (load_config(path).paths.policy / "policy.json").read_bytes() == before


def test_a_log_without_ids_or_exploration_says_what_it_lacks(
    configured: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = configured("off")
    assert run(monkeypatch, "learn", "-c", path, "--from-log") == 2
    said = capsys.readouterr().err
    assert "0 of 16 logged requests can be learned from" in said and "explore > 0" in said

    path.write_text(path.read_text().replace("served", "elsewhere"))
    assert run(monkeypatch, "learn", "-c", path, "--from-log") == 2
    assert "no decisions were logged here" in capsys.readouterr().err
    path.write_text(yaml.safe_dump({"target": {"model": str(ZOO / "target")}}))
    assert run(monkeypatch, "learn", "-c", path, "--from-log") == 2
    assert "set log.folder" in capsys.readouterr().err


def test_requests_unlike_the_training_raise_a_warning(tmp_path: Path) -> None:
    pace = serving(
        tmp_path, "off", lambda context: Decision("lookup", features=feature_vector(context))
    )
    texts = [f"{a} {b} again, {a}" for a in ("one", "two", "six", "ten") for b in "abcdefghijkl"]
    for prompt in texts:
        pace.complete(prompt, max_new_tokens=3)
    features = [d.features for d in read_decisions(tmp_path).decisions]
    seen = TrainingRange.fit(np.stack([row for row in features if row is not None]), {})

    pace.engine.on_complete = open_log(pace.parts, seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in texts[:12]:
            pace.complete(prompt, max_new_tokens=3)
    with pytest.warns(UserWarning, match="features left the range seen in training"):
        for prompt in texts[:12]:
            pace.complete("\u03b1\u03b2\u03b3" * 5 + prompt[:2], max_new_tokens=3)
