"""Greedy text is transformers' own, token by token, for every drafter, batch and way to end.

References come from `generate(do_sample=False)`; none may pass through a near tie, where two right
answers exist, so that nothing here can flake.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.examples import EXAMPLES, OTHER_KINDS, add_examples
from support.reference import greedy_reference

from paceline.assembly import Pace, Parts, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import Decision, Request
from paceline.drafting.catalog import CATALOG
from paceline.testing.scripted import ScriptedDrafter, copying
from paceline.testing.tiny_models import (
    ARCHITECTURES,
    FAMILIES,
    WITHOUT_SUBSETS,
    perturbed,
    tiny_model,
)
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

    from paceline.contracts import Completion, Context, PromptRecord
    from paceline.drafting.base import Drafter
    from paceline.engine.loop import Choose

NEAR_TIE = 1e-4
CONTEXT = 64  # of the tiny targets
ARMS = ("none", "self", "near", "random", *OTHER_KINDS)


@dataclass
class Subject:
    """A target, its arms' drafters by name, and prompts."""

    parts: Parts
    prompts: list[tuple[int, ...]]
    known: dict[tuple[object, ...], list[int]] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        return self.parts.target.model

    @property
    def context(self) -> int:
        return self.parts.target.context_length

    def reference(
        self, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: tuple[int, ...] = ()
    ) -> list[int]:
        """transformers' greedy tokens."""
        key = (tuple(prompt), max_new_tokens, stop_token_ids)
        if key not in self.known:
            found = greedy_reference(self.model, *key)
            assert found.margin > NEAR_TIE, "a near tie: choose another prompt or seed"
            self.known[key] = found.tokens
        return self.known[key]

    def pace(
        self,
        max_rows: int = 3,
        prefill_chunk: int = 512,
        choose: Choose | None = None,
        extra: Mapping[str, Drafter] | None = None,
    ) -> Pace:
        """An engine of its own around the shared models."""
        p = self.parts
        engine = EngineSection(max_rows=max_rows, prefill_chunk=prefill_chunk)
        config = p.config.model_copy(update={"engine": engine})
        drafters = {**p.drafters, **(extra or {})}
        return Pace(Parts(config, p.target, p.tokenizer, p.vocabulary, drafters), choose)


def tiny_subject(architecture: str) -> Subject:
    seed = 9 if architecture in FAMILIES else 1  # texts of many tokens
    model, tokenizer = tiny_model(architecture, seed, context=CONTEXT), byte_tokenizer()
    parts = build_from_objects(
        model,
        tokenizer,
        # the random drafter's context ends before the target's
        arms_of(model, tiny_model("llama", seed=77, context=48)),
        Config(target=ModelSection(model="in memory")),
    )
    if architecture not in WITHOUT_SUBSETS:  # one of the examples leaves out sub-layers
        add_examples(parts)
    texts = ["a", "ab", "to be or not to be or not", "spam, spam, eggs and spam; spam, spam, eggs"]
    return Subject(parts, [tuple(tokenizer(text)["input_ids"]) for text in texts])


def zoo_subject(zoo: Parts, records: Sequence[PromptRecord]) -> Subject:
    model = zoo.target.model
    random = tiny_model("llama", seed=77, vocab_size=model.config.vocab_size, context=512)
    made = build_from_objects(model, zoo.tokenizer, arms_of(model, random), zoo.config)
    drafters = {**made.drafters, **zoo.drafters}
    parts = add_examples(Parts(zoo.config, zoo.target, zoo.tokenizer, zoo.vocabulary, drafters))
    encode = Pace(parts).encode
    prompts = [tuple(encode([{"role": "user", "content": r.prompt}])) for r in records]
    return Subject(parts, [(300,), *prompts])


def arms_of(target: PreTrainedModel, random: PreTrainedModel) -> dict[str, object]:
    """Drafters that are always, often, never and sometimes right."""
    return {
        "self": target,
        "near": perturbed(target, 0.05),
        "random": random,
    }


@pytest.fixture(scope="module")
def subjects(zoo_target: Parts, prompts: list[PromptRecord]) -> Callable[[str], Subject]:
    built: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in built:
            built[name] = zoo_subject(zoo_target, prompts) if name == "zoo" else tiny_subject(name)
        return built[name]

    return get


WIDE_FAMILIES = [
    pytest.param(family, marks=pytest.mark.wide)
    for family in FAMILIES
    if family not in WITHOUT_SUBSETS
]


@pytest.fixture(params=[*ARCHITECTURES, *WIDE_FAMILIES, "zoo"])
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


@pytest.fixture
def zoo(subjects: Callable[[str], Subject]) -> Subject:
    return subjects("zoo")


def run(pace: Pace, requests: Sequence[Request]) -> list[Completion]:
    """Completions in the requests' order."""
    done = {completion.request_id: completion for completion in pace.stream(requests)}
    return [done[request.id] for request in requests]


def requests_for(
    pace: Pace,
    cases: Sequence[tuple[Sequence[int], int]],
    arms: Sequence[str],
    **settings: object,
) -> list[Request]:
    """A request a (prompt, max_new_tokens), the arms taken in turn."""
    settings = {"ignore_eos": True, **settings}
    return [
        pace.request(prompt, id=str(i), max_new_tokens=n, drafter=arm, **settings)
        for i, ((prompt, n), arm) in enumerate(zip(cases, itertools.cycle(arms), strict=False))
    ]


def assert_exact(pace: Pace, subject: Subject, requests: Sequence[Request]) -> list[Completion]:
    completions = run(pace, requests)
    for request, completion in zip(requests, completions, strict=True):
        expected = subject.reference(request.prompt_tokens, request.max_new_tokens)
        assert completion.token_ids == expected, (request.drafter, request.id)
        assert completion.finish_reason == "length"
    return completions


# --- every drafter, every mix ---------------------------------------------------------------------


def test_every_kind_of_drafter_is_tested_here(subjects: Callable[[str], Subject]) -> None:
    assert set(EXAMPLES) == set(CATALOG)
    assert {d.kind for d in subjects("llama").parts.drafters.values()} == set(CATALOG)


@pytest.mark.parametrize("arm", ARMS)
def test_text_is_the_targets_own_whatever_drafts(subject: Subject, arm: str) -> None:
    pace = subject.pace(max_rows=3)
    cases = [(prompt, 28) for prompt in subject.prompts]

    completions = assert_exact(pace, subject, requests_for(pace, cases, [arm]))

    rounds = [r for completion in completions for r in completion.rounds]
    drafted, accepted = sum(r.drafted for r in rounds), sum(r.accepted for r in rounds)
    if arm == "self":
        assert accepted == drafted > 0
    elif arm == "near":
        assert 0 < accepted < drafted
    elif arm != "none":
        assert accepted < drafted


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_go_their_own_way_write_their_own_text(
    subjects: Callable[[str], Subject], family: str
) -> None:
    """Drafts right and wrong, chains and trees, in batches and in pieces, in one run."""
    subject = subjects(family)
    pace = subject.pace(max_rows=4, prefill_chunk=7)
    arms = [arm for arm in ARMS if arm in subject.parts.drafters]
    limits = itertools.cycle([28, 5, 28, 11])
    prompts = itertools.islice(itertools.cycle(subject.prompts), 2 * len(arms) - 1)

    assert_exact(pace, subject, requests_for(pace, [(p, next(limits)) for p in prompts], arms))

    said = {token for prompt in subject.prompts for token in subject.reference(prompt, 28)}
    assert len(said) > 15, "a degenerate text proves little"


def test_trained_drafters_leave_the_text_as_it_is(zoo: Subject, zoo_target: Parts) -> None:
    arms = [name for name in zoo_target.drafters if name.startswith("draft-")] or ["none"]
    pace = zoo.pace(max_rows=4)
    cases = [(prompt, 28) for prompt in zoo.prompts[1:4] for _ in arms]

    assert_exact(pace, zoo, requests_for(pace, cases, arms))


@pytest.mark.parametrize("turn", range(len(ARMS)))
def test_batches_may_mix_drafters_lengths_and_limits(tiny: Subject, turn: int) -> None:
    pace = tiny.pace(max_rows=4, prefill_chunk=20)
    limits = itertools.cycle([28, 1, 3, 11, 2, 28, 7])
    cases = [(prompt, next(limits)) for prompt in [*tiny.prompts, *tiny.prompts[::-1]]]

    assert_exact(pace, tiny, requests_for(pace, cases, ARMS[turn:] + ARMS[:turn]))


def test_the_zoos_batches_may_mix_drafters_lengths_and_limits(zoo: Subject) -> None:
    pace = zoo.pace(max_rows=4, prefill_chunk=100)
    limits = itertools.cycle([28, 1, 3, 11, 2, 28])
    cases = [(prompt, next(limits)) for prompt in [*zoo.prompts, *zoo.prompts[3::-1]]]

    assert_exact(pace, zoo, requests_for(pace, cases, ARMS[::-1]))


def test_whatever_auto_chooses_the_text_is_the_same(subject: Subject) -> None:
    arms = itertools.cycle(ARMS)
    asked: list[Context] = []

    def choose(context: Context) -> Decision:
        asked.append(context)
        return Decision(arm=next(arms), policy="cycle")

    pace = subject.pace(max_rows=3, choose=choose)
    num_cases = max(len(ARMS), len(subject.prompts)) + 2
    cases = [(p, 28) for p in itertools.islice(itertools.cycle(subject.prompts), num_cases)]

    completions = assert_exact(pace, subject, requests_for(pace, cases, ["auto"]))

    assert {c.drafter for c in completions} == set(ARMS)
    assert all(c.decision.arm == c.drafter for c in completions)
    assert len(asked) == len(cases)


@pytest.mark.parametrize("chunk", [1, 2, 5, 13])
def test_prompts_may_be_prefilled_in_pieces(tiny: Subject, chunk: int) -> None:
    pace = tiny.pace(max_rows=3, prefill_chunk=chunk)
    cases = [(prompt, 12) for prompt in tiny.prompts]

    assert_exact(pace, tiny, requests_for(pace, cases, ["self", "near", "none", "random"]))


def test_the_zoos_prompts_may_be_prefilled_in_pieces(zoo: Subject) -> None:
    pace = zoo.pace(max_rows=3, prefill_chunk=17)
    cases = [(prompt, 28) for prompt in zoo.prompts[:4]]

    assert_exact(pace, zoo, requests_for(pace, cases, ["self", "random", "prompt_lookup"]))


# --- the end of the context -----------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_decoding_goes_on_to_the_last_position_of_the_context(tiny: Subject, arm: str) -> None:
    pace = tiny.pace(max_rows=3)
    lengths = [CONTEXT, CONTEXT - 1, CONTEXT - 2, CONTEXT - 7, 40]
    cases = [(tuple(range(10, 10 + length)), 1000) for length in lengths]

    completions = assert_exact(pace, tiny, requests_for(pace, cases, [arm]))

    assert [len(c.token_ids) for c in completions] == [CONTEXT + 1 - n for n in lengths]


def test_the_zoos_context_can_be_filled(zoo: Subject) -> None:
    text = list(itertools.islice(itertools.cycle([t for p in zoo.prompts[1:7] for t in p]), 1024))
    pace = zoo.pace(max_rows=4)
    cases = [(text[:length], 99) for length in (1023, 1013)]

    completions = assert_exact(pace, zoo, requests_for(pace, cases, ["self", "near"]))

    assert [len(c.token_ids) for c in completions] == [2, 12]


# --- stops ----------------------------------------------------------------------------------------


def first_times(tokens: Sequence[int]) -> list[int]:
    """Places whose token did not occur before them."""
    return [i for i, token in enumerate(tokens) if token not in tokens[:i]]


@pytest.mark.parametrize("arm", [*ARMS, "copying"])
def test_a_stop_token_ends_the_text_wherever_it_falls(tiny: Subject, arm: str) -> None:
    prompt = tiny.prompts[2]
    reference = tiny.reference(prompt, 28)
    # drafts of 4 that are all right: places 1 to 4 are accepted, 5 is the bonus, 6 to 9 accepted
    script = ScriptedDrafter("copying", copying([*prompt, *reference]), num_draft_tokens=4)
    pace = tiny.pace(extra={"copying": script})
    places = [i for i in first_times(reference) if i < 10]
    assert 0 in places and {1, 2, 3, 6, 7, 8} & set(places)
    requests = [
        Request(str(i), prompt, 28, stop_token_ids=frozenset({reference[i]}), drafter=arm)
        for i in places
    ]

    for place, completion in zip(places, run(pace, requests), strict=True):
        assert completion.token_ids == reference[: place + 1]
        assert completion.finish_reason == "stop"
        assert completion.text == pace.parts.detokenizer(reference[:place])
        if arm in ("self", "copying") and place % 5 in (1, 2, 3):
            assert completion.rounds[-1].accepted < completion.rounds[-1].drafted


@pytest.mark.parametrize("arm", ARMS)
def test_answers_end_where_transformers_ends_them(zoo: Subject, arm: str) -> None:
    stop = zoo.model.generation_config.eos_token_id
    pace = zoo.pace(max_rows=4)
    prompts = [zoo.prompts[i] for i in (1, 3, 5, 6)]
    requests = requests_for(pace, [(p, 28) for p in prompts], [arm], ignore_eos=False)

    completions = run(pace, requests)

    for prompt, completion in zip(prompts, completions, strict=True):
        reference = zoo.reference(prompt, 28, (stop,))
        assert completion.token_ids == reference
        assert completion.finish_reason == ("stop" if reference[-1] == stop else "length")
    assert {c.finish_reason for c in completions} == {"stop", "length"}


@pytest.mark.parametrize("arm", ["none", "self", "near", "prompt_lookup", "copying"])
def test_a_stop_string_ends_the_text_at_the_token_that_completes_it(zoo: Subject, arm: str) -> None:
    prompt = zoo.prompts[1]
    reference = zoo.reference(prompt, 24)
    script = ScriptedDrafter("copying", copying([*prompt, *reference]), num_draft_tokens=4)
    pace = zoo.pace(max_rows=4, extra={"copying": script})
    decode = pace.parts.detokenizer
    pieces = [decode([token]) for token in reference]
    # from the middle of one token to the middle of the next but one
    stops = [
        pieces[i][-1:] + pieces[i + 1] + pieces[i + 2][:1]
        for i in range(len(pieces) - 2)
        if len(pieces[i]) > 1 and len(pieces[i + 2]) > 1
    ][:6]
    assert len(stops) >= 4
    stops.append(decode(reference)[7])  # a single character
    requests = [
        pace.request(prompt, id=str(i), max_new_tokens=24, stop=stop, drafter=arm)
        for i, stop in enumerate(stops)
    ]

    completions = run(pace, requests)

    for stop, completion in zip(stops, completions, strict=True):
        length = next(n for n in range(1, 25) if stop in decode(reference[:n]))
        assert completion.token_ids == reference[:length]
        assert completion.text == decode(reference).split(stop)[0]
        assert completion.finish_reason == "stop"
    if arm == "copying":  # inside an accepted run
        assert any(c.rounds and c.rounds[-1].accepted < c.rounds[-1].drafted for c in completions)


# --- what the engine does to models ---------------------------------------------------------------


def test_a_model_that_was_handed_in_generates_with_transformers_as_before(tiny: Subject) -> None:
    prompt = tiny.prompts[2]
    implementations = [m.config._attn_implementation for m in tiny.model.modules() if has_config(m)]
    before = greedy_reference(tiny.model, prompt, 20)
    pace = tiny.pace()
    stream = pace.stream(requests_for(pace, [(prompt, 1), (prompt, 20)], ["self"]))

    next(stream)
    between_rounds = greedy_reference(tiny.model, prompt, 20)
    list(stream)

    assert between_rounds == before == greedy_reference(tiny.model, prompt, 20)
    assert implementations == [
        m.config._attn_implementation for m in tiny.model.modules() if has_config(m)
    ]


def has_config(module: torch.nn.Module) -> bool:
    return hasattr(module, "config")


def test_a_round_is_one_forward_of_the_target_for_all_rows(
    tiny: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafters = {k: tiny.parts.drafters[k] for k in ("near", "random", "prompt_lookup")}
    pace = tiny.pace(max_rows=8)
    calls: list[int] = []  # rows of each forward
    bodies: list[object] = []
    target: Any = tiny.parts.target

    def count(owner: Any, name: str, note: Any) -> None:
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: note(given) or own(*given))

    count(target, "forward", lambda given: calls.append(len(given[1])))
    count(target._forward, "hidden", bodies.append)
    if target.forward_kind == "compiled":  # which scores without them
        count(target, "score", lambda given: calls.append(len(given[1])))
        count(target._forward, "score", bodies.append)
    cases = [(p, n) for p in tiny.prompts for n in (20, 9)]

    completions = run(pace, requests_for(pace, cases, [*drafters, "none"]))

    assert sum(len(prompt) for prompt, _ in cases) < 512  # one prefill
    rounds = [len(c.rounds) for c in completions]
    still_running = [sum(n > i for n in rounds) for i in range(max(rounds))]
    assert calls == [len(cases), *still_running]
    assert len(bodies) == len(calls)
