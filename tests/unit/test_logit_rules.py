"""Logit rules: transformers' definitions, exact with every drafter; wrong ones are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, ModelSection
from paceline.contracts import LogitRules
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import DecodingError, RequestError
from paceline.logit_rules import apply_rules
from paceline.testing.scripted import ScriptedTree
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

MODEL = tiny_model("llama", context=128, std=0.12)
PROMPT = list(b"spam, spam, eggs and spam")
N = 30


class Odd(LogitsProcessor):
    """A processor that favours tokens depending on the length of the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros_like(scores)
        bias[:, input_ids.shape[1] % 7 :: 7] = 3.0
        return scores + bias


def siblings(tokens: Any, limit: int) -> tuple[list[int], list[int]]:
    """Return the tree of the text's bytes as siblings, each with one of them as its child."""
    if limit < 1:
        return [], []
    wide = sorted(set(tokens))[:20]
    deep = wide if limit > 1 else []
    return [*wide, *deep], [-1] * len(wide) + list(range(len(deep)))


@pytest.fixture(scope="module")
def pace() -> Pace:
    drafters = {
        "near": perturbed(MODEL, 0.05),
        "lookup": PromptLookup("lookup", PromptLookupSettings(min_ngram=1)),
        "tree": ScriptedTree("tree", siblings, 64),
    }
    config = Config(target=ModelSection(model="in memory"))
    return Pace(build_from_objects(MODEL, byte_tokenizer(), drafters, config))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        ({"suppress_tokens": range(0, 259, 2)}, {"suppress_tokens": list(range(0, 259, 2))}),
        ({"logit_bias": {7: 4.0, 9: -3.0}}, {"sequence_bias": [[[7], 4.0], [[9], -3.0]]}),
        ({"processors": [Odd()]}, {"logits_processor": LogitsProcessorList([Odd()])}),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2, 3]},
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2, 3]},
        ),
    ],
    ids=",".join,
)
def test_greedy_text_is_that_of_transformers(
    pace: Pace, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    with torch.inference_mode():
        output = MODEL.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=N,
            **theirs,
        )
    expected = output[0, len(PROMPT) :].tolist()
    plain = pace.complete(PROMPT, drafter="none", max_new_tokens=N).token_ids
    assert expected != plain, "the rule had no effect"

    for arm in pace.drafters:
        completion = pace.complete(PROMPT, drafter=arm, max_new_tokens=N, **ours)
        assert completion.token_ids == expected, arm


@pytest.mark.parametrize(
    "rules",
    [
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"presence_penalty": 1.5, "presence_scope": "all"},
        {"repetition_penalty": 4.0, "repetition_scope": "output"},
        {"forced_tokens": [5, 6, 7], "no_repeat_ngram_size": 2},
    ],
    ids=",".join,
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_drafter_writes_the_same_under_rules(
    pace: Pace, rules: dict[str, Any], temperature: float
) -> None:
    settings = {"max_new_tokens": N, "temperature": temperature, "seed": 3, **rules}
    texts = [pace.complete(PROMPT, drafter=arm, **settings).token_ids for arm in pace.drafters]

    assert all(text == texts[0] for text in texts)
    unruled = pace.complete(
        PROMPT, drafter="none", max_new_tokens=N, temperature=temperature, seed=3
    )
    assert texts[0] != unruled.token_ids


def test_forced_tokens_come_first_and_stops_wait_for_the_minimum(pace: Pace) -> None:
    forced = pace.complete(PROMPT, drafter="near", max_new_tokens=5, forced_tokens=[5, 6])
    assert forced.token_ids[:2] == [5, 6]

    stop = pace.complete(PROMPT, drafter="none", max_new_tokens=N).token_ids[3]
    request = pace.request(PROMPT, drafter="lookup", max_new_tokens=N, min_new_tokens=9)
    [held] = pace.stream([replace(request, stop_token_ids=frozenset({stop}))])
    assert stop not in held.token_ids[:9]


def apply(logits: list[float], text: list[int], num_prompt: int, **rules: Any) -> list[float]:
    changed = apply_rules(LogitRules(**rules), torch.tensor([logits]), [text], num_prompt)
    found: list[float] = changed[0].tolist()
    return found


def test_a_penalty_counts_the_text_of_its_scope() -> None:
    logits, text = [1.0, -1.0, 2.0, 3.0], [0, 1, 2, 2]
    penalised = apply(logits, text, 2, presence_penalty=0.5, frequency_penalty=0.25)
    assert penalised == [1.0, -1.0, 1.0, 3.0]
    everywhere = apply(logits, text, 2, presence_penalty=0.5, presence_scope="all")
    assert everywhere == [0.5, -1.5, 1.5, 3.0]
    assert apply(logits, text, 2, repetition_penalty=2.0) == [0.5, -2.0, 1.0, 3.0]
    output = apply(logits, text, 2, repetition_penalty=2.0, repetition_scope="output")
    assert output == [1.0, -1.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number from 0.001"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a number.*got nan"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"min_new_tokens": 50}, "min_new_tokens 50 is above max_new_tokens 30"),
        ({"logit_bias": {999: 1.0}}, "logit_bias names the token id 999"),
        ({"num_beams": 4}, "'num_beams' is not supported"),
        ({"repetition_penalti": 1.2}, "did you mean 'repetition_penalty'"),
    ],
)
def test_an_unsupported_rule_is_refused_by_name(
    pace: Pace, rules: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        pace.complete(PROMPT, drafter="none", max_new_tokens=N, **rules)


def test_a_processor_that_fails_ends_its_row(pace: Pace) -> None:
    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("what?")

    with pytest.raises(DecodingError, match="logit rules: KeyError: 'what\\?'"):
        pace.complete(PROMPT, drafter="near", max_new_tokens=N, processors=[broken])
