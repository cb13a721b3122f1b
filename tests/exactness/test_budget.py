"""No text depends on the cut of drafts by the shared budget, and one row alone is never cut.

`test_sampling` tests the distribution of sampled text, with planted leaks.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.examples import OTHER_KINDS, add_examples
from support.random_controller import RandomController
from support.reference import greedy_reference

from paceline.assembly import Pace, Parts, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import Decision, Drafts
from paceline.drafting.base import Drafter, pad_drafts
from paceline.drafting.layer_skip import LayerSkip, LayerSkipSettings
from paceline.engine.budget import Budget
from paceline.engine.gate import Gate
from paceline.testing.scripted import ScriptedTree
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.drafting.contract import Draft
    from paceline.engine.rows import Row

LENGTH = 24
PROMPTS = [
    tuple(text.encode())
    for text in ("a", "to be or not to be", "spam, spam and spam; " * 2, "x" * 30, "ab ab")
]


class ChangingSeconds:
    """Prices that differ at every call, so that every cut occurs: nothing, parts, everything."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def up_to(self, rows: int, context: int, num_drafted: int) -> np.ndarray:
        share = np.arange(num_drafted + 1) / rows
        return 1.0 + self._random.choice([0.0, 0.02, 0.1, 0.8]) * share + 0.05 * share**2


class CountingBudget(Budget):
    """A budget that counts the whole, the shortened and the removed drafts."""

    def __init__(self, seed: int = 0) -> None:
        prices: Any = ChangingSeconds(seed)
        super().__init__(prices)
        self.whole = self.shortened = self.removed = 0
        self.most_rows = 0

    def cut(self, rows: Sequence[Row], drafts: list[Draft]) -> list[Draft]:
        cut = super().cut(rows, drafts)
        self.most_rows = max(self.most_rows, len(rows))
        for before, after in zip(drafts, cut, strict=True):
            if len(after.tokens) == len(before.tokens):
                self.whole += bool(before.tokens)
            elif after.tokens:
                self.shortened += 1
            else:
                self.removed += 1
        return cut


class Estimating(Drafter):
    """A drafter of trees of the text's tokens, with estimates of their chances."""

    kind = "estimating"

    def propose(self, rows: Sequence[Any], limits: Sequence[int]) -> Drafts:
        order = random.Random(sum(len(row.tokens) for row in rows))
        drafts, parents, chances = [], [], np.zeros((len(rows), 9))
        for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            length = order.randint(0, min(9, limit)) if limit > 0 else 0
            drafts.append([order.choice(row.tokens) for _ in range(length)])
            parents.append([order.randrange(-1, k) if k else -1 for k in range(length)])
            for k, parent in enumerate(parents[-1]):
                above = chances[i, parent] if parent >= 0 else 1.0
                chances[i, k] = above * order.choice([0.2, 0.6, 1.0])
        cpu = torch.device("cpu")
        tree, _ = pad_drafts(parents, cpu)
        return Drafts(*pad_drafts(drafts, cpu), parents=tree, chances=chances)


def right_trees(texts: Sequence[Sequence[int]]) -> ScriptedTree:
    """Return a drafter whose trees hold the text's next tokens between wrong ones."""

    def grow(tokens: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
        text = next(t for t in texts if list(t[: len(tokens)]) == list(tokens))
        ahead = text[len(tokens) : len(tokens) + max(0, min(limit, 4))]
        drafted, parents, last = [], [], -1
        for token in ahead:
            parents += [last, last]
            drafted += [(token + 1) % 250, token]
            last = len(drafted) - 1
        return drafted, parents

    return ScriptedTree("right trees", grow, 8)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def parts(request: pytest.FixtureRequest) -> Parts:
    """The compiled forward, and transformers' own, with a drafter of every kind."""
    target = tiny_model(request.param)
    texts = [[*p, *greedy_reference(target, p, LENGTH).tokens] for p in PROMPTS]
    drafters: dict[str, Any] = {
        "self": target,
        "near": perturbed(target, 0.05),
        "random": tiny_model("llama", seed=77, vocab_size=target.config.vocab_size),
        "estimating": Estimating("estimating", 9),
        "right trees": right_trees(texts),
    }
    config = Config(target=ModelSection(model="in memory"))
    made = add_examples(build_from_objects(target, byte_tokenizer(), drafters, config))
    middle = made.target.num_layers // 2 - 1
    settings = LayerSkipSettings(skip_mlp=(middle,), num_draft_tokens=5, stop="fixed")
    made.drafters["skipping"] = LayerSkip.build("skipping", settings, made.build_context())
    return made


ARMS = ("self", "near", "random", "estimating", "right trees", "skipping", *OTHER_KINDS)


def pace_of(parts: Parts, rows: int, budget: Budget | None, **settings: Any) -> Pace:
    config = parts.config.model_copy(
        update={"engine": EngineSection(max_rows=rows, prefill_chunk=16)}
    )
    drafters = dict(parts.drafters)
    pace = Pace(
        Parts(config, parts.target, parts.tokenizer, parts.vocabulary, drafters), **settings
    )
    pace.engine._budget = budget
    return pace


def texts_of(
    pace: Pace, arms: Sequence[str], num_requests: int, **settings: Any
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Return (prompt, tokens) of requests that take prompts and arms in turn."""
    settings = {"max_new_tokens": LENGTH, "ignore_eos": True, **settings}
    prompts = list(itertools.islice(itertools.cycle(PROMPTS), num_requests))
    requests = [
        pace.request(list(prompt), id=str(i), drafter=arm, **settings)
        for i, (prompt, arm) in enumerate(zip(prompts, itertools.cycle(arms), strict=False))
    ]
    done = {c.request_id: c.token_ids for c in pace.stream(requests)}
    return [(prompt, done[str(i)]) for i, prompt in enumerate(prompts)]


def assert_greedy(parts: Parts, texts: Sequence[tuple[tuple[int, ...], list[int]]]) -> None:
    for prompt, tokens in texts:
        expected = greedy_reference(parts.target.model, prompt, LENGTH)
        assert expected.margin > 1e-4
        assert tokens == expected.tokens


@pytest.mark.parametrize("arm", ARMS)
def test_greedy_text_is_the_targets_whatever_is_cut(parts: Parts, arm: str) -> None:
    budget = CountingBudget()

    assert_greedy(parts, texts_of(pace_of(parts, 3, budget), [arm], 9))

    assert budget.most_rows == 3
    assert budget.whole and budget.removed
    assert budget.shortened or arm == "layer_skip", "which drafts single tokens here"


@pytest.mark.parametrize("rows", [2, 4, 5, 8])
def test_any_number_of_rows_with_any_drafters_may_share_the_budget(parts: Parts, rows: int) -> None:
    budget = CountingBudget(rows)
    arms = ["none", *ARMS]

    assert_greedy(parts, texts_of(pace_of(parts, rows, budget), arms, 2 * len(arms)))

    assert budget.most_rows == rows
    assert budget.whole and budget.removed and budget.shortened


@pytest.mark.parametrize("sampling", ["invariant", "residual"])
def test_a_seed_gives_one_text_whatever_is_cut(parts: Parts, sampling: str) -> None:
    """With `residual`, of drafters that draw nothing: their text does not depend on the draft."""
    # the scripted trees know the greedy text only
    arms = [arm for arm in ARMS if arm != "right trees"]
    if sampling == "residual":
        arms = ["estimating", "prompt_lookup", "suffix_lookup", "trigram_tree"]
    settings = {"temperature": 0.8, "top_p": 0.95, "seed": 3, "sampling": sampling}
    budget = CountingBudget()
    plain = dict(texts_of(pace_of(parts, 1, None), ["none"], len(PROMPTS), **settings))

    found = texts_of(pace_of(parts, 4, budget), arms, 2 * len(arms), **settings)

    for prompt, tokens in found:
        assert tokens == plain[prompt]
    assert budget.shortened and budget.removed


def test_a_controller_sees_cut_drafts_and_moves_no_text(parts: Parts) -> None:
    """A cut draft that was right up to its end has not ended by itself."""
    budget = CountingBudget()
    arms = ["none", "self", "near", "random", *OTHER_KINDS, "near@2"]
    controller = RandomController(arms, ["near", "prompt_lookup"])
    pace = pace_of(parts, 3, budget, choose=lambda context: Decision("self"), controller=controller)

    assert_greedy(parts, texts_of(pace, ["auto"], 9))

    assert budget.shortened and budget.removed
    own = [
        outcome
        for report in controller.seen
        if report.arm == "self"
        for outcome in report.outcomes
        if outcome.drafter == "self" and outcome.known == 0
    ]
    cut = [outcome for outcome in own if outcome.drafted == outcome.accepted]
    assert len(cut) > 5
    assert not any(outcome.ended for outcome in cut)


class RandomGate(Gate):
    """A gate that calls a drafter now and then, so that rows catch up by any number of tokens."""

    def __init__(self) -> None:
        prices: Any = ChangingSeconds()
        super().__init__(prices)
        self._random = random.Random(1)
        self.admitted: list[bool] = []

    def admits(self, own: Sequence[Row], num_rows: int) -> bool:
        self.admitted.append(bool(super().admits(own, num_rows) and self._random.random() < 0.5))
        return self.admitted[-1]


def gated_at_random() -> tuple[CountingBudget, RandomGate]:
    budget, gate = CountingBudget(), RandomGate()
    budget.gate = gate
    return budget, gate


@pytest.mark.parametrize("arm", ["mixed", *ARMS])
def test_greedy_text_is_the_targets_whenever_a_drafter_is_called(parts: Parts, arm: str) -> None:
    budget, gate = gated_at_random()
    arms = ["none", *ARMS] if arm == "mixed" else [arm]

    assert_greedy(parts, texts_of(pace_of(parts, 8, budget), arms, 16))

    assert budget.most_rows == 8
    assert any(gate.admitted) and not all(gate.admitted)


@pytest.mark.parametrize("make", [gated_at_random, lambda: (CountingBudget(), None)])
def test_a_seed_gives_one_text_whenever_a_drafter_is_called(parts: Parts, make: Any) -> None:
    arms = [arm for arm in ARMS if arm != "right trees"]
    settings = {"temperature": 0.8, "top_p": 0.95, "seed": 3, "sampling": "invariant"}
    budget, _ = make()
    plain = dict(texts_of(pace_of(parts, 1, None), ["none"], len(PROMPTS), **settings))

    found = texts_of(pace_of(parts, 8, budget), arms, 2 * len(arms), **settings)

    assert [tokens for _, tokens in found] == [plain[prompt] for prompt, _ in found]
    assert budget.most_rows == 8


def test_one_row_drafts_as_without_a_budget(parts: Parts) -> None:
    """So a replay on one row equals reality."""
    budget = CountingBudget()
    whole, shared = pace_of(parts, 1, None), pace_of(parts, 1, budget)

    # the last round of several rows leaves a limit, which does not hold for one row
    texts_of(pace_of(parts, 3, budget), ["self"], 3)
    budget._likeliest_cut = 0.9
    budget.whole = budget.shortened = budget.removed = 0
    for arm in ARMS:
        settings = {"drafter": arm, "max_new_tokens": LENGTH, "ignore_eos": True}
        expected = whole.complete(list(PROMPTS[2]), **settings)
        found = shared.complete(list(PROMPTS[2]), **settings)
        assert found.rounds == expected.rounds

    assert budget.whole and not budget.shortened and not budget.removed
