"""A target's scores: the choices of logits, and the calls of a forward that computes scores itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from support.reference import greedy_reference

from paceline.contracts import NONE, Request, SamplingParams
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.none import NoneDrafter
from paceline.engine import Driver, Engine
from paceline.engine.rows import Row
from paceline.models.compiled.forward import CompiledForward
from paceline.models.language_model import LanguageModel
from paceline.models.packing import Span
from paceline.models.scores import Scores
from paceline.testing.scripted import ScriptedTree
from paceline.testing.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

NAN, INF = float("nan"), float("inf")


def test_a_choice_is_the_most_likely_id_if_it_is_finite() -> None:
    logits = torch.tensor(
        [[0.0, 2.0, 2.0], [0.0, NAN, 9.0], [INF, 0.0, 0.0], [-INF] * 3, [-INF, -INF, 0.0]]
    )

    assert Scores.of(logits).choices == [1, -1, -1, -1, 2]


class Recorded(CompiledForward):
    """The compiled forward; `wanted` has the `wants_logits` of every call, False for a chain."""

    wanted: list[bool]

    def score(self, *given: Any) -> Scores:
        self.wanted.append(given[-1])
        return super().score(*given)

    def chain(self, *given: Any, **named: Any) -> list[list[int]]:
        self.wanted.append(False)
        return super().chain(*given, **named)


def test_the_compiled_forward_is_asked_for_logits_only_where_rows_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.models.language_model.CompiledForward", Recorded)
    Recorded.wanted = wanted = []
    model, prompt = tiny_model("llama"), (3, 1, 4, 1, 5)
    right = greedy_reference(model, prompt, 12).tokens
    text = [*prompt, *right, 0, 0]

    def propose(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        if limit < 2:
            return [], []
        first, second = text[len(tokens) : len(tokens) + 2]
        return [first + 1, first, second], [-1, -1, 1]

    drafters = {NONE: NoneDrafter(), "tree": ScriptedTree("tree", propose)}
    engine = Engine(LanguageModel(model, "target"), drafters, decode=str)
    for settings, reads in (
        ({}, False),
        ({"logprobs": True}, True),
        ({"sampling": SamplingParams(1.0, seed=3, method="invariant")}, True),
    ):
        texts = []
        for arm in (NONE, "tree"):
            wanted.clear()
            request = Request("", prompt, 12, drafter=arm, **settings)  # type: ignore[arg-type]
            [completion] = Driver(engine).generate([request])
            assert wanted == [reads] * len(completion.rounds)
            texts.append(completion.token_ids)
        assert texts[0] == texts[1]
        assert "sampling" in settings or texts[0] == right


def test_scores_are_those_of_the_logits() -> None:
    model: Any = LanguageModel(tiny_model("llama"), "target")
    slot = model.acquire()

    with torch.inference_mode():
        scores = model.score([5, 9, 2, 7], [Span(slot, 0, 4)], [[-1, -1, 0]])
        logits = model.unembed(
            model.forward(torch.tensor([5, 9, 2, 7]), [Span(slot, 0, 4)], [[-1, -1, 0]])
        )

    assert torch.equal(scores.logits, logits)
    assert scores.choices == logits.argmax(dim=-1).tolist()


def test_a_forward_that_drafts_whole_chains_is_called_once_per_draft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of several lengths, some shorter than the chain, some with a token that was accepted."""
    model = tiny_model("llama")
    plain = LanguageModel(model, "plain", "lean")
    monkeypatch.setattr("paceline.models.language_model.CompiledForward", Recorded)
    Recorded.wanted = calls = []
    drafters = [DraftModel("d", m, 4, 259, 259) for m in (plain, LanguageModel(model, "own"))]
    rows = [Row(i, Request("", (7, i), 50), 0, 52, 0.0, [7, i, 5], NoneDrafter()) for i in range(3)]
    with torch.inference_mode():
        for drafter in drafters:
            drafter.start(rows)
            for row in rows:
                assert drafter.prepare(row, 64)
        for limits in ([4, 4, 4], [1, 0, 3], [4, 2, 4]):
            steps, chains = (drafter.propose(rows, limits) for drafter in drafters)
            assert steps.lengths == chains.lengths == limits
            assert torch.equal(steps.tokens, chains.tokens)
            for row, draft, length in zip(rows, steps.tokens.tolist(), limits, strict=True):
                row.tokens += [*draft[: length // 2], 9]
    assert len(calls) == 3
