"""A cascade's chances: fitted to replays as by brute counting, saved, and refused if damaged."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafting.cascade.calibration import (
    CALIBRATION_FILE,
    Chances,
    PartReplays,
    bins_along,
    fit_chances,
    load_calibration,
    save_calibration,
)
from paceline.drafting.cascade.kernels import NUM_BINS, NUM_SURE
from paceline.drafting.evidence import NUM_CLASSES, assumed_chances
from paceline.errors import ArtefactError
from paceline.store.records import DraftNodes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PRIOR = 4.0  # observations that an assumed chance counts as


def draw_nodes(rng: np.random.Generator, num_positions: int) -> DraftNodes:
    """Draw trees of which the kept nodes are a path from the root."""
    lengths, evidence, parents, kept = [], [], [], []
    for _ in range(num_positions):
        n = int(rng.integers(0, 4))
        own = [-1 if i == 0 else int(rng.integers(-1, i)) for i in range(n)]
        last, path = -1, set()
        for i, parent in enumerate(own):
            if parent == last and rng.random() < 0.6:
                last = i
                path.add(i)
        lengths.append(n)
        parents += own
        kept += [i in path for i in range(n)]
        evidence += rng.integers(0, 5, n).tolist()
    return DraftNodes(
        np.array(lengths, dtype=np.int64),
        np.array(evidence, dtype=np.int64),
        np.array(parents, dtype=np.int64),
        np.array(kept, dtype=bool),
    )


def draw_replays(seed: int, L: int, M: int, N: int) -> list[PartReplays]:
    rng = np.random.default_rng(seed)
    replays = []
    for _ in range(N):
        T = int(rng.integers(1, 9))
        left = np.arange(T - 1, 0, -1)
        drafted = rng.integers(0, 5, (M, T - 1))
        accepted = np.minimum(rng.integers(0, drafted + 1), left)
        nodes = [draw_nodes(rng, T - 1) for _ in range(L)]
        weight = rng.choice([0.1, 1.0], M)
        replays.append(
            PartReplays(
                nodes=nodes,
                drafted=drafted,
                accepted=accepted,
                weight=weight,
                sure=np.where(rng.random((M, T - 1)) < 0.2, -1.0, rng.random((M, T - 1))),
            )
        )
    return replays


def count_lookup(replays: Sequence[PartReplays], lookup: int) -> np.ndarray:
    """Count by class the tokens whose parent is written, and those that are written: [2, classes]."""
    counts = np.zeros((2, NUM_CLASSES))
    for replay in replays:
        nodes, first = replay.nodes[lookup], 0
        for length in nodes.lengths:
            own = slice(first, first + length)
            evidence, parents, kept = nodes.evidence[own], nodes.parents[own], nodes.kept[own]
            for node in range(length):
                if parents[node] == -1 or kept[parents[node]]:
                    counts[0, evidence[node]] += 1
                    counts[1, evidence[node]] += bool(kept[node])
            first += length
    return counts


def count_model(replays: Sequence[PartReplays], model: int, tables: np.ndarray) -> np.ndarray:
    """Count tokens and right ones by bin, of first and of further places: [2, bins, 2]."""
    counts = np.zeros((2, NUM_BINS, 2))
    for replay in replays:
        num_positions = replay.drafted.shape[1]
        bins = bins_along(replay.nodes, tables, num_positions)
        for place in range(num_positions):
            drafted, accepted = replay.drafted[model, place], replay.accepted[model, place]
            # token k is tested if the tokens before it are right and the output has a token there
            for k in range(min(drafted, num_positions - place)):
                if accepted >= k:
                    counts[0, bins[place], min(k, 1)] += replay.weight[model]
                    counts[1, bins[place], min(k, 1)] += replay.weight[model] * (accepted > k)
    return counts


def count_sure(replays: Sequence[PartReplays], model: int) -> np.ndarray:
    """Count by the model's probability all tokens of the output, and those it has right."""
    counts = np.zeros((2, NUM_SURE))
    for replay in replays:
        for sure, accepted in zip(replay.sure[model], replay.accepted[model], strict=True):
            if sure >= 0:
                counts[:, int(16 * sure)] += (1, accepted > 0)
    return counts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(0, 2), st.integers(0, 12))
def test_chances_are_counted_tokens_and_assumed_ones(seed: int, L: int, M: int, N: int) -> None:
    replays = draw_replays(seed, L, M, N)

    chances = fit_chances(replays, L, M)

    assumed = Chances.assumed(L, M)
    for lookup in range(L):
        seen, right = count_lookup(replays, lookup)
        expected = (right + PRIOR * assumed.tables[lookup]) / (seen + PRIOR)
        assert chances.tables[lookup] == pytest.approx(expected)
    for model in range(M):
        tried, right = count_model(replays, model, chances.tables)
        of_all = right.sum(axis=0) + PRIOR * assumed.prospects[model, 0]
        of_all = of_all / (tried.sum(axis=0) + PRIOR)
        expected = (right + PRIOR * of_all) / (tried + PRIOR)
        assert chances.prospects[model] == pytest.approx(expected)
        seen, right = count_sure(replays, model)
        expected = (right + PRIOR * assumed.if_sure[model]) / (seen + PRIOR)
        assert chances.if_sure[model] == pytest.approx(expected)


def test_a_part_that_is_always_right_gets_a_chance_near_one_and_the_other_near_zero() -> None:
    zeros, ones = np.zeros(300, dtype=np.int64), np.ones(300, dtype=np.int64)
    nodes = [DraftNodes(ones, zeros + 7, zeros - 1, np.full(300, kept)) for kept in (True, False)]
    accepted = np.stack([np.minimum(3, np.arange(300, 0, -1)), zeros])
    replay = PartReplays(
        nodes=nodes,
        drafted=np.full((2, 300), 3),
        accepted=accepted,
        weight=np.ones(2),
        sure=np.tile(np.array([[0.99], [0.5]]), (1, 300)),
    )

    chances = fit_chances([replay], 2, 2)

    assert chances.tables[0, 7] > 0.97 and chances.tables[1, 7] < 0.02
    sure = bins_along(nodes, chances.tables, 300)[0]
    assert (chances.prospects[0, sure] > 0.97).all() and chances.prospects[1, sure, 0] < 0.02
    assert chances.if_sure[0, -1] > 0.97 and chances.if_sure[1, NUM_SURE // 2] < 0.02


def test_assumed_chances_are_chances_and_rise_with_the_evidence() -> None:
    chances = assumed_chances()

    assert chances.shape == (NUM_CLASSES,)
    assert ((chances > 0) & (chances <= 1)).all()
    own, others = chances.reshape(2, 8, 4, 4)  # length of the match, occurrences, share
    assert (others < own).all()
    for source in (own, others):
        assert (np.diff(source, axis=0) > 0).all()
        assert (np.diff(source, axis=1) >= 0).all()
        assert (np.diff(source, axis=2) > 0).all()
    assumed = Chances.assumed(1, 2)
    assert assumed.prospects.shape == (2, NUM_BINS, 2) and assumed.if_sure.shape == (2, NUM_SURE)
    for values in (assumed.prospects, assumed.if_sure):
        assert ((values > 0) & (values <= 1)).all()


# --- on disk --------------------------------------------------------------------------------------


PARTS = ("lookup", "near", "far")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_calibration(tmp_path, {"both": (PARTS, fit_chances(draw_replays(3, 1, 2, 20), 1, 2))})
    return tmp_path


def change(folder: Path, **changes: object) -> None:
    path = folder / CALIBRATION_FILE
    content = json.loads(path.read_text())
    content["cascades"]["both"] |= changes
    path.write_text(json.dumps(content))


def test_saved_chances_are_read_to_the_last_bit(saved: Path) -> None:
    expected = fit_chances(draw_replays(3, 1, 2, 20), 1, 2)

    parts, chances = load_calibration(saved)["both"]

    assert parts == PARTS
    assert chances.tables.tolist() == expected.tables.tolist()
    assert chances.prospects.tolist() == expected.prospects.tolist()
    assert chances.if_sure.tolist() == expected.if_sure.tolist()


def test_a_policy_without_cascades_has_an_empty_calibration(tmp_path: Path) -> None:
    save_calibration(tmp_path, {})

    assert load_calibration(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "[", "[]", '{"cascade": {}}', '{"cascades": []}', "\x00"])
def test_a_damaged_file_is_refused(saved: Path, content: str) -> None:
    (saved / CALIBRATION_FILE).write_text(content)

    with pytest.raises(ArtefactError, match=r"calibration\.json: .*; run `paceline learn` again"):
        load_calibration(saved)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot be read .*; run `paceline learn` again"):
        load_calibration(tmp_path)


FULL = [0.5] * NUM_CLASSES
MODEL = [[0.5, 0.5]] * NUM_BINS


@pytest.mark.parametrize(
    "changes",
    [
        {"tables": [[0.5] * (NUM_CLASSES - 1)]},
        {"tables": [[*FULL[1:], 0.0]]},
        {"tables": [[*FULL[1:], 1.01]]},
        {"tables": [[*FULL[1:], None]]},
        {"tables": [FULL, [0.5]]},
        {"prospects": [MODEL, [[0.5, -0.1]] * NUM_BINS]},
        {"prospects": [MODEL, MODEL[1:]]},
        {"prospects": [[[0.5]] * NUM_BINS] * 2},
        {"tables": []},  # fewer than the parts: the rule would read beyond the end
        {"tables": [FULL, FULL]},
        {"prospects": [MODEL]},
        {"if_sure": [[0.5] * NUM_SURE]},
        {"if_sure": [[0.5] * NUM_SURE, [0.0] * NUM_SURE]},
        {"parts": ["lookup", "near"]},
        {"parts": "lookup"},
        {"more": 1},
    ],
)
def test_chances_that_are_none_or_of_other_parts_are_refused(
    saved: Path, changes: dict[str, object]
) -> None:
    change(saved, **changes)

    with pytest.raises(ArtefactError, match=r"calibration\.json.*run `paceline learn` again"):
        load_calibration(saved)
