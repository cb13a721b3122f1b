"""`auto` without a policy: the text is plain decoding's, and a lookup that is never right is left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.reference import greedy_reference

import paceline
from paceline.contracts import NONE
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.drafting.suffix_lookup import SuffixLookup, SuffixLookupSettings
from paceline.errors import RequestError
from paceline.selection import guard
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Drafts, RowView

TEXTS = ("to be or not to be", "spam, spam and spam; " * 3, "a")


class WrongLookup(SuffixLookup):
    """A lookup that takes its time and drafts tokens that are never right."""

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        drafts = super().propose(rows, limits)
        time.sleep(0.01)
        wrong = [
            [(row.tokens[-1] + 1) % 250] * min(4, limit)
            for row, limit in zip(rows, limits, strict=True)
        ]
        drafts.tokens = np.array([line + [-1] * (4 - len(line)) for line in wrong])
        drafts.lengths = [len(line) for line in wrong]
        drafts.parents = drafts.evidence = None
        return drafts


def load(**given: Any) -> paceline.Pace:
    return paceline.load(tokenizer=byte_tokenizer(), **given)


@pytest.fixture(params=[True, False], ids=["patient", "usual"])
def is_patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the guard keeps the lookup whatever it loses; on tiny models it loses soon."""
    if request.param:
        monkeypatch.setattr(guard, "MIN_ALLOWED_LOSS", float("inf"))
        monkeypatch.setattr(guard, "LOSES", float("inf"))
    return bool(request.param)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_greedy_text_is_the_targets_own(architecture: str, is_patient: bool) -> None:
    model = tiny_model(architecture)
    pace = load(target=model, drafters={"near": perturbed(model, 0.05)})
    expected = [greedy_reference(model, pace.encode(text), 60).tokens for text in TEXTS]
    for _ in range(2):
        alone = [pace.complete(text, max_new_tokens=60, ignore_eos=True) for text in TEXTS]
        assert [c.token_ids for c in alone] == expected
    if is_patient:
        assert any(r.accepted for c in alone for r in c.rounds)
    together = pace.generate(TEXTS * 2, max_new_tokens=60, ignore_eos=True)
    assert [c.token_ids for c in together] == expected * 2
    assert all(c.decision.policy.startswith("untrained") for c in together)


@pytest.mark.usefixtures("is_patient")
def test_sampled_text_is_that_of_the_seed() -> None:
    model = tiny_model("llama")
    pace = load(target=model)
    settings = {"max_new_tokens": 60, "temperature": 0.7, "seed": 5}
    for text in TEXTS:
        found = pace.complete(text, **settings)
        assert found.token_ids == pace.complete(text, drafter=NONE, **settings).token_ids


def test_a_lookup_that_is_never_right_is_left_by_the_clock() -> None:
    model = tiny_model("llama")
    pace = load(target=model, drafters={"lookup": WrongLookup("lookup", SuffixLookupSettings())})
    answers = [pace.complete(text, max_new_tokens=80, ignore_eos=True) for text in TEXTS * 2]
    for text, answer in zip(TEXTS * 2, answers, strict=True):
        plain = pace.complete(text, drafter=NONE, max_new_tokens=80, ignore_eos=True)
        assert answer.token_ids == plain.token_ids
        # at most the round before the price is known, and the one that loses
        assert sum(r.drafted > 0 for r in answer.rounds) <= 2
    assert answers[0].drafter == "lookup" and answers[-1].drafter == NONE
    assert "suspended" in pace.controller.report()[0]  # type: ignore[union-attr]


def test_auto_is_a_configured_lookup_or_one_that_is_added() -> None:
    model = tiny_model("llama")
    lookup = SuffixLookup("mine", SuffixLookupSettings())
    copies = PromptLookup("suffix", PromptLookupSettings())
    for drafters, name in (
        ({}, "suffix"),
        ({"mine": lookup}, "mine"),
        ({"suffix": copies}, "built-in-suffix"),
    ):
        pace = load(target=model, drafters=drafters)
        assert pace.complete("spam spam", max_new_tokens=4).decision.arm == name
        assert pace.drafters == [NONE, *dict.fromkeys([*drafters, name])]
        [note] = [note for note in pace.notes if "no policy is used" in note]
        assert f"'auto' is drafter '{name}'" in note and "paceline learn" in note


def test_without_a_choice_a_request_must_name_a_drafter() -> None:
    pace = load(target=tiny_model("llama"), with_policy=False)
    assert pace.drafters == [NONE] and not pace.notes
    with pytest.raises(RequestError, match="name a drafter: none"):
        pace.complete("a", max_new_tokens=2)
