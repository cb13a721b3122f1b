"""The loop around the rounds: rows in flight, counts, and the state after errors."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from support.reference import greedy_reference

from paceline.contracts import Completion, Context, Decision, Drafts, Request, SamplingParams
from paceline.drafting.draft_model import DraftModel
from paceline.drafting.none import NoneDrafter
from paceline.engine import Driver, Engine
from paceline.errors import DecodingError, RequestError
from paceline.models.language_model import LanguageModel
from paceline.testing.scripted import ScriptedDrafter, copying
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.drafting.base import Drafter
    from paceline.engine.loop import Choose

PROMPT = tuple(b"to be or not to be")
CONTEXT = 64
TOKENIZER = byte_tokenizer()
MODEL = tiny_model("llama", context=CONTEXT)
OUTPUT = greedy_reference(MODEL, PROMPT, 30).tokens


def decode(tokens: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(tokens), skip_special_tokens=True)
    return text


def engine_with(
    *drafters: Drafter, max_rows: int = 4, chunk: int = 512, choose: Choose | None = None
) -> Engine:
    arms = {drafter.name: drafter for drafter in (NoneDrafter(), *drafters)}
    target = LanguageModel(MODEL, "target")
    return Engine(target, arms, decode, choose, max_rows=max_rows, prefill_chunk=chunk)


def request(id: str = "0", n: int = 20, drafter: str = "none", **fields: object) -> Request:
    return Request(id, fields.pop("prompt", PROMPT), n, drafter=drafter, **fields)


def slots_in_use(engine: Engine) -> int:
    cache = engine.target.cache
    return cache.num_rows


# --- what is counted ------------------------------------------------------------------------------


def assert_consistent(completion: Completion, emitted_by_target: int) -> None:
    """The first token comes with the prefill; a round emits what it accepts and one token more."""
    accepted = sum(r.accepted for r in completion.rounds)
    assert len(completion.token_ids) == 1 + accepted + emitted_by_target
    assert all(0 <= r.accepted <= r.drafted for r in completion.rounds)
    parts = completion.seconds
    assert min(parts.prefill, parts.choose, parts.draft, parts.verify, parts.commit) >= 0.0
    assert 0.0 < parts.total <= completion.seconds_total


def test_counts_and_seconds_of_a_completion_agree() -> None:
    near = LanguageModel(perturbed(MODEL, 0.05), "near")
    drafters = [
        DraftModel("near", near, 4, 259, 259),
        ScriptedDrafter("right", copying([*PROMPT, *OUTPUT]), num_draft_tokens=3),
        ScriptedDrafter("wrong", lambda tokens, limit: [0] * limit),
    ]
    engine = engine_with(*drafters, max_rows=3)
    arms = ["near", "right", "wrong", "none"]
    requests = [request(f"{arm} {n}", n, arm) for arm in arms for n in (1, 2, 7, 20)]

    done = {c.request_id: c for c in Driver(engine).generate(requests)}

    for asked in requests:
        completion = done[asked.id]
        assert_consistent(completion, emitted_by_target=len(completion.rounds))
        assert len(completion.token_ids) == asked.max_new_tokens
        assert completion.num_prompt_tokens == len(PROMPT)
        assert completion.text == decode(completion.token_ids)
        if asked.max_new_tokens > 1:
            assert completion.drafter == completion.decision.arm == asked.drafter
            rounds = len(completion.rounds)
            assert completion.block_efficiency == (asked.max_new_tokens - 1) / rounds
    # 19 tokens after the first: 4 rounds of 3 accepted and one more, then 2 and one more
    assert [r.accepted for r in done["right 20"].rounds] == [3, 3, 3, 3, 2]
    assert len(done["none 20"].rounds) == 19
    assert done["none 1"].rounds == [] and done["none 1"].block_efficiency == 1.0


def test_a_stop_inside_an_accepted_run_leaves_the_rest_uncounted() -> None:
    right = ScriptedDrafter("right", copying([*PROMPT, *OUTPUT]), num_draft_tokens=4)
    place = next(i for i in (7, 8, 6, 2, 3) if OUTPUT[i] not in OUTPUT[:i])
    stop = frozenset({OUTPUT[place]})

    [completion] = Driver(engine_with(right)).generate(
        [request(drafter="right", stop_token_ids=stop)]
    )

    assert completion.token_ids == OUTPUT[: place + 1]
    assert completion.rounds[-1].drafted == 4
    assert completion.rounds[-1].accepted == place % 5
    assert_consistent(completion, emitted_by_target=len(completion.rounds) - 1)


def test_a_draft_is_never_longer_than_what_may_still_be_emitted() -> None:
    right = ScriptedDrafter("right", copying([*PROMPT, *OUTPUT]), num_draft_tokens=8)
    list(Driver(engine_with(right)).generate([request(n=n, drafter="right") for n in (2, 3, 12)]))

    by_row = {i: [len(d) for row, d in right.proposed if row == i] for i in range(3)}
    assert by_row == {0: [0], 1: [1], 2: [8, 1]}


# --- rows come and go -----------------------------------------------------------------------------


def test_rows_join_and_leave_between_rounds() -> None:
    engine = engine_with(max_rows=2)
    lengths = [3, 12, 5, 1, 4, 2]
    rows_of_forward: list[int] = []
    forward = engine.target.forward
    engine.target.forward = lambda tokens, spans, *rest: (
        rows_of_forward.append(len(spans)) or forward(tokens, spans, *rest)
    )

    done = list(Driver(engine).generate([request(str(i), n) for i, n in enumerate(lengths)]))

    assert {c.request_id: c.token_ids for c in done} == {
        str(i): OUTPUT[:n] for i, n in enumerate(lengths)
    }
    assert [c.request_id for c in done][:2] == ["0", "2"]  # a short one overtakes the long one
    assert max(rows_of_forward) == 2
    assert engine.target.cache.num_slots <= 2
    assert slots_in_use(engine) == 0


def test_a_generator_that_is_given_up_gives_its_rows_back() -> None:
    drafter = DraftModel("near", LanguageModel(perturbed(MODEL, 0.05), "near"), 4, 259, 259)
    engine = engine_with(drafter)
    stream = Driver(engine).generate([request("0", 2, "near"), request("1", 30, "near")])
    next(stream)
    assert slots_in_use(engine) == 1

    stream.close()

    assert slots_in_use(engine) == 0
    assert drafter._states == {}


def test_requests_are_checked_before_any_is_begun() -> None:
    engine = engine_with()
    stream = Driver(engine).generate([request("fine"), request("bad", n=0)])

    with pytest.raises(RequestError, match="max_new_tokens"):
        next(stream)
    assert engine.target.cache.num_bytes() == 0


def test_requests_may_come_from_a_generator() -> None:
    done = list(Driver(engine_with()).generate(request(str(i), 3) for i in range(3)))

    assert [c.token_ids for c in done] == [OUTPUT[:3]] * 3


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [512, 5])
def test_choose_sees_the_prefill_and_the_load(chunk: int) -> None:
    contexts: list[Context] = []

    def choose(context: Context) -> Decision:
        contexts.append(context)
        return Decision("wrong", 0.25, {"wrong": 1.0}, "mine")

    wrong = ScriptedDrafter("wrong", lambda tokens, limit: [0] * limit)
    engine = engine_with(wrong, chunk=chunk, choose=choose)
    sampling = SamplingParams()
    short = tuple(b"spam")

    done = list(
        Driver(engine).generate([request("a", 4, "auto"), request("b", 4, "auto", prompt=short)])
    )

    assert [c.request_id for c in contexts] == ["a", "b"]
    for context, prompt in zip(contexts, (PROMPT, short), strict=True):
        with torch.inference_mode():
            hidden = MODEL.base_model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(context.mean_hidden, hidden.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(context.last_hidden, hidden[-1], atol=1e-4)
        assert tuple(context.prompt_tokens) == prompt
        assert context.sampling == sampling
        assert context.rows_in_flight == 2
    assert {c.drafter for c in done} == {"wrong"}
    assert done[0].decision == Decision("wrong", 0.25, {"wrong": 1.0}, "mine")


def loads_of(
    engine: Engine, contexts: Sequence[Context], arrivals: Sequence[Sequence[Request]]
) -> list[int]:
    """Submit one group of requests before each step, and decode; return the loads that were seen."""
    left = list(arrivals)
    while left or engine.has_work:
        for one in left.pop(0) if left else ():
            engine.submit(one)
        engine.step()
    return [context.rows_in_flight for context in contexts]


def asking(max_rows: int, **settings: int) -> tuple[Engine, list[Context]]:
    contexts: list[Context] = []

    def choose(context: Context) -> Decision:
        contexts.append(context)
        return Decision("none")

    arms = {"none": NoneDrafter()}
    target = LanguageModel(MODEL, "target")
    return Engine(target, arms, decode, choose, max_rows=max_rows, **settings), contexts


@pytest.mark.parametrize("chunk", [512, 5])
def test_the_load_is_the_number_of_rows_that_decode_together(chunk: int) -> None:
    """Every request of a batch, the first one too, sees the rows that have a seat."""
    engine, contexts = asking(3, prefill_chunk=chunk)
    batch = [request(str(i), 10, "auto") for i in range(5)]

    loads = loads_of(engine, contexts, [batch])

    assert loads[:3] == [3, 3, 3]
    assert len(loads) == 5 and loads[4] == 2


def test_choose_sees_the_drafters_of_the_other_rows() -> None:
    """Those in use and those that a request names, without rows that have ended or not chosen yet."""
    contexts: list[Context] = []

    def choose(context: Context) -> Decision:
        contexts.append(context)
        return Decision(f"wrong@{len(contexts)}")

    wrong, other = (
        ScriptedDrafter(name, lambda tokens, limit: [0] * limit) for name in ("wrong", "other")
    )
    engine = engine_with(wrong, other, max_rows=5, choose=choose)
    for id, drafter, n in (
        ("a", "other@2", 9), ("b", "auto", 9), ("c", "auto", 9), ("d", "none", 9), ("e", "none", 1),
    ):  # fmt: skip
        engine.submit(request(id, n, drafter))
    engine.step()
    engine.submit(request("f", 9, "auto"))
    engine.step()

    assert [dict(context.drafters_in_flight) for context in contexts] == [
        {"other": 1, "none": 1},
        {"other": 1, "none": 1, "wrong": 1},
        {"other": 1, "none": 1, "wrong": 2},
    ]
    assert [context.rows_in_flight for context in contexts] == [4, 4, 5]


def test_a_row_that_ended_with_its_prefill_is_no_load() -> None:
    engine, contexts = asking(4)

    loads = loads_of(engine, contexts, [[request("a", 10, "auto"), request("b", 1, "auto")]])

    assert loads == [1]


def test_requests_that_arrive_during_a_prefill_are_part_of_the_load() -> None:
    """They are admitted before the next round."""
    engine, contexts = asking(4)
    score = engine._prefill.step

    def step(rows: Sequence[object]) -> object:
        if not contexts and engine.num_waiting == 0:
            engine.submit(request("b", 10, "auto"))
        return score(rows)

    engine._prefill.step = step  # type: ignore[assignment, method-assign]

    assert loads_of(engine, contexts, [[request("a", 10, "auto")]]) == [2, 2]


def test_a_request_that_must_wait_for_memory_is_no_load() -> None:
    engine, contexts = asking(4, max_positions=64)
    long = [request(str(i), 40, "auto") for i in range(2)]

    assert loads_of(engine, contexts, [long]) == [1, 1]


def test_requests_that_name_a_drafter_are_not_asked_about() -> None:
    def choose(context: Context) -> Decision:
        raise AssertionError("asked")

    engine = engine_with(choose=choose)

    assert [c.drafter for c in Driver(engine).generate([request(), request("1", 1, "auto")])] == [
        "none"
    ] * 2


# --- errors while decoding ------------------------------------------------------------------------


class TooMany(ScriptedDrafter):
    """Proposes more than it may."""

    def draft(self, tokens: Sequence[int], limit: int) -> list[int]:
        return [0] * (limit + 1)


class ForOthers(ScriptedDrafter):
    """Proposes for another number of rows than it was asked for."""

    def propose(self, rows: Sequence[object], limits: Sequence[int]) -> Drafts:
        return Drafts(torch.zeros(3, 1, dtype=torch.int64), [1] * 3)


class Failing(ScriptedDrafter):
    """Cannot start."""

    def start(self, rows: Sequence[object]) -> None:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("drafter", "words"),
    [
        (TooMany("odd", list), r"'odd': proposed 20 tokens where 8 were allowed"),
        (ForOthers("odd", list), r"'odd': proposed for 3 rows instead of 1"),
        (Failing("odd", list), r"'odd': out of memory"),
    ],
)
def test_an_error_in_a_drafter_leaves_the_engine_usable(drafter: Drafter, words: str) -> None:
    engine = engine_with(drafter)
    requests = [request("0", 20, "none"), request("1", 21, "odd")]

    with pytest.raises(DecodingError, match=words):
        list(Driver(engine).generate(requests))

    assert slots_in_use(engine) == 0
    [completion] = Driver(engine).generate([request()])
    assert completion.token_ids == OUTPUT[:20]


def test_an_error_while_choosing_leaves_the_engine_usable() -> None:
    answers = itertools.chain([Decision("none"), Decision("gone", policy="old")])
    engine = engine_with(choose=lambda context: next(answers))

    with pytest.raises(
        DecodingError, match=r"policy: unknown drafter 'gone'; there are: auto, none"
    ):
        list(Driver(engine).generate([request("0", drafter="auto"), request("1", drafter="auto")]))

    assert slots_in_use(engine) == 0
    assert next(Driver(engine).generate([request()])).token_ids == OUTPUT[:20]


# --- drafts that the target cannot read -----------------------------------------------------------


@pytest.mark.parametrize("unknown", [259, 100_000, -1])
@pytest.mark.parametrize("method", ["greedy", "residual"])
def test_a_drafted_id_outside_the_vocabulary_is_rejected(unknown: int, method: str) -> None:
    greedy = method == "greedy"
    sampling = SamplingParams() if greedy else SamplingParams(1.0, seed=4, method="residual")
    plain = next(Driver(engine_with()).generate([request(sampling=sampling)])).token_ids
    right = copying([*PROMPT, *plain])

    def second_is_unknown(tokens: Sequence[int], limit: int) -> list[int]:
        draft = list(right(tokens, limit))
        draft[1:2] = [unknown] * len(draft[1:2])
        return draft

    drafter = ScriptedDrafter("odd", second_is_unknown, num_draft_tokens=4)
    [completion] = Driver(engine_with(drafter)).generate(
        [request(drafter="odd", sampling=sampling)]
    )

    assert completion.token_ids == plain
    assert {r.accepted for r in completion.rounds[:-1]} == {1}


class WiderVocabulary(ScriptedDrafter):
    """Draws its only token from outside the vocabulary half of the time, and says so."""

    def propose(self, rows: Sequence[object], limits: Sequence[int]) -> Drafts:
        tokens = [[259] if row.sampling.seed % 2 else [int(OUTPUT[0])] for row in rows]
        q = torch.zeros(len(rows), 1, 259)
        q[:, 0, OUTPUT[0]] = 0.5
        return Drafts(torch.tensor(tokens), [min(1, limit) for limit in limits], q)


def test_an_unknown_stochastic_token_counts_as_a_rejection() -> None:
    drafter = WiderVocabulary("wide", list, num_draft_tokens=1)
    requests = [
        request(str(seed), 3, "wide", sampling=SamplingParams(1.0, seed=seed, method="residual"))
        for seed in range(1, 40, 2)
    ]

    for completion in Driver(engine_with(drafter)).generate(requests):
        assert [(r.drafted, r.accepted) for r in completion.rounds] == [(1, 0), (0, 0)]


def test_an_arm_with_a_length_drafts_no_more_than_that() -> None:
    right = ScriptedDrafter("right", copying([*PROMPT, *OUTPUT]), num_draft_tokens=4)
    engine = engine_with(right)

    [short] = Driver(engine).generate([request(drafter="right@2")])

    assert short.token_ids == OUTPUT[:20]
    # 19 tokens after the first: 6 rounds of 2 accepted and one more, then the last token
    assert [(r.drafted, r.accepted) for r in short.rounds] == [*[(2, 2)] * 6, (0, 0)]
    assert (short.drafter, short.decision.arm) == ("right", "right@2")


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("right@5", "'right@5': drafter 'right' drafts up to 4 tokens; ask for fewer"),
        ("right@0", "'right@0': a draft length must be a whole number of tokens, at least 1"),
        ("right@", "'right@': a draft length"),
        ("none@1", "'none@1': drafter 'none' drafts up to 0 tokens"),
        ("gone@2", "unknown drafter 'gone'; there are: auto, none, right"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_from_request_and_policy(arm: str, words: str) -> None:
    right = ScriptedDrafter("right", copying([*PROMPT, *OUTPUT]), num_draft_tokens=4)
    engine = engine_with(right, choose=lambda context: Decision(arm))

    with pytest.raises(RequestError, match=re.escape(words)):
        list(Driver(engine).generate([request(drafter=arm)]))
    with pytest.raises(DecodingError, match=re.escape(words)):
        list(Driver(engine).generate([request(drafter="auto")]))
    assert slots_in_use(engine) == 0
