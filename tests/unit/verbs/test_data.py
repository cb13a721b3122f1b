"""The counts of `paceline data` on made-up rows with known figures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.contracts import GREEDY, SamplingParams
from paceline.costs import CostTable, Measurement
from paceline.store.records import CollectedPrompt, ReplayedDrafter
from paceline.verbs.data import ALL, plot_collection, shares_by_drafter, summarise

if TYPE_CHECKING:
    from pathlib import Path

WARM = SamplingParams(temperature=0.5, method="invariant")
ARMS = ("none", "a", "a@1", "b")


def costs() -> CostTable:
    """Return costs: 1 s per round for the target, half a second per token for a drafter."""
    figures = [("target", "prefill", 1.0), ("target", "forward", 1.0), ("engine", "round", 0.0)]
    rows = [Measurement(s, o, n, 0, 1, t) for s, o, t in figures for n in (1, 2)]
    for name in ("a", "b"):
        rows += [Measurement(name, "start", 1, 0, 1, 0.0), Measurement(name, "start", 2, 0, 1, 0.0)]
        rows += [Measurement(name, "propose", n, 0, 1, 0.5 * n) for n in (1, 2)]
    return CostTable({}, rows)


def row(
    id: str, domain: str, a: list[tuple[int, int]], b: list[tuple[int, int]], **more: object
) -> CollectedPrompt:
    """Return a row of five output tokens: a drafts from each of four positions, b in its own rounds."""
    given = {"sampling": GREEDY, "draft_outputs": {}, **more}
    return CollectedPrompt(
        id=id, domain=domain, prompt_tokens=(1, 2), output_tokens=(3,) * 5, max_new_tokens=5,
        features=np.zeros(0, np.float32),
        replays={
            "a": ReplayedDrafter(np.array(a), everywhere=True),
            "b": ReplayedDrafter(np.array(b), everywhere=False),
        },
        **given,
    )  # fmt: skip


ROWS = [
    # a: 2 drafted, 1 accepted at every place: two rounds of 2 tokens; b never drafts
    row("x", "easy", [(2, 1)] * 4, [(0, 0)] * 4, draft_outputs={"black-box": (3,)}),
    row("x@t0.5", "easy", [(2, 1)] * 4, [(0, 0)] * 4, sampling=WARM),
    # a is always wrong; b has one long draft accepted
    row("y", "odd", [(2, 0)] * 4, [(2, 2), (0, 0)]),
]


def test_rows_and_prompts_are_counted_by_task() -> None:
    report = summarise(ROWS, ARMS, None)
    assert list(report.tasks) == ["easy", "odd", ALL]
    easy, everything = report.tasks["easy"], report.tasks[ALL]
    assert (easy.num_rows, easy.num_prompts, easy.total_output_tokens) == (2, 1, 10)
    assert easy.samplings == {"greedy": 1, "t0.5": 1}
    assert (everything.num_rows, everything.num_prompts) == (3, 2)
    assert everything.samplings == {"greedy": 2, "t0.5": 1}
    assert report.writers == {"black-box": 1}
    assert report.oracle == {}


def test_acceptance_is_that_of_the_rounds() -> None:
    found = summarise(ROWS, ARMS, None).acceptance
    assert list(found) == ["a", "b"]
    assert (found["a"]["easy"].match, found["a"]["easy"].tokens_per_round) == (1.0, 2.0)
    assert (found["a"]["odd"].match, found["a"]["odd"].tokens_per_round) == (0.0, 1.0)
    assert found["a"][ALL].match == pytest.approx(8 / 12)
    assert (found["b"]["easy"].match, found["b"]["easy"].drafting) == (None, 0.0)
    assert (found["b"]["odd"].drafting, found["b"]["odd"].tokens_per_round) == (0.5, 2.0)


def test_overlap_is_the_mean_over_the_tokens_that_were_scored() -> None:
    overlaps = {"a": {"x": np.array([1.0, 0.5]), "y": np.array([0.0]), "x@t0.5": np.array([])}}
    found = summarise(ROWS, ARMS, None, overlaps).acceptance
    assert (found["a"]["easy"].overlap, found["a"]["odd"].overlap) == (0.75, 0.0)
    assert found["a"][ALL].overlap == 0.5
    assert found["b"][ALL].overlap is None


def test_the_oracle_takes_each_rows_cheapest_arm() -> None:
    report = summarise(ROWS, ARMS, costs())
    # none: 1 + 4; a@1 on easy: 1 + 2 * 1.5; a there: 1 + 2 * 2; b on odd: 1 + 2 + 1.5,
    # since asking for a draft costs as much as one token
    assert report.oracle["easy"].shares == {"a@1": 1.0}
    assert report.oracle["easy"].speedup == pytest.approx(5 / 4)
    assert report.oracle["odd"].shares == {"b": 1.0}
    assert report.oracle[ALL].speedup == pytest.approx(15 / 12.5)
    assert shares_by_drafter(report.oracle[ALL]) == pytest.approx({"a": 2 / 3, "b": 1 / 3})


def test_the_figure_and_the_json_hold_every_task(tmp_path: Path) -> None:
    report = summarise(ROWS, ARMS, costs())
    assert set(json.loads(report.to_json())["tasks"]) == {"easy", "odd", ALL}
    for name, table in (("priced", costs()), ("bare", None)):
        plot_collection(summarise(ROWS, ARMS, table), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_one_token_have_no_rounds() -> None:
    empty = np.zeros((0, 2), dtype=np.int64)
    bare = row("z", "short", [], [])
    bare.replays["a"], bare.replays["b"] = (ReplayedDrafter(empty, e) for e in (True, False))
    found = summarise([bare], ARMS, None).acceptance["a"]["short"]
    assert (found.match, found.drafting, found.tokens_per_round) == (None, 0.0, 1.0)
