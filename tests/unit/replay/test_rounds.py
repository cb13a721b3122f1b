"""Replay equals reality: simulated rounds are the engine's, for every kind of drafter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from paceline.contracts import NONE, Request
from paceline.drafting.catalog import CATALOG
from paceline.drafting.draft_replay import DraftReplay
from paceline.replay import max_output, replay, simulate, target_distributions
from paceline.testing.scripted import ScriptedDrafter, copying

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Pace
    from paceline.contracts import Completion

KINDS = sorted(CATALOG)
ARMS = [*KINDS, "short"]
PROMPTS = ("hello", "abcabcabc", "the quick brown fox jumps over it", "x" * 60)
CONTEXT = 96


def replayed(pace: Pace, arm: str, completion: Completion, prompt: Sequence[int], n: int) -> list:
    limit = max_output(n, len(prompt), pace.parts.target.context_length)
    drafter = pace.parts.drafters[arm]
    return replay(drafter, prompt, completion.token_ids, limit).rounds.tolist()


def rounds_of(completion: Completion) -> list[list[int]]:
    return [[r.drafted, r.accepted] for r in completion.rounds]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7, 30, 200])
@pytest.mark.parametrize("arm", ARMS)
def test_simulated_rounds_are_the_engines(pace: Pace, arm: str, max_new_tokens: int) -> None:
    """Through the cut at max_new_tokens and, at 200, through that at the end of the context."""
    completions = pace.generate(PROMPTS, drafter=arm, max_new_tokens=max_new_tokens)
    for text, completion in zip(PROMPTS, completions, strict=True):
        prompt = pace.encode(text)
        assert len(completion.token_ids) == min(max_new_tokens, CONTEXT + 1 - len(prompt))
        assert replayed(pace, arm, completion, prompt, max_new_tokens) == rounds_of(completion)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != NONE])
def test_these_rounds_are_worth_comparing(pace: Pace, arm: str) -> None:
    """Both full and refused drafts occur, else the comparison above would prove little."""
    completions = pace.generate(PROMPTS, drafter=arm, max_new_tokens=200)
    rounds = [r for completion in completions for r in completion.rounds]
    assert any(r.accepted == r.drafted > 0 for r in rounds)
    assert any(0 < r.accepted < r.drafted for r in rounds)
    assert any(r.accepted == 0 < r.drafted for r in rounds)


def test_a_drafter_with_less_context_stops_drafting_there(pace: Pace) -> None:
    (completion,) = pace.generate(["hello"], drafter="short", max_new_tokens=200)
    assert completion.rounds[0].drafted == 4
    assert completion.rounds[-1].drafted == 0


@pytest.mark.parametrize("arm", ARMS)
def test_a_stop_inside_an_accepted_run_cuts_the_round_there(pace: Pace, arm: str) -> None:
    """Every token of an answer is made the stop once."""
    num_inside = 0
    for text in PROMPTS[:3]:
        (start,) = pace.generate([text], drafter=NONE, max_new_tokens=40)
        # an answer that is under way: what comes next has been written before, so lookups accept it
        prompt = (*pace.encode(text), *start.token_ids)
        request = Request("", prompt, 20, drafter=arm)
        (whole,) = pace.driver.generate([request])
        for stop in sorted(set(whole.token_ids)):
            stopping = replace(request, stop_token_ids=frozenset({stop}))
            (completion,) = pace.driver.generate([stopping])
            assert completion.token_ids[-1] == stop
            assert replayed(pace, arm, completion, prompt, 20) == rounds_of(completion)
            emitted = 1 + sum(r.accepted + 1 for r in completion.rounds)
            num_inside += emitted > len(completion.token_ids)
    assert num_inside > 0 or arm in (NONE, "short")  # whose context is full here


@pytest.mark.parametrize("num_right", [0, 1, 3, 8])
def test_scripted_drafts_are_replayed_as_they_ran(pace: Pace, num_right: int) -> None:
    (plain,) = pace.generate(["hello"], drafter=NONE, max_new_tokens=30)
    text = [*pace.encode("hello"), *plain.token_ids]
    drafter = ScriptedDrafter("scripted", copying(text, num_right), num_draft_tokens=8)
    pace.engine.drafters["scripted"] = drafter
    try:
        (completion,) = pace.generate(["hello"], drafter="scripted", max_new_tokens=30)
    finally:
        del pace.engine.drafters["scripted"]
    assert completion.token_ids == plain.token_ids
    result = replay(drafter, pace.encode("hello"), plain.token_ids, 30)
    assert result.rounds.tolist() == rounds_of(completion)
    assert result.scores is None


def test_plain_decoding_has_a_round_for_each_token_but_the_first(pace: Pace) -> None:
    result = replay(pace.parts.drafters[NONE], [1, 2], [3, 4, 5, 6], 4)
    assert result.rounds.tolist() == [[0, 0]] * 3
    assert simulate(pace.parts.drafters[NONE].would_accept([1], [2], None), 1, 1).shape == (0, 2)


def test_a_run_longer_than_the_answer_counts_what_was_emitted() -> None:
    class Boundless(DraftReplay):
        def round_at(self, position: int, limit: int) -> tuple[int, int]:
            return min(limit, 8), min(limit, 8)

    assert simulate(Boundless(), 13, 100).tolist() == [[8, 8], [8, 3]]


@pytest.mark.parametrize("chunk", [3, 16, 512])
def test_distributions_are_those_of_a_plain_forward(pace: Pace, chunk: int) -> None:
    prompt = pace.encode("abcabc")
    (completion,) = pace.generate(["abcabc"], drafter=NONE, max_new_tokens=20)
    p = target_distributions(pace.parts.target, prompt, completion.token_ids, chunk)
    model = pace.parts.target.model
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        plain = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].softmax(dim=-1)
    torch.testing.assert_close(p, plain, atol=1e-5, rtol=1e-4)
    assert p.argmax(dim=-1).tolist() == completion.token_ids


def test_scores_of_a_draft_model_are_those_of_its_definition(pace: Pace) -> None:
    drafter = pace.parts.drafters["draft_model"]
    prompt = pace.encode("abcabc")
    (completion,) = pace.generate(["abcabc"], drafter=NONE, max_new_tokens=20)
    output = completion.token_ids
    p = target_distributions(pace.parts.target, prompt, output)
    q = target_distributions(drafter.model, prompt, output)
    scores = replay(drafter, prompt, output, 20, p).scores
    assert scores is not None
    at = torch.tensor(output)[:, None]
    ratio = (q.gather(1, at) / p.gather(1, at)).clamp(max=1.0)[:, 0]
    np.testing.assert_allclose(scores.ratio, ratio, rtol=1e-4)
    np.testing.assert_allclose(scores.overlap, torch.minimum(p, q).sum(dim=1), rtol=1e-4)
    np.testing.assert_allclose(scores.confidence, q.amax(dim=1), rtol=1e-4)
    assert scores.match.tolist() == (q.argmax(dim=1) == at[:, 0]).tolist()
    assert 0 < scores.match.sum() < len(output)
