"""Sampled text from drafted trees has the target's distribution, and the released code's has not.

A tree is judged by one draw from p at each node, along the child that equals it. ADED's released
flow, which is that of REST, draws for every path anew and the next root too: it is done here by hand,
on the same trees and the same distribution, to show that the check sees it. Symbols: V tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import stats

from paceline.contracts import Request, SamplingParams
from paceline.drafting.draft_replay import SimpleRow
from paceline.drafting.none import NoneDrafter
from paceline.drafting.trigram.build import build_table
from paceline.drafting.trigram.corpora import TokenSequences
from paceline.drafting.trigram.drafter import TrigramTree
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import load_table
from paceline.engine import Driver, Engine
from paceline.models.language_model import LanguageModel
from paceline.testing.tiny_models import tiny_model
from paceline.warping import warp

if TYPE_CHECKING:
    from torch import Tensor

V = 10
PROMPT = (3, 7, 1, 3)
PARAMS = SamplingParams(1.2, top_k=7, min_p=0.02, method="residual")
NUM_REQUESTS = 2000
ALPHA = 1e-7


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    return LanguageModel(tiny_model("llama", vocab_size=V, context=16), "target")


@pytest.fixture(scope="module")
def tri(target: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> TrigramTree:
    """A table of the target's own samples, so that wide trees are accepted often."""
    engine = Engine(target, {"none": NoneDrafter()}, decode=str, max_rows=100)
    requests = [
        Request(str(i), PROMPT, 6, SamplingParams(1.2, seed=i, method="residual"), drafter="none")
        for i in range(200)
    ]
    texts = [[*PROMPT, *done.token_ids] for done in Driver(engine).generate(requests)]
    out = tmp_path_factory.mktemp("table") / "table"
    build_table([TokenSequences("samples", texts)], out, "hash")
    table, facts = load_table(out)
    settings = TrigramTreeSettings(search="mcts", num_draft_tokens=16, depth=3)
    return TrigramTree("tri", settings, table, facts.sha256)


@pytest.fixture(scope="module")
def distribution(target: LanguageModel) -> np.ndarray:
    """[V, V, V] probabilities of the first three tokens, from transformers' own forward."""

    def after(texts: list[list[int]]) -> Tensor:
        return warp(target.model(torch.tensor(texts)).logits[:, -1], PARAMS).double()

    tokens = range(V)
    with torch.inference_mode():
        first = after([[*PROMPT]])[0]
        second = after([[*PROMPT, a] for a in tokens])
        third = after([[*PROMPT, a, b] for a in tokens for b in tokens]).reshape(V, V, V)
    found: np.ndarray = (first[:, None, None] * second[:, :, None] * third).numpy()
    return found


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return the p-value of the counts; 0 if an impossible cell was counted. Rare cells are pooled."""
    counts, expected = counts.ravel(), expected.ravel() / expected.sum() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    rare = max(int((expected < 10.0).sum()), 1)
    counts = np.r_[counts[:rare].sum(), counts[rare:]]
    expected = np.r_[expected[:rare].sum(), expected[rare:]]
    if expected[0] == 0:
        counts, expected = counts[1:], expected[1:]
    return float(stats.chisquare(counts, expected).pvalue)


@pytest.mark.parametrize("method", ["residual", "invariant"])
def test_the_engine_emits_the_targets_distribution_from_trees(
    target: LanguageModel, tri: TrigramTree, distribution: np.ndarray, method: str
) -> None:
    engine = Engine(target, {"none": NoneDrafter(), "tri": tri}, decode=str, max_rows=100)
    requests = [
        Request(
            str(i),
            PROMPT,
            5,
            SamplingParams(1.2, top_k=7, min_p=0.02, seed=5_000 + i, method=method),  # type: ignore[arg-type]
            drafter="tri",
        )
        for i in range(NUM_REQUESTS)
    ]
    counts = np.zeros((V, V, V))
    accepted = []
    for done in Driver(engine).generate(requests):
        counts[tuple(done.token_ids[:3])] += 1
        accepted.append(done.rounds[0].accepted)

    assert {0, 1, 2} <= set(accepted)
    assert np.mean(accepted) > 0.5
    for axes in ((), (0,), (0, 1), (0, 2)):
        assert p_value(counts.sum(axes), distribution.sum(axes)) > ALPHA


def test_the_released_flow_does_not_emit_the_targets_distribution(
    target: LanguageModel, tri: TrigramTree, distribution: np.ndarray
) -> None:
    """Run one round per request by the released rules, after a first token drawn from p."""
    generator = np.random.default_rng(0)
    first = distribution.sum((1, 2))
    counts = np.zeros((V, V))
    paths_of: dict[int, list[list[int]]] = {}
    second = distribution.sum(2) / first[:, None].clip(min=1e-300)
    for _ in range(NUM_REQUESTS):
        a = int(generator.choice(V, p=first / first.sum()))
        if a not in paths_of:
            row = SimpleRow([*PROMPT, a], len(PROMPT))
            paths_of[a] = root_paths(tri, row)
        p = second[a] / second[a].sum()
        # every path row draws for itself, and the longest match wins
        draws = generator.choice(V, p=p, size=len(paths_of[a]))
        matched = [path[0] for path, x in zip(paths_of[a], draws, strict=True) if path[0] == x]
        # no match: the next root is drawn afresh, whatever was drawn and rejected
        b = matched[0] if matched else int(generator.choice(V, p=p))
        counts[a, b] += 1

    assert max(len(paths) for paths in paths_of.values()) > 1
    assert p_value(counts.sum(1), first) > ALPHA  # that one was drawn from p
    assert p_value(counts, distribution.sum(2)) < ALPHA


def root_paths(tri: TrigramTree, row: SimpleRow) -> list[list[int]]:
    """Every path of the draft from the root to a leaf."""
    tri.start([row])
    drafts = tri.propose([row], [2])
    tri.finish([row])
    assert drafts.parents is not None
    tokens, parents = drafts.tokens[0].tolist(), drafts.parents[0].tolist()
    paths: list[list[int]] = []
    for k, token in enumerate(tokens):
        paths.append([*(paths[parents[k]] if parents[k] >= 0 else []), token])
    return [path for k, path in enumerate(paths) if k not in parents]
