"""Greedy text survives any schedule: trees, arrivals, cancellations and drafter switches in flight.

Random schedules against transformers' own `generate`; and drafters that break every rule, which may
end their own rows with an error but never change a text or stop another row.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import OTHER_KINDS, add_examples
from support.reference import greedy_reference

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import Completion, Drafts, Request, SamplingParams
from paceline.drafting.base import Drafter
from paceline.engine import Driver, Engine
from paceline.models.scores import Scores
from paceline.replay.rounds import simulate
from paceline.testing.scripted import ScriptedDrafter, ScriptedTree, copying
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT = 96
LENGTH = 24
V = 259
PROMPTS = [
    tuple(text.encode())
    for text in ("a", "to be or not to be", "spam, spam, eggs and spam; " * 2, "x" * 70)
]
QUICK = settings(max_examples=120, deadline=None, derandomize=True)


def tree_of(seed: int, truth: Sequence[int], nodes: int = 12) -> Any:
    """A script of random trees that hold the true continuation in part, at random places."""

    def grow(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        order = random.Random(seed * 7919 + len(tokens))
        ahead = list(truth[len(tokens) : len(tokens) + limit])
        drafted: list[int] = []
        parents: list[int] = []
        levels: list[int] = []
        for _ in range(order.randint(0, nodes) if limit > 0 else 0):
            parent = order.randrange(-1, len(drafted))
            level = 0 if parent < 0 else levels[parent] + 1
            if level >= limit:
                continue
            right = level < len(ahead) and order.random() < 0.6
            drafted.append(ahead[level] if right else order.randrange(-3, V + 3))
            parents.append(parent)
            levels.append(level)
        return drafted, parents

    return grow


class World:
    """One target, its references, and an arm of every shape."""

    def __init__(self, architecture: str) -> None:
        self.model = tiny_model(architecture, context=CONTEXT)
        self.references = {}
        for prompt in PROMPTS:
            found = greedy_reference(self.model, prompt, LENGTH)
            assert found.margin > 1e-4
            self.references[prompt] = found.tokens
        texts = [[*prompt, *output] for prompt, output in self.references.items()]

        def whole(tokens: Sequence[int]) -> list[int]:
            return max(
                (text for text in texts if text[: len(tokens)] == list(tokens)), key=len, default=[]
            )

        self.drafters: dict[str, Any] = {
            "near": perturbed(self.model, 0.05),
            "chain": ScriptedDrafter("chain", lambda t, n: copying(whole(t), 3)(t, n)),
            **{
                f"tree {i}": ScriptedTree(
                    f"tree {i}", lambda t, n, i=i: tree_of(i, whole(t))(t, n), 16
                )
                for i in range(3)
            },
        }

    def pace(self, extra: dict[str, Drafter] | None = None, **engine: Any) -> Pace:
        config = Config(
            target=ModelSection(model="in memory"),
            engine=EngineSection(**{"max_rows": 3, "prefill_chunk": 32, **engine}),
        )
        drafters = {**self.drafters, **(extra or {})}
        parts = build_from_objects(self.model, byte_tokenizer(), drafters, config)
        return Pace(add_examples(parts))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@pytest.mark.parametrize("arm", ["tree 0", "tree 1", "tree 2", "chain"])
def test_trees_change_nothing_and_replay_as_they_ran(world: World, arm: str) -> None:
    pace = world.pace()
    for prompt, expected in world.references.items():
        completion = pace.complete(list(prompt), drafter=arm, max_new_tokens=LENGTH)

        assert completion.token_ids == expected
        draft_replay = pace.parts.drafters[arm].would_accept(prompt, expected, None)
        predicted = simulate(draft_replay, len(expected), LENGTH)
        assert [[r.drafted, r.accepted] for r in completion.rounds] == predicted.tolist()


def test_trees_do_accept_beyond_their_first_branch(world: World) -> None:
    """Else the tests here would not have seen a moved path."""
    pace = world.pace()
    accepted = [
        r.accepted
        for arm in ("tree 0", "tree 1", "tree 2")
        for prompt in PROMPTS
        for r in pace.complete(list(prompt), drafter=arm, max_new_tokens=LENGTH).rounds
    ]
    assert max(accepted) >= 2
    assert sum(accepted) > len(accepted) / 3


@pytest.mark.parametrize("method", ["residual", "invariant", "block"])
def test_a_tree_changes_no_sampled_text_either(world: World, method: str) -> None:
    """Trees are judged by the target's own draws, so a seed gives the same text as without a draft."""
    pace = world.pace()
    accepted = 0
    for seed, prompt in enumerate(PROMPTS):
        settings = {"temperature": 0.7, "top_p": 0.95, "seed": seed, "sampling": method}
        plain = pace.complete(list(prompt), drafter="none", max_new_tokens=LENGTH, **settings)
        text = [*prompt, *plain.token_ids]
        knowing = ScriptedTree("knowing", tree_of(seed, text), 16)
        other = world.pace({"knowing": knowing})

        completion = other.complete(
            list(prompt), drafter="knowing", max_new_tokens=LENGTH, **settings
        )

        assert completion.token_ids == plain.token_ids
        accepted += sum(r.accepted for r in completion.rounds)
    assert accepted > 20


@QUICK
@given(st.integers(0, 10**9))
def test_any_schedule_gives_the_reference(world: World, seed: int) -> None:
    order = random.Random(seed)
    pace = world.pace(prefix_positions=order.choice([0, 128]))
    engine = pace.engine
    arms = ["none", *world.drafters, *OTHER_KINDS]
    sent: dict[int, tuple[tuple[int, ...], int]] = {}
    cancelled: set[int] = set()
    streamed: dict[int, list[int]] = {}
    done: dict[int, Completion] = {}
    left = order.randint(2, 7)
    while left or engine.num_rows or engine.num_waiting:
        for _ in range(order.randint(0, 2)):
            if left:
                left -= 1
                prompt = order.choice(PROMPTS)
                n = order.randint(1, LENGTH)
                request = pace.request(list(prompt), drafter=order.choice(arms), max_new_tokens=n)
                sent[engine.submit(request)] = (prompt, n)
        running = [t for t in sent if t not in done]
        event = order.randint(0, 11)
        if running and event == 0:
            ticket = order.choice(running)
            engine.cancel(ticket)
            cancelled.add(ticket)
        elif running and event <= 3:
            ticket = order.choice(running)
            engine.switch(ticket, order.choice(arms))
        for progress in engine.step():
            streamed.setdefault(progress.ticket, []).extend(progress.new_tokens)
            if progress.completion is not None:
                done[progress.ticket] = progress.completion

    assert set(done) == set(sent)
    for ticket, (prompt, n) in sent.items():
        completion, expected = done[ticket], world.references[prompt][:n]
        assert completion.error is None
        assert streamed[ticket] == completion.token_ids
        if ticket in cancelled and completion.finish_reason == "cancelled":
            assert completion.token_ids == expected[: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected
    cache = engine.target.cache
    assert cache.num_rows == 0


# --- drafters that break every rule ---------------------------------------------------------------


class Rude(Drafter):
    """Breaks its contract in the way its mode says, once three tokens are emitted."""

    kind = "rude"

    def __init__(self, mode: str) -> None:
        super().__init__("rude", 6)
        self.mode = mode

    def propose(self, rows: Any, limits: Any) -> Drafts:
        early = all(len(row.tokens) < len(PROMPTS[1]) + 3 for row in rows)
        num = [min(2, max(0, n)) for n in limits]
        tokens = torch.zeros(len(rows), 2, dtype=torch.int64)
        if early:
            return Drafts(tokens, num)
        if self.mode == "raises":
            raise ZeroDivisionError("by zero")
        if self.mode == "too many nodes":
            return Drafts(torch.zeros(len(rows), 40, dtype=torch.int64), [40] * len(rows))
        if self.mode == "too deep":
            deep = torch.arange(-1, 5).expand(len(rows), -1)
            return Drafts(deep.clamp(min=0), [6] * len(rows), parents=deep)
        if self.mode == "parents out of order":
            parents = torch.tensor([[1, -1]]).expand(len(rows), -1)
            return Drafts(tokens, [2] * len(rows), parents=parents)
        if self.mode == "negative length":
            return Drafts(tokens, [-1] * len(rows))
        if self.mode == "other rows":
            return Drafts(tokens[:0], [])
        if self.mode == "nan probabilities":
            return Drafts(tokens, num, torch.full((len(rows), 2, V), float("nan")))
        if self.mode == "nothing":
            return None  # type: ignore[return-value]
        raise AssertionError(self.mode)

    def would_accept(self, prompt: Any, trajectory: Any, p: Any) -> Any:
        raise NotImplementedError

    def finish(self, rows: Any) -> None:
        if self.mode == "raises at the end":
            raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("raises", "by zero"),
        ("too many nodes", "40 tokens where 2 were allowed"),
        ("too deep", r"6 deep where 2 was allowed"),
        ("parents out of order", "parents are out of order"),
        ("negative length", "-1 tokens"),
        ("other rows", "0 rows instead of 1"),
        ("nothing", "NoneType"),
    ],
)
def test_a_rude_drafter_ends_its_own_rows_only(world: World, mode: str, words: str) -> None:
    prompt = PROMPTS[1]
    expected = world.references[prompt]
    engine = world.pace({"rude": Rude(mode)}, max_rows=4).engine
    requests = [
        Request(f"{arm} {i}", prompt, LENGTH if arm != "rude" else 6, drafter=arm)
        for i, arm in enumerate(["rude", "near", "rude", "tree 1"])
    ]

    done = {c.request_id: c for c in Driver(engine).generate(requests, return_errors=True)}

    for request in requests:
        completion = done[request.id]
        if request.drafter == "rude":
            assert completion.finish_reason == "error"
            assert completion.error is not None
            assert completion.error.startswith("drafter 'rude': ")
            assert re.search(words, completion.error)
            assert completion.token_ids == expected[: len(completion.token_ids)]
            assert len(completion.token_ids) >= 3
        else:
            assert completion.token_ids == expected
    assert engine.num_rows == 0


def test_a_failure_at_the_end_is_reported_with_the_text(world: World) -> None:
    engine = world.pace({"rude": Rude("raises at the end")}).engine

    [completion] = Driver(engine).generate(
        [Request("0", PROMPTS[1], 2, drafter="rude")], return_errors=True
    )

    assert completion.error == "drafter 'rude': by zero"
    assert completion.token_ids == world.references[PROMPTS[1]][:2]


def test_probabilities_that_are_none_end_a_sampled_row(world: World) -> None:
    engine = world.pace({"rude": Rude("nan probabilities")}).engine
    sampling = SamplingParams(1.0, seed=3, method="residual")
    requests = [
        Request(arm, PROMPTS[1], 12, sampling, drafter=arm) for arm in ("rude", "none", "near")
    ]

    done = {c.request_id: c for c in Driver(engine).generate(requests, return_errors=True)}

    assert done["rude"].error == (
        "drafter 'rude': proposed token 0 with probabilities that are negative or not finite"
    )
    assert done["none"].error is None and len(done["none"].token_ids) == 12
    assert done["near"].error is None and len(done["near"].token_ids) == 12


def test_logits_that_are_not_numbers_end_only_their_row(world: World) -> None:
    engine: Engine = world.pace(max_rows=3).engine
    score = engine.target.score
    calls = 0

    def damaged(tokens: Any, spans: Any, parents: Any = None, wants_logits: bool = True) -> Scores:
        nonlocal calls
        calls += 1
        logits = score(tokens, spans, parents, True).logits
        assert logits is not None
        if calls == 3:
            logits[1, 5] = float("nan")
        return Scores.of(logits)

    engine.target.score = damaged  # type: ignore[method-assign]
    requests = [Request(str(i), PROMPTS[1], LENGTH, drafter="none") for i in range(3)]

    done = {c.request_id: c for c in Driver(engine).generate(requests, return_errors=True)}

    expected = world.references[PROMPTS[1]]
    assert [done[str(i)].error is None for i in range(3)] == [True, False, True]
    assert "not finite" in (done["1"].error or "")
    assert 0 < len(done["1"].token_ids) < LENGTH
    assert done["1"].token_ids == expected[: len(done["1"].token_ids)]
    assert done["0"].token_ids == done["2"].token_ids == expected
