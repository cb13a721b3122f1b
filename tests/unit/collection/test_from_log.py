"""Replayed logged requests give the same rows as a collection of the same prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.assembly import open_log
from paceline.collection import collect_trajectories
from paceline.collection.from_log import SERVED, collect_log
from paceline.config import LogSection
from paceline.errors import StoreError
from paceline.store import load_collection, read_decisions
from paceline.store.collection import open_trajectories, read_trajectories

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.assembly import Pace
    from paceline.contracts import PromptRecord
    from paceline.store import LoggedDecision

ARMS = ("near", "lookup")


@pytest.fixture
def served(pace: Pace, records: list[PromptRecord], tmp_path: Path) -> list[LoggedDecision]:
    """Return the logged decisions of all records that fit; drafters alternate, the last is sampled."""
    section = LogSection(folder=tmp_path / "log", tokens="ids")
    config = pace.parts.config.model_copy(update={"log": section})
    pace.engine.on_complete = open_log(replace(pace.parts, config=config))
    fitting = [r for r in records if r.id != "long"]
    messages = [[{"role": "user", "content": r.prompt}] for r in fitting]
    for i, prompt in enumerate(messages[:-1]):
        pace.complete(prompt, max_new_tokens=12, drafter=("none", *ARMS)[i % 3])
    pace.complete(messages[-1], max_new_tokens=12, drafter="near", temperature=0.8, seed=1)
    pace.complete(messages[0], max_new_tokens=5, drafter="near")  # repeated, with a shorter answer
    pace.engine.on_complete = None
    return read_decisions(tmp_path / "log").decisions


def test_the_log_gives_what_collecting_gives(
    pace: Pace, records: list[PromptRecord], served: list[LoggedDecision], tmp_path: Path
) -> None:
    report = collect_log(pace, served, tmp_path / "from_log")
    fitting = [r for r in records if r.id != "long"][:-1]
    collect_trajectories(pace, fitting, tmp_path / "direct", max_new_tokens=12)

    assert report.num_added == len(fitting) and report.num_present == 0
    assert report.left_out == {"were sampled, or had rules for the logits": 1}
    found = load_collection(tmp_path / "from_log", ARMS)
    direct = load_collection(tmp_path / "direct", ARMS)
    assert found.identity == direct.identity
    by_prompt = {prompt.prompt_tokens: prompt for prompt in direct.prompts}
    assert len(found.prompts) == len(by_prompt)
    for prompt in found.prompts:
        other = by_prompt[prompt.prompt_tokens]
        assert prompt.output_tokens == other.output_tokens
        assert prompt.max_new_tokens == other.max_new_tokens == 12
        # a batch of another shape may change the last bits of a hidden state
        assert prompt.features == pytest.approx(other.features, abs=1e-5)
        assert prompt.domain == SERVED
        for arm in ARMS:
            assert np.array_equal(prompt.replays[arm].table, other.replays[arm].table)


def test_taken_again_nothing_is_added_and_what_is_new_is(
    pace: Pace, served: list[LoggedDecision], tmp_path: Path
) -> None:
    collect_log(pace, served[:4], tmp_path / "store", shard_size=3)
    again = collect_log(pace, served, tmp_path / "store")

    assert (again.num_present, again.num_added) == (4, len(served) - 2 - 4)
    ids = [t.id for t in read_trajectories(open_trajectories(tmp_path / "store"))]
    assert len(ids) == len(set(ids)) == len(served) - 2


def test_served_prompts_join_collected_ones(
    pace: Pace, records: list[PromptRecord], served: list[LoggedDecision], tmp_path: Path
) -> None:
    collect_trajectories(pace, records[:2], tmp_path / "store", max_new_tokens=8)
    collect_log(pace, served, tmp_path / "store")

    domains = [p.domain for p in load_collection(tmp_path / "store", ARMS).prompts]
    assert domains.count(SERVED) == len(served) - 2 and len(domains) == len(served)


def test_a_log_of_nothing_usable_says_why(
    pace: Pace, served: list[LoggedDecision], tmp_path: Path
) -> None:
    without = [replace(d, prompt_tokens=None, output_tokens=None) for d in served]
    cancelled = [replace(d, finish_reason="cancelled") for d in served[:2]]
    header = replace(served[0].header, target="another")
    others = [replace(d, header=header) for d in served[:3]]
    with pytest.raises(StoreError) as caught:
        collect_log(pace, [*without, *cancelled, *others], tmp_path / "store")
    message = str(caught.value)
    assert f"{len(served)} have no token ids (log.tokens: ids keeps them)" in message
    assert "2 did not finish" in message and "3 were served by another target" in message
    assert not (tmp_path / "store").exists()
    with pytest.raises(StoreError, match="the log is empty"):
        collect_log(pace, [], tmp_path / "store")
