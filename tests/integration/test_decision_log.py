"""Requests that are served leave a line each, with what the policy saw and nothing of the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml

import paceline
from paceline.assembly import Pace, build_from_objects, open_log
from paceline.config import Config, LogSection, ModelSection, load_config
from paceline.contracts import Context, Decision
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.selection import FEATURE_VERSION, feature_vector
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
    return Pace(parts, choose, open_log(parts))


@pytest.mark.parametrize("tokens", ["off", "ids"])
def test_a_line_for_every_request(tmp_path: Path, tokens: str) -> None:
    seen: dict[str, Context] = {}

    def choose(context: Context) -> Decision:
        seen[context.request_id] = context
        return Decision("lookup", 0.75, {"none": 0.25, "lookup": 0.75}, "mine")

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
        assert list(line.header.arms) == ["none", "lookup"]
        assert line.header.feature_version == FEATURE_VERSION
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
    assert len(read_decisions(tmp_path / "served").decisions) == 1
