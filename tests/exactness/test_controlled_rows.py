"""No text depends on a controller, which changes arms between rounds and asks for shadow drafts.

Greedy text equals transformers' own, sampled text equals that of the same seed without a controller,
and the reported outcome of a draft agrees with the text. `test_sampling` tests the distribution of
`residual` sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.examples import OTHER_KINDS, add_examples
from support.random_controller import RandomController
from support.reference import greedy_reference

from paceline.assembly import Pace, build_controller, build_from_objects
from paceline.bench.profile import measure_cost_table
from paceline.config import (
    Config,
    EngineSection,
    ModelSection,
    PathsSection,
    SelectionSection,
)
from paceline.contracts import Decision, Drafts, Request
from paceline.drafting.base import Drafter
from paceline.engine import Driver
from paceline.errors import ArtefactError
from paceline.selection import AdaptiveController, Arm, Guard
from paceline.testing.scripted import ScriptedDrafter
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from paceline.assembly import Parts
    from paceline.engine.control import ArmController

LENGTH = 20
PROMPTS = [
    tuple(text.encode()) for text in ("a", "to be or not to be", "spam, spam and spam; " * 2)
]
DRAFTERS = ["near", "random", *OTHER_KINDS]
ARMS = ["none", *DRAFTERS, "near@1", "near@2", "prompt_lookup@2", "layer_skip@2"]


def parts_of(architecture: str, max_rows: int = 3, **engine: Any) -> Parts:
    target = tiny_model(architecture)
    drafters = {
        "near": perturbed(target, 0.05),
        "random": tiny_model("llama", seed=77, vocab_size=target.config.vocab_size),
    }
    section = EngineSection(max_rows=max_rows, prefill_chunk=16, **engine)
    config = Config(target=ModelSection(model="in memory"), engine=section)
    return add_examples(build_from_objects(target, byte_tokenizer(), drafters, config))


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def each(request: pytest.FixtureRequest) -> Parts:
    return parts_of(request.param)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return parts_of("llama")


def pace_of(parts: Parts, controller: ArmController, first: str = "near") -> Pace:
    return Pace(parts, lambda context: Decision(first), controller)


class Books:
    """A record of the rows that some drafters hold, by their starts and finishes."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.held: set[tuple[str, int]] = set()
        self.most = 0
        self.started: set[str] = set()
        for drafter in drafters:
            self._keep(drafter, drafter.start, drafter.finish)

    def _keep(self, drafter: Any, start: Any, finish: Any) -> None:
        def kept_start(rows: Any) -> None:
            for row in rows:
                assert (drafter.name, row.id) not in self.held, "started twice"
                self.held.add((drafter.name, row.id))
            self.started.add(drafter.name)
            self.most = max(self.most, len(self.held))
            start(rows)

        def kept_finish(rows: Any) -> None:
            self.held -= {(drafter.name, row.id) for row in rows}
            finish(rows)

        drafter.start, drafter.finish = kept_start, kept_finish


@pytest.mark.parametrize("seed", range(2))
def test_greedy_text_is_the_targets_under_any_switches(each: Parts, seed: int) -> None:
    controller = RandomController(ARMS, DRAFTERS, seed)
    pace = pace_of(each, controller)

    done = pace.generate([list(p) for p in PROMPTS], max_new_tokens=LENGTH, ignore_eos=True)

    for prompt, completion in zip(PROMPTS, done, strict=True):
        expected = greedy_reference(each.target.model, prompt, LENGTH)
        assert expected.margin > 1e-4
        assert completion.token_ids == expected.tokens
        assert completion.decision.arm == "near"
        assert all(0 < position <= LENGTH and arm in ARMS for position, arm in completion.switches)
    assert sum(len(c.switches) for c in done) > 8
    assert sorted(controller.ended) == [0, 1, 2]
    assert (
        len({one.drafter for seen in controller.seen for one in seen.outcomes}) >= len(DRAFTERS) - 1
    )


def test_no_drafter_holds_a_row_afterwards() -> None:
    """And none is started for a row that it holds already, a union's parts among them."""
    parts = parts_of("llama")
    books = Books([parts.drafters[name] for name in DRAFTERS])
    pace = pace_of(parts, RandomController(ARMS, DRAFTERS, 1))

    for _ in range(2):
        pace.generate([list(p) for p in PROMPTS], max_new_tokens=LENGTH, ignore_eos=True)

    assert books.started >= {*DRAFTERS}
    assert not books.held
    cache = parts.target.cache
    assert cache.num_rows == 0


@pytest.mark.parametrize("seed", range(1))
def test_a_seed_gives_its_text_under_any_switches(each: Parts, seed: int) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.9, "top_p": 0.95, "seed": seed, "max_new_tokens": LENGTH, "ignore_eos": True
    }  # fmt: skip
    for prompt in PROMPTS:
        plain = Pace(each).complete(list(prompt), drafter="none", **settings)
        controlled = pace_of(each, RandomController(ARMS, DRAFTERS, seed)).complete(
            list(prompt), **settings
        )
        assert controlled.token_ids == plain.token_ids


def test_reported_outcomes_of_a_draft_agree_with_the_text(parts: Parts) -> None:
    """The outcomes of a draft add up to the replay of the same drafter at the same position."""
    for prompt in PROMPTS:
        controller = RandomController(ARMS, ["near"], 3)
        first = "prompt_lookup"
        controller._arms = ["none", "prompt_lookup"]
        done = pace_of(parts, controller, first).complete(
            list(prompt), max_new_tokens=LENGTH, ignore_eos=True
        )
        draft_replay = parts.drafters["near"].would_accept(prompt, done.token_ids)
        open_drafts: list[tuple[int, int]] = []  # (position, told so far)
        checked = 0
        for seen in controller.seen:
            position = seen.context + 1 - len(prompt)
            after = position + seen.emitted
            told = [one for one in seen.outcomes if one.drafter == "near"]
            if len(told) > len(open_drafts):
                open_drafts.append((position, 0))
            still = []
            for (start, known), one in zip(open_drafts, told, strict=True):
                drafted, accepted = draft_replay.round_at(start, LENGTH - start - 1)
                assert one.known == known
                assert one.drafted == drafted
                assert one.accepted == min(accepted, after - start)
                assert one.ended == (accepted < min(drafted, after - start))
                checked += 1
                if not one.is_final:
                    still.append((start, one.accepted))
            open_drafts = still
        assert checked >= 3


class _Failing(Drafter):
    """Cannot draft at all."""

    kind = "failing"

    def propose(self, rows: Any, limits: Any) -> Drafts:
        raise ZeroDivisionError("by zero")

    def would_accept(self, *given: Any) -> Any:
        raise NotImplementedError


def test_a_failing_shadow_drafter_fails_no_request() -> None:
    parts = parts_of("llama")
    parts.drafters["failing"] = _Failing("failing", 4)
    controller = RandomController(["none", "near"], ["failing", "near"], 2)

    done = pace_of(parts, controller).generate(
        [list(p) for p in PROMPTS], max_new_tokens=LENGTH, ignore_eos=True
    )

    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.error is None
        assert completion.token_ids == greedy_reference(parts.target.model, prompt, LENGTH).tokens


class _Broken(RandomController):
    """Asks for an arm that does not exist, or fails, after its third round."""

    def __init__(self, answer: str | Exception) -> None:
        super().__init__(["near"], [])
        self._answer = answer

    def after_round(self, ticket: int, seen: Any) -> str | None:
        self.seen.append(seen)
        if ticket != 1 or len(self.seen) < 3:
            return None
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [("nowhere", "unknown drafter 'nowhere'"), (ZeroDivisionError("by zero"), "by zero")],
)
def test_a_broken_watch_ends_its_own_row(parts: Parts, answer: str | Exception, words: str) -> None:
    engine = pace_of(parts, _Broken(answer)).engine
    requests = [Request(str(i), PROMPTS[1], LENGTH) for i in range(3)]

    done = {c.request_id: c for c in Driver(engine).generate(requests, return_errors=True)}

    expected = greedy_reference(parts.target.model, PROMPTS[1], LENGTH).tokens
    assert done["0"].token_ids == done["2"].token_ids == expected
    assert done["1"].error is not None and words in done["1"].error
    assert done["1"].token_ids == expected[: len(done["1"].token_ids)]


@pytest.mark.parametrize("call", ["begin", "observes_round", "shadow_drafters", "end"])
def test_a_watch_that_fails_at_any_call_ends_its_own_row(parts: Parts, call: str) -> None:
    controller = RandomController(["near"], [])
    good = getattr(controller, call)

    def failing(ticket: int, *rest: Any) -> Any:
        if ticket == 1:
            raise ZeroDivisionError("by zero")
        return good(ticket, *rest)

    setattr(controller, call, failing)
    engine = pace_of(parts, controller).engine
    requests = [Request(str(i), PROMPTS[1], LENGTH) for i in range(3)]

    done = {c.request_id: c for c in Driver(engine).generate(requests, return_errors=True)}

    expected = greedy_reference(parts.target.model, PROMPTS[1], LENGTH).tokens
    assert done["0"].token_ids == done["2"].token_ids == expected
    assert done["1"].error is not None and "by zero" in done["1"].error
    assert engine.num_rows == 0
    for completion in Driver(engine).generate([Request("again", PROMPTS[1], LENGTH)]):
        assert completion.token_ids == expected


def test_rows_that_name_their_drafter_are_not_watched(parts: Parts) -> None:
    controller = RandomController(ARMS, DRAFTERS, 4)
    pace = pace_of(parts, controller)

    completion = pace.complete(list(PROMPTS[1]), drafter="near", max_new_tokens=LENGTH)

    assert not controller.seen
    assert not completion.switches


def test_a_switch_by_hand_ends_the_watching(parts: Parts) -> None:
    controller = RandomController(["near"], [], 4)
    engine = pace_of(parts, controller).engine
    ticket = engine.submit(Request("0", PROMPTS[1], LENGTH))
    while not controller.seen:
        engine.step()

    engine.switch(ticket, "none")
    seen = len(controller.seen)
    done = [p.completion for _ in range(2 * LENGTH) for p in engine.step() if p.completion]

    assert len(controller.seen) == seen
    assert controller.ended == [ticket]
    assert done[0].switches[-1][1] == "none"
    assert done[0].token_ids == greedy_reference(parts.target.model, PROMPTS[1], LENGTH).tokens


def test_memory_bounds_include_started_drafters_that_are_not_in_use() -> None:
    """Room for one draft model's row: another is never started while it is there."""
    parts = parts_of("llama", max_rows=1)
    one_row = parts.drafters["near"].state_bytes([len(PROMPTS[1]) + LENGTH])
    parts = parts_of("llama", max_rows=1, max_drafter_mb=1.5 * one_row / 1e6)
    books = Books([parts.drafters["near"], parts.drafters["random"]])
    controller = RandomController(["near", "random", "none"], ["near", "random"], 5)

    done = pace_of(parts, controller).complete(
        list(PROMPTS[1]), max_new_tokens=LENGTH, ignore_eos=True
    )

    assert done.token_ids == greedy_reference(parts.target.model, PROMPTS[1], LENGTH).tokens
    assert books.started == {"near", "random"}
    assert books.most == 1


def test_an_unused_started_drafter_makes_room_for_the_arm_of_another_row() -> None:
    """A started drafter that is not in use may not leave a new request without its drafter."""
    one = parts_of("llama").drafters["near"].state_bytes([len(PROMPTS[1]) + LENGTH])
    parts = parts_of("llama", max_rows=2, max_drafter_mb=1.5 * one / 1e6)
    books = Books([parts.drafters["near"]])
    controller = _LeavesAtOnce(["none"], [])
    engine = pace_of(parts, controller).engine
    first = engine.submit(Request("first", PROMPTS[1], LENGTH))
    while not controller.seen:
        engine.step()
    assert books.held == {("near", first)}  # beside plain decoding

    second = engine.submit(Request("second", PROMPTS[1], LENGTH, drafter="near"))
    done = {}
    while engine.num_rows or not done:
        done |= {p.ticket: p.completion for p in engine.step() if p.completion is not None}

    assert done[second].decision.arm == "near"
    assert books.most == 1
    expected = greedy_reference(parts.target.model, PROMPTS[1], LENGTH).tokens
    assert done[first].token_ids == done[second].token_ids == expected


class _LeavesAtOnce(RandomController):
    """Goes to plain decoding after the first round, and stays."""

    def after_round(self, ticket: int, seen: Any) -> str | None:
        self.seen.append(seen)
        return "none" if seen.arm != "none" else None


class _Even:
    """Prices at which every drafter might pay."""

    bucket = 64

    def rounds(self, drafter: str, context: int, rows: int) -> np.ndarray:
        return 1.0 + 0.05 * np.arange(1 if drafter == "none" else 5)

    def drafting(self, drafter: str, drafted: int, context: int) -> float:
        return 0.001 * drafted

    def catching_up(self, drafter: str, num_tokens: int) -> float:
        return 0.0


def test_the_real_watch_finds_the_drafter_that_knows_the_text(parts: Parts) -> None:
    """From a prior that speaks for a drafter that is never right."""
    prompt = PROMPTS[1]
    expected = greedy_reference(parts.target.model, prompt, LENGTH).tokens
    text = [*prompt, *expected]
    wrong = [(t + 1) % 256 for t in text]

    def copy(source: Sequence[int]) -> Any:
        return lambda tokens, limit: source[len(tokens) : len(tokens) + limit]

    drafters: dict[str, Any] = {
        "good": ScriptedDrafter("good", copy(text), 4),
        "bad": ScriptedDrafter("bad", copy(wrong), 4),
    }
    config = Config(target=ModelSection(model="in memory"))
    own = build_from_objects(parts.target.model, byte_tokenizer(), drafters, config)
    arms = [Arm("none", "none", 0), Arm("good", "good", 4), Arm("bad", "bad", 4)]
    prior = {"none": 1.0, "bad": 0.5, "good": 0.9}
    pace = Pace(
        own,
        lambda context: Decision("bad", seconds_per_token=prior),
        AdaptiveController(arms, _Even(), adapt=True, guard=Guard()),
    )

    completion = pace.complete(list(prompt), max_new_tokens=LENGTH, ignore_eos=True)

    assert completion.token_ids == expected
    assert completion.switches[-1][1] == "good"
    assert completion.seconds.total <= completion.seconds_total


def test_the_configuration_asks_for_a_watch_and_its_costs(tmp_path: Path) -> None:
    parts = parts_of("llama")
    assert build_controller(parts, ["near", "near@2"]) is None
    selection = SelectionSection(guard=True, adapt="within_request", explore=0.1)
    paths = PathsSection(costs=tmp_path / "costs.json")
    parts.config = parts.config.model_copy(update={"selection": selection, "paths": paths})

    with pytest.raises(
        ArtefactError, match=r"need this machine's costs: .* run `paceline profile`"
    ):
        build_controller(parts, ["near"])

    measure_cost_table(parts, budget=0.0).save(paths.costs)
    controller = build_controller(parts, ["near@2", "none"])

    assert controller is not None
    assert [arm.name for arm in controller.arms.arms] == [*parts.drafters, "near@2"]
    assert controller.arms["near@2"].num_draft_tokens == 2
    assert controller.adapt and controller.guard is not None and controller.explore == 0.1
    pace = Pace(parts, lambda context: Decision("near@2"), controller)
    completion = pace.complete(list(PROMPTS[1]), max_new_tokens=LENGTH, ignore_eos=True)
    assert completion.token_ids == greedy_reference(parts.target.model, PROMPTS[1], LENGTH).tokens
