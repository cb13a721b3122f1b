"""A row without a possible token, or with logits that are not finite, fails alone with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import paceline
from paceline.testing.scripted import ScriptedDrafter, ScriptedTree, copying
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import NUM_TOKENS, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.assembly import Pace
    from paceline.contracts import Completion, Request

    Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

PROMPT = [1, 2, 3]
NAN, INF = float("nan"), float("inf")
LATE = 5  # tokens that are written before a rule leaves nothing


@pytest.fixture(scope="module")
def pace() -> Pace:
    model = tiny_model("llama")
    plain = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={})
    output = plain.complete(PROMPT, drafter="none", max_new_tokens=30, ignore_eos=True).token_ids
    drafters = {
        "near": model,
        "right": ScriptedDrafter("right", copying([*PROMPT, *output]), 4),
        "absurd": ScriptedDrafter("absurd", lambda tokens, limit: [-1] * limit, 4),
    }
    return paceline.load(target=model, tokenizer=byte_tokenizer(), drafters=drafters)


def run(pace: Pace, *requests: Request) -> list[Completion]:
    """Return the completions in the requests' order, errors included."""
    done = {c.request_id: c for c in pace.driver.generate(requests, return_errors=True)}
    return [done[request.id] for request in requests]


def always(value: float) -> Processor:
    return lambda ids, scores: torch.full_like(scores, value)


def one_is(value: float) -> Processor:
    return lambda ids, scores: scores.index_fill(-1, torch.tensor([7]), value)


def late(processor: Processor) -> Processor:
    return lambda ids, scores: (
        processor(ids, scores) if ids.shape[1] >= len(PROMPT) + LATE else scores
    )


NOTHING: dict[str, dict[str, Any]] = {
    "everything suppressed": {"suppress_tokens": range(NUM_TOKENS)},
    "everything banned": {"logit_bias": dict.fromkeys(range(NUM_TOKENS), -INF)},
    "a processor of nan": {"processors": [always(NAN)]},
    "a processor of -inf": {"processors": [always(-INF)]},
    "one nan": {"processors": [one_is(NAN)]},
    "one inf": {"processors": [one_is(INF)]},
    "nan later": {"processors": [late(always(NAN))]},
    "nothing later": {"processors": [late(always(-INF))]},
}
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "sampling": "residual"},
    {"temperature": 0.8, "sampling": "block"},
    {"temperature": 1.2, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "sampling": "block"},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("drafter", ["none", "near", "right", "absurd"])
@pytest.mark.parametrize("what", NOTHING)
def test_a_row_without_a_possible_token_fails_alone(
    pace: Pace, what: str, drafter: str, sampling: dict[str, Any]
) -> None:
    settings = {"max_new_tokens": 12, "ignore_eos": True}
    expected = pace.complete(PROMPT, drafter="none", **settings).token_ids

    bad, good = run(
        pace,
        pace.request(PROMPT, "bad", drafter=drafter, **settings, **sampling, **NOTHING[what]),
        pace.request(PROMPT, "good", drafter=drafter, **settings),
    )

    assert bad.finish_reason == "error" and bad.error is not None
    assert "no possible token" in bad.error
    # of the last round nothing is kept, which had accepted some where there was a drafter
    assert len(bad.token_ids) <= (LATE if "later" in what else 0)
    assert len(bad.token_ids) == LATE or "later" not in what or drafter != "none"
    assert (good.error, good.token_ids) == (None, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
@pytest.mark.parametrize("act", ["raise", "nan", "exit"])
@pytest.mark.parametrize("drafter", ["wrong", "tree", "near"])
def test_rules_that_fail_on_a_drafted_text_only_do_not_fail_the_row(
    act: str, drafter: str, sampling: dict[str, Any]
) -> None:
    """The processor behaves like a trie: it knows the allowed text and no other."""
    model = tiny_model("llama")
    plain = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters={})
    settings = {"max_new_tokens": 12, "ignore_eos": True, **sampling}
    if sampling.get("sampling") == "residual":
        settings |= {"sampling": "invariant", "seed": 9}
    known = [*PROMPT, *plain.complete(PROMPT, drafter="none", **settings).token_ids]

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids[0].tolist() == known[: ids.shape[1]]:
            return scores
        if act == "exit":
            raise SystemExit
        if act == "raise":
            raise ValueError("not in the trie")
        return torch.full_like(scores, NAN)

    def grow(tokens: Any, limit: int) -> tuple[list[int], list[int]]:
        return ([7, 8, 9], [-1, -1, 0]) if limit >= 2 else ([], [])

    wrong = [*known[: len(PROMPT) + 2], 7, 7]
    drafters = {
        "wrong": ScriptedDrafter("wrong", copying(wrong), 4),
        "tree": ScriptedTree("tree", grow, 3),
        "near": tiny_model("llama", seed=1) if drafter == "near" else model,
    }
    pace = paceline.load(target=model, tokenizer=byte_tokenizer(), drafters=drafters)

    found = pace.complete(PROMPT, drafter=drafter, processors=[processor], **settings)

    assert [*PROMPT, *found.token_ids] == known


def test_a_processor_of_another_shape_fails_by_name(pace: Pace) -> None:
    settings = {"max_new_tokens": 4, "drafter": "near"}
    [bad] = run(pace, pace.request(PROMPT, processors=[lambda i, s: s[:, :1]], **settings))

    assert bad.error == "logit rules: a processor returned scores of shape [1, 1]; return [1, 259]"
