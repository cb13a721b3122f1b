"""The schema of a request: exact values are accepted, others are refused by name."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

import paceline
from paceline.assembly import Pace
from paceline.contracts import LogitRules, Request, SamplingParams
from paceline.errors import RequestError, shorten
from paceline.requests import SETTINGS, RequestSettings, read_prompt, read_request
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def pace() -> Pace:
    return paceline.load(target=tiny_model("llama"), tokenizer=byte_tokenizer(), drafters={})


class Hostile:
    """An object whose every method raises."""

    def __repr__(self) -> str:
        raise ValueError("no")

    def __len__(self) -> int:
        raise ValueError("no")

    def __iter__(self) -> Any:
        raise ValueError("no")


# setting -> values of a wrong type or out of range, for a request at temperature 1
# fmt: off
WRONG: dict[str, list[object]] = {
    "max_new_tokens": [0, -1, 2.5, 2.0, True, "5", None, [5], np.float32(5), torch.tensor([5])],
    "temperature": [-1.0, NAN, INF, -INF, 1e-40, 1e300, 10**400, True, "1", None, 1j],
    "top_k": [-1, 2.5, 2.0, True, "5", None, np.bool_(True), torch.tensor(2.0)],
    "top_p": [0, -0.1, 1.1, NAN, "0.9", True, None, np.array([0.5])],
    "min_p": [-0.1, 1, 1.0, NAN, "0.1", False, None],
    "seed": [1.5, 1.0, "1", True, [1], NAN, torch.tensor(1.0)],
    "sampling": ["beam", "greedy", None, 1, ["auto"]],
    "stop": [5, [5], [b"x"], b"x", "", ["a", ""], {"a": 1}, None, [None], ["\ud800"], Hostile()],
    "ignore_eos": [1, 0, "yes", None, torch.tensor(1)],
    "stop_token_ids": [5, "5", ["5"], [1.0], [True], [-1], [10**9], torch.tensor([[1]]), None],
    "drafter": [None, 5, "", "nobody", ["none"], b"none"],
    "logprobs": [1, "True", None, np.int64(1)],
    "logit_bias": [{5: NAN}, {5: INF}, {5: "1"}, {"5": 1.0}, {True: 1.0}, {5.0: 1.0}, {-1: 1.0},
     {10**9: 0.0}, {5: 1e39}, {5: 10**400}, [5], None, {5: True}],
    "repetition_penalty": [0.0, -1.0, NAN, INF, 1e-300, "1", True, None],
    "repetition_scope": ["prompt", None, True],
    "presence_penalty": [NAN, INF, 1e39, "1", True, None],
    "frequency_penalty": [NAN, -INF, 1e39, "1", True, None],
    "presence_scope": ["prompt", None, 0],
    "no_repeat_ngram_size": [-1, 2.5, True, "2", None],
    "min_new_tokens": [-1, 1.5, True, "2", None],
    "suppress_tokens": [5, ["a"], [1.5], [True], [-1], [10**9], "ab", {1: 2}, torch.ones(2), None],
    "forced_tokens": [5, [1.5], [True], ["a"], [-1], [10**9], np.ones((1, 2), dtype=int), None],
    "processors": [5, [5], None, [None], print],
}
# fmt: on


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
    ids=lambda value: value if isinstance(value, str) and value in WRONG else "",
)
def test_a_wrong_value_is_refused_with_the_name_of_its_setting(
    pace: Pace, name: str, value: object
) -> None:
    settings = {"drafter": "none", "temperature": 1.0, "max_new_tokens": 5, name: value}
    with pytest.raises(RequestError) as caught:
        pace.request([4, 5], **settings)

    message = str(caught.value)
    assert (name in message or "stop string is empty" in message) and "\n" not in message
    assert len(message) < 300


def test_every_setting_has_wrong_values_and_a_description() -> None:
    assert set(WRONG) == set(SETTINGS)
    assert all(field.description for field in RequestSettings.model_fields.values())


def of(**settings: Any) -> Request:
    return RequestSettings.read(settings).request((1,), "0")


@pytest.mark.parametrize("as_type", [np.int64, np.uint8, np.array, torch.tensor])
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(as_type: Any) -> None:
    request = of(
        max_new_tokens=as_type(7), temperature=1.0, top_k=as_type(3), seed=as_type(5),
        no_repeat_ngram_size=as_type(2), logit_bias={np.int64(4): as_type(1)},
    )  # fmt: skip

    assert request == of(
        max_new_tokens=7, temperature=1.0, top_k=3, seed=5, no_repeat_ngram_size=2,
        logit_bias={4: 1.0},
    )  # fmt: skip
    assert type(request.max_new_tokens) is type(request.sampling.top_k) is int
    assert type(request.sampling.seed) is int


@pytest.mark.parametrize(
    "as_type", [np.float64, np.array, partial(torch.tensor, dtype=torch.float64)]
)
def test_numbers_of_numpy_and_torch_are_numbers(as_type: Any) -> None:
    request = of(temperature=as_type(0.7), top_p=as_type(0.9), logprobs=np.bool_(True))

    assert (request.sampling.temperature, request.sampling.top_p) == (0.7, 0.9)
    assert type(request.sampling.temperature) is float and request.logprobs is True


@pytest.mark.parametrize("as_type", [list, tuple, set, frozenset, np.array, torch.tensor, deque])
def test_ids_may_be_in_any_collection(as_type: Any) -> None:
    ids = as_type([3, 9])
    request = of(suppress_tokens=ids, stop_token_ids=ids)

    assert request.rules == LogitRules(suppress_tokens=frozenset({3, 9}))
    assert request.stop_token_ids == {3, 9}


def test_a_bias_may_ban_and_rules_without_effect_are_none() -> None:
    assert of(logit_bias={5: -INF}).rules == LogitRules(logit_bias={5: -INF})
    assert of(repetition_penalty=1.0, suppress_tokens=[], logit_bias={}).rules is None


# --- seeds ----------------------------------------------------------------------------------------


def test_any_integer_is_a_seed_and_equal_seeds_give_equal_text(pace: Pace) -> None:
    def text(seed: object) -> list[int]:
        settings = {"temperature": 1.0, "max_new_tokens": 8, "ignore_eos": True}
        return pace.complete([1, 2], drafter="none", seed=seed, **settings).token_ids

    assert text(5) == text(5 + 2**64) == text(np.uint8(5))
    assert text(-1) == text(2**64 - 1) != text(1)
    assert text(-(10**30)) == text(-(10**30)) != text(10**30)
    assert len(text(10**5000)) == 8


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62, 2**63 - 1, -(2**63)])
def test_a_seed_of_64_bits_is_kept(seed: int) -> None:
    assert of(temperature=1.0, seed=seed).sampling.seed == seed


# --- prompts --------------------------------------------------------------------------------------

IDS = [72, 105]
MESSAGE = {"role": "user", "content": "Hi"}

# fmt: off
PROMPTS: list[Any] = [
     IDS, tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.uint8), torch.tensor(IDS),
    [np.int64(72), 105], [torch.tensor(72), torch.tensor(105)], range(72, 106, 33), "Hi",
]
NO_PROMPTS: list[Any] = [
     [True, False], [65.0, 66.0], [1, "a"], np.array([1.0]), torch.tensor([True]), torch.ones(2),
     torch.tensor([[1, 2]]), torch.tensor(1), np.array(["a"]), 5, None, b"abc", bytearray(b"a"),
     {1, 2}, object(), Hostile(), ["a", "b"], [[1, 2]], iter([1, 2]), "\ud800", [10**400],
     [MESSAGE, 5], [MESSAGE, "x"], {}, {"role": "user"}, {"content": "x"}, {1: 2},
     {"role": 5, "content": "x"}, {"role": "user", "content": 5}, [{"role": "user"}],
     {"role": "user", "content": "\ud800"}, torch.ones(2, dtype=torch.int64, device="meta"),
]
# fmt: on


@pytest.mark.parametrize(
    "prompt",
    PROMPTS,
    ids=str,
)
def test_a_prompt_may_be_text_or_ids_of_any_type(pace: Pace, prompt: Any) -> None:
    tokens = pace.request(prompt, drafter="none").prompt_tokens

    assert tokens == tuple(IDS)
    assert all(type(token) is int for token in tokens)
    assert pace.encode(prompt) == IDS


def test_one_message_is_a_conversation(pace: Pace) -> None:
    for prompt in (MESSAGE, [MESSAGE], (MESSAGE,)):
        tokens = pace.request(prompt, drafter="none").prompt_tokens
        assert tokens == tuple(pace.encode([MESSAGE]))


@pytest.mark.parametrize(
    "prompt",
    NO_PROMPTS,
    ids=lambda value: type(value).__name__,
)
def test_other_prompts_are_refused(pace: Pace, prompt: Any) -> None:
    with pytest.raises(RequestError, match=r"prompt|message") as caught:
        pace.request(prompt, drafter="none")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
def test_a_failing_template_is_a_request_error(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    bare = paceline.load(target=tiny_model("llama"), tokenizer=tokenizer, drafters={})

    with pytest.raises(RequestError, match="chat template cannot render the messages: ") as caught:
        bare.request([MESSAGE], drafter="none")
    assert isinstance(caught.value.__cause__, (jinja2.TemplateError, ZeroDivisionError))


# --- records made by hand -------------------------------------------------------------------------

GOOD = Request("0", (1, 2), 5, drafter="none")


@pytest.mark.parametrize(
    "request_",
    [
        replace(GOOD, id=5),
        replace(GOOD, prompt_tokens=(1.0, 2.0)),
        replace(GOOD, prompt_tokens=(True, False)),
        replace(GOOD, prompt_tokens=(1, 999)),
        replace(GOOD, prompt_tokens="ab"),
        replace(GOOD, max_new_tokens=2.5),
        replace(GOOD, sampling=None),
        replace(GOOD, sampling=SamplingParams(temperature=1.0)),
        replace(GOOD, sampling=SamplingParams(temperature=1.0, method="residual", top_k=2.5)),
        replace(GOOD, sampling=SamplingParams(temperature=1.0, method="residual", seed=None)),
        replace(GOOD, sampling=SamplingParams(top_p=0.5)),
        replace(GOOD, stop_token_ids=frozenset({"a"})),
        replace(GOOD, stop_strings=(5,)),
        replace(GOOD, drafter=None),
        replace(GOOD, rules={"min_new_tokens": 1}),
        replace(GOOD, rules=LogitRules(min_new_tokens=9)),
        replace(GOOD, rules=LogitRules(logit_bias={1: NAN})),
        replace(GOOD, logprobs="yes"),
        "a string",
        None,
    ],
    ids=str,
)
def test_a_record_made_by_hand_is_checked_everywhere(pace: Pace, request_: Any) -> None:
    for accept in (pace.engine.check, pace.engine.submit, lambda r: next(pace.stream([r]))):
        with pytest.raises(RequestError):
            accept(request_)
    assert pace.engine.num_waiting == 0


def test_a_record_made_by_hand_is_read_by_the_schema() -> None:
    sampling = SamplingParams(np.float64(1.0), np.int64(5), seed=2**64 + 3, method="invariant")
    made = replace(GOOD, prompt_tokens=np.array([1, 2]), sampling=sampling, rules=LogitRules())

    read = read_request(made)

    assert read == replace(
        GOOD, sampling=SamplingParams(1.0, 5, seed=3, method="invariant"), rules=None
    )
    assert read_request(read) == read


def test_a_request_is_checked_once(pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []
    validate = RequestSettings.model_validate

    def counted(settings: object) -> RequestSettings:
        reads.append(settings)
        return validate(settings)

    monkeypatch.setattr(RequestSettings, "model_validate", counted)

    request = pace.request([1, 2], drafter="none", max_new_tokens=2)
    assert pace.engine.check(request) is request
    next(pace.stream([request]))
    assert len(reads) == 1

    next(pace.stream([replace(request, max_new_tokens=3)]))  # another request
    assert len(reads) == 2
    other = paceline.load(target=pace.parts.target.model, tokenizer=byte_tokenizer(), drafters={})
    other.engine.check(request)  # another engine
    assert len(reads) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 2.5, "temperature": 1.0},
        {"stop": [5]},
        {"top_p": "0.9", "temperature": 1.0},
        {"max_new_tokens": 2.5},
        {"no_repeat_ngram_size": 2.5},
        {"repetition_penalty": 1.5, "repetition_scope": "prompt"},
        {"suppress_tokens": ["a"]},
        {"forced_tokens": [1.5]},
        {"min_new_tokens": 1.5},
        {"seed": 1.5, "temperature": 1.0},
        {"prompt": [True, False]},
        {"prompt": [65.0, 66.0]},
    ],
    ids=str,
)
def test_a_wrong_request_does_not_affect_a_row_in_flight(
    pace: Pace, settings: dict[str, Any]
) -> None:
    good = pace.engine.submit(pace.request([1, 2, 3], drafter="none", max_new_tokens=20))
    pace.engine.step()

    with pytest.raises(RequestError):
        pace.request(**{"prompt": [4, 5], "drafter": "none", "max_new_tokens": 5, **settings})

    done = None
    while done is None:
        done = next((p.completion for p in pace.engine.step() if p.ticket == good), None)
    assert (done.finish_reason, len(done.token_ids)) == ("length", 20)


def test_messages_show_a_value_in_one_short_line() -> None:
    assert shorten(5) == "5"
    assert len(shorten("x" * 1000)) == 80
    assert "\n" not in shorten(np.zeros((50, 50)))
    assert shorten(10**5000) == "a value of type int"
    assert shorten(Hostile()) == "a value of type Hostile"
    assert read_prompt("") == ""


class Unreadable(list[Any]):
    """A list that cannot be iterated."""

    def __iter__(self) -> Any:
        raise KeyError("iter")


class UnreadableMapping(dict[Any, Any]):
    """A mapping that cannot be iterated."""

    def __iter__(self) -> Any:
        raise KeyError("iter")

    keys = items = __iter__


MASKED = np.ma.array([1, 2], mask=[False, True])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stop_token_ids", torch.tensor([1, 2]).to_sparse()),
        ("stop_token_ids", np.array([1], dtype="m8[s]")),
        ("forced_tokens", MASKED),
        ("suppress_tokens", Unreadable([1])),
        ("stop", Unreadable(["a"])),
        ("processors", Unreadable([1])),
        ("logit_bias", UnreadableMapping({1: 1.0})),
        ("logit_bias", {10**5000: "x"}),
        pytest.param("min_new_tokens", 10**5000, id="more digits than are printed"),
        ("prompt", MASKED),
        ("prompt", Unreadable([1])),
        ("prompt", UnreadableMapping({"role": "user"})),
    ],
)
def test_unreadable_values_are_refused_by_name(pace: Pace, setting: str, value: Any) -> None:
    settings = {"prompt": "a", "drafter": "none", setting: value}
    with pytest.raises(
        RequestError,
        match="message" if isinstance(value, dict) and setting == "prompt" else setting,
    ):
        pace.request(**settings)
