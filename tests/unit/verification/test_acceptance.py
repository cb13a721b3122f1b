"""Verdicts, place by place: against a readable judge for one row, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.judging import judge_block, judge_residual

from paceline.verification import depths, follow

QUICK = settings(max_examples=150, deadline=None, derandomize=True)
V = 6


def reference_residual(
    p: np.ndarray, q: np.ndarray, draft: list[int], u: np.ndarray, e: np.ndarray
) -> tuple[int, int]:
    """Speculative sampling of one row, as the paper writes it."""
    for k, token in enumerate(draft):
        inside = 0 <= token < p.shape[1]
        if inside and q[k, token] > 0 and u[k] < min(1.0, p[k, token] / q[k, token]):
            continue
        residual = np.maximum(p[k] - q[k], 0.0)
        return k, int(np.argmax(residual / e[k]))
    k = len(draft)
    return k, int(np.argmax(p[k] / e[k]))


def dirichlet(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Distributions, some tokens of which are impossible."""
    weights = generator.exponential(size=(*shape, V)) * (generator.random((*shape, V)) < 0.7)
    weights[..., 0] += 1e-3
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("method", ["residual", "block"])
@QUICK
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 4))
def test_verdicts_are_those_of_the_readable_judge(
    method: str, seed: int, num_rows: int, num_drafted: int
) -> None:
    judge, reference = {
        "residual": (judge_residual, reference_residual),
        "block": (judge_block, reference_block),
    }[method]
    generator = np.random.default_rng(seed)
    p, q = (
        dirichlet(generator, num_rows, num_drafted + 1),
        dirichlet(generator, num_rows, num_drafted),
    )
    # drawn from q, so that acceptance is not rare; now and then outside the vocabulary
    tokens = [[int(generator.choice(V, p=place)) for place in row] for row in q]
    for row in tokens:
        for k in range(num_drafted):
            if generator.random() < 0.05:
                row[k] = int(generator.choice([-1, V, V + 7]))
    lengths = generator.integers(0, num_drafted + 1, size=num_rows)
    u = generator.random((num_rows, num_drafted))
    e = generator.exponential(size=(num_rows, num_drafted + 1, V))

    verdicts = judge(
        torch.tensor(p),
        torch.tensor(q),
        torch.tensor(tokens, dtype=torch.int64).reshape(num_rows, num_drafted),
        torch.tensor(lengths),
        torch.tensor(u),
        torch.tensor(e),
    )

    for i in range(num_rows):
        expected = reference(p[i], q[i], tokens[i][: lengths[i]], u[i], e[i])
        assert (int(verdicts.num_accepted[i]), int(verdicts.next_tokens[i])) == expected


def reference_block(
    p: np.ndarray, q: np.ndarray, draft: list[int], u: np.ndarray, e: np.ndarray
) -> tuple[int, int]:
    """Block verification of one row, as the paper writes it."""
    share, kept, kept_share = 1.0, 0, 1.0
    for i, token in enumerate(draft):
        inside = 0 <= token < p.shape[1]
        share = min(1.0, share * p[i, token] / q[i, token]) if inside and q[i, token] else 0.0
        if i + 1 == len(draft):
            odds = share
        else:
            left = np.maximum(share * p[i + 1] - q[i + 1], 0.0).sum()
            odds = left / (left + 1.0 - share) if left + 1.0 - share > 0 else 1.0
        if u[i] < odds:
            kept, kept_share = i + 1, share
    if kept == len(draft):
        return kept, int(np.argmax(p[kept] / e[kept]))
    residual = np.maximum(kept_share * p[kept] - q[kept], 0.0)
    return kept, int(np.argmax(residual / e[kept]))


@QUICK
@given(st.data())
def test_the_accepted_path_follows_the_targets_choices(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 8))
    tokens = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    choices = data.draw(st.lists(st.integers(0, 2), min_size=size + 1, max_size=size + 1))
    parents = [data.draw(st.integers(-1, k - 1)) for k in range(size)]

    path = follow(choices, tokens, parents)

    at = -1
    for step in path:
        assert parents[step] == at and tokens[step] == choices[at + 1]
        at = step
    assert all(parents[k] != at or tokens[k] != choices[at + 1] for k in range(size))
    assert [depths(parents)[k] for k in path] == list(range(len(path)))
    chain = list(range(-1, size - 1))
    assert follow(choices, tokens) == follow(choices, tokens, chain)


def test_of_equal_siblings_the_first_is_followed() -> None:
    assert follow([5, 7, 7, 9, 9], [5, 5, 7, 7], [-1, -1, 0, 1]) == [0, 2]


def one(p: list[list[float]], q: list[list[float]], draft: list[int], u: float) -> tuple[int, int]:
    """The verdict on one row with the same uniform at every place and noise that favours none."""
    verdicts = judge_residual(
        torch.tensor([p]),
        torch.tensor([q]),
        torch.tensor([draft]),
        torch.tensor([len(draft)]),
        torch.full((1, len(draft)), u),
        torch.ones(1, len(p), len(p[0])),
    )
    return int(verdicts.num_accepted[0]), int(verdicts.next_tokens[0])


def test_a_drafter_that_is_the_target_is_always_accepted() -> None:
    p = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]

    assert one(p, p[:2], [2, 0], u=1.0 - 2**-24) == (2, 2)


def test_a_token_that_the_target_never_says_is_never_accepted() -> None:
    p = [[0.0, 0.6, 0.4], [1.0, 0.0, 0.0]]

    assert one(p, [[0.9, 0.1, 0.0]], [0], u=0.0) == (0, 1)


def test_a_drawn_token_whose_q_underflowed_is_judged_by_p() -> None:
    """Dividing by q would be dividing by zero."""
    assert one([[0.5, 0.5], [0.0, 1.0]], [[0.0, 1.0]], [0], u=0.999) == (1, 1)
    assert one([[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0]], [0], u=0.0) == (0, 1)


@pytest.mark.parametrize("token", [-1, 3, 99])
def test_a_token_outside_the_vocabulary_is_rejected_and_what_follows_with_it(token: int) -> None:
    p = [[0.2, 0.3, 0.5]] * 3

    assert one(p, [[0.2, 0.3, 0.0], [0.2, 0.3, 0.5]], [token, 2], u=0.0) == (0, 2)


def test_the_recovered_token_comes_from_what_the_drafter_said_too_seldom() -> None:
    # p is largest at 0, but only at 2 does the drafter fall short of it
    assert one([[0.6, 0.1, 0.3], [1.0, 0, 0]], [[0.65, 0.2, 0.15]], [1], u=0.9) == (0, 2)


def test_nothing_drafted_is_a_plain_draw() -> None:
    p = torch.tensor([[[0.1, 0.9]], [[0.8, 0.2]]])
    nothing = torch.empty(2, 0, dtype=torch.int64)

    verdicts = judge_residual(
        p,
        torch.empty(2, 0, 2),
        nothing,
        torch.zeros(2, dtype=torch.int64),
        torch.empty(2, 0),
        torch.ones(2, 1, 2),
    )

    assert verdicts.num_accepted.tolist() == [0, 0]
    assert verdicts.next_tokens.tolist() == [1, 0]
