"""A draft model proposes the tokens of a fresh one, whether earlier drafts were accepted or not."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch

from paceline import noise
from paceline.contracts import SamplingParams
from paceline.drafting.draft_model import DraftModel
from paceline.models.language_model import LanguageModel
from paceline.models.packing import ChainEnds, Span
from paceline.testing.tiny_models import tiny_model
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import Drafts

GREEDY = SamplingParams()
RESIDUAL = SamplingParams(0.9, top_k=20, seed=3, method="residual")
INVARIANT = SamplingParams(0.9, top_k=20, seed=3, method="invariant")
VOCABULARY = 40


@dataclass
class FakeRow:
    id: int
    tokens: list[int] = field(default_factory=list)
    sampling: SamplingParams = GREEDY
    num_prompt: int = 1


def draft_model(
    architecture: str = "llama",
    context: int = 128,
    chunk: int = 512,
    width: int = VOCABULARY,
    target_width: int = VOCABULARY,
    num_tokens: int = VOCABULARY,
) -> DraftModel:
    model = LanguageModel(tiny_model(architecture, vocab_size=width, context=context), "small")
    return DraftModel("small", model, 4, num_tokens, target_width, chunk)


def propose(drafter: DraftModel, rows: Sequence[FakeRow], limits: Sequence[int]) -> Drafts:
    with torch.inference_mode():
        return drafter.propose(rows, limits)


def start(drafter: DraftModel, rows: Sequence[FakeRow]) -> None:
    with torch.inference_mode():
        drafter.start(rows)


def drafts_of(drafts: Drafts, row: int) -> list[int]:
    tokens: list[int] = drafts.tokens[row, : drafts.lengths[row]].tolist()
    return tokens


def fresh(row: FakeRow, limit: int, **settings: object) -> tuple[list[int], torch.Tensor | None]:
    """Return the proposals of a drafter that sees the row for the first time."""
    drafter = draft_model(**settings)
    start(drafter, [row])
    drafts = propose(drafter, [row], [limit])
    return drafts_of(drafts, 0), None if drafts.probs is None else drafts.probs[0]


@pytest.mark.parametrize("sampling", [GREEDY, RESIDUAL, INVARIANT], ids=lambda s: s.method)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_proposals_are_those_of_a_fresh_drafter_after_any_history(
    architecture: str, sampling: SamplingParams
) -> None:
    choose = random.Random(5)

    def some(low: int, high: int) -> list[int]:
        return [choose.randrange(VOCABULARY) for _ in range(choose.randint(low, high))]

    rows = [FakeRow(i, some(1, 12), sampling) for i in range(3)]
    drafter = draft_model(architecture, chunk=5)
    start(drafter, rows)
    seen = set()
    for _ in range(14):
        asked = [row for row in rows if choose.random() < 0.75] or rows[:1]
        limits = [choose.choice([0, 1, 3, 4, 9]) for _ in asked]
        drafts = propose(drafter, asked, limits)
        for place, (row, limit) in enumerate(zip(asked, limits, strict=True)):
            draft = drafts_of(drafts, place)
            expected, q = fresh(row, limit, architecture=architecture)
            assert draft == expected
            assert len(draft) == min(limit, 4)
            if q is not None and draft:
                torch.testing.assert_close(drafts.probs[place, : len(draft)], q, rtol=0, atol=1e-4)
            # accepted in part or in full, then the target's token; or a few rounds without this drafter
            accepted = choose.randint(0, len(draft))
            seen.add("all" if accepted == len(draft) > 0 else "some" if accepted else "none")
            row.tokens += draft[:accepted] + some(1, 1)
        for row in rows:
            if row not in asked:
                row.tokens += some(0, 7)
    assert seen == {"all", "some", "none"}


@pytest.mark.parametrize(
    ("architecture", "call", "expected"),
    [("gpt2", "logits_after", [2, 1, 1, 1, 1, 1]), ("llama", "draft_chain", [2, 1])],
)
def test_accepted_drafts_are_not_fed_again(
    architecture: str, call: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step, and where one call drafts a whole chain."""
    drafter = draft_model(architecture)
    row = FakeRow(0, [1, 2, 3, 4, 5, 6])
    start(drafter, [row])
    draft = drafts_of(propose(drafter, [row], [4]), 0)
    fed: list[int] = []
    whole = getattr(drafter.model, call)
    monkeypatch.setattr(
        drafter.model, call, lambda tokens, *rest: fed.append(len(tokens)) or whole(tokens, *rest)
    )

    row.tokens += [*draft, 7]
    propose(drafter, [row], [4])
    row.tokens += [(t + 1) % VOCABULARY for t in draft[:1]]
    propose(drafter, [row], [2])

    # the fourth drafted token was never fed, so after a full accept it comes with the bonus
    assert fed == expected


def test_drafts_obey_the_limit_and_their_own_length() -> None:
    rows = [FakeRow(i, [1, 2, 3]) for i in range(5)]
    drafter = draft_model()
    start(drafter, rows)

    drafts = propose(drafter, rows, [0, 1, 3, 4, 50])

    assert list(drafts.lengths) == [0, 1, 3, 4, 4]
    assert drafts.tokens.shape == (5, 4)
    assert drafts.tokens[1, 1:].eq(-1).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_drafting_ends_with_the_drafters_own_context(architecture: str) -> None:
    context = 16
    lengths = []
    for num_tokens in range(context - 5, context + 4):
        row = FakeRow(0, list(range(num_tokens)))
        drafter = draft_model(architecture, context=context)
        start(drafter, [row])
        lengths.append(propose(drafter, [row], [4]).lengths[0])

    # every fed token needs a position: with n tokens, n + K - 1 <= context
    assert lengths == [4, 4, 4, 3, 2, 1, 0, 0, 0]


def test_a_text_beyond_the_drafters_context_gets_no_drafts() -> None:
    row = FakeRow(0, list(range(12)))
    drafter = draft_model("gpt2", context=16)
    start(drafter, [row])
    assert propose(drafter, [row], [4]).lengths == [4]

    row.tokens += [1] * 20

    assert propose(drafter, [row], [4]).lengths == [0]


def test_ids_of_the_padding_are_never_proposed() -> None:
    drafter = draft_model(width=64, target_width=64, num_tokens=8)
    rows = [FakeRow(i, [i, 1, 2], params) for i, params in enumerate((GREEDY, RESIDUAL, INVARIANT))]
    start(drafter, rows)

    drafts = propose(drafter, rows, [4, 4, 4])

    assert drafts.tokens.max() < 8
    assert drafts.probs is not None and not drafts.probs[..., 8:].any()


def test_an_id_that_only_the_target_has_does_not_stop_a_drafter() -> None:
    drafter = draft_model(width=40, target_width=64)
    row = FakeRow(0, [1, 63, 2], RESIDUAL)
    start(drafter, [row])
    row.tokens += [50]

    drafts = propose(drafter, [row], [3])

    assert drafts.lengths == [3]
    assert drafts.probs is not None and drafts.probs.shape == (1, 3, 64)


def test_drafted_tokens_come_from_the_distribution_that_is_reported() -> None:
    row = FakeRow(0, [3, 1, 4, 1, 5], RESIDUAL)
    drafter = draft_model()
    start(drafter, [row])

    drafts = propose(drafter, [row], [4])

    assert drafts.probs is not None
    for k, token in enumerate(drafts_of(drafts, 0)):
        text = [*row.tokens, *drafts_of(drafts, 0)[:k]]
        with torch.inference_mode():
            logits = drafter.model.model(torch.tensor([text])).logits[0, -1]
        q = warp(logits, RESIDUAL)
        torch.testing.assert_close(drafts.probs[0, k], q, rtol=0, atol=1e-4)
        at = noise.of_round(torch.tensor(len(text)), len(row.tokens))
        e = noise.exponential(torch.tensor(3), at, noise.DRAFT, VOCABULARY)
        assert token == noise.race(q, e)


def test_invariant_drafts_use_the_judges_noise() -> None:
    row = FakeRow(0, [3, 1, 4, 1, 5], INVARIANT)
    drafter = draft_model()
    start(drafter, [row])

    [token] = drafts_of(propose(drafter, [row], [1]), 0)

    with torch.inference_mode():
        q = warp(drafter.model.model(torch.tensor([row.tokens])).logits[0, -1], INVARIANT)
    e = noise.exponential(torch.tensor(3), torch.tensor(5), noise.TARGET, VOCABULARY)
    assert token == noise.race(q, e)


def test_rows_sampled_in_different_ways_share_a_batch() -> None:
    rows = [FakeRow(i, [7, 3, i], params) for i, params in enumerate((GREEDY, RESIDUAL, INVARIANT))]
    drafter = draft_model()
    start(drafter, rows)

    drafts = propose(drafter, rows, [4, 4, 4])

    for place, row in enumerate(rows):
        assert drafts_of(drafts, place) == fresh(row, 4)[0]


def test_new_rows_reuse_the_slots_of_finished_ones() -> None:
    drafter = draft_model()
    rows = [FakeRow(i, [1, 2, 3, 4]) for i in range(3)]
    start(drafter, rows)
    propose(drafter, rows, [4, 4, 4])
    held = drafter.num_bytes()

    drafter.finish(rows[1:2])
    newcomer = FakeRow(9, [5, 6, 7])
    start(drafter, [newcomer])

    assert drafts_of(propose(drafter, [newcomer], [4]), 0) == fresh(newcomer, 4)[0]
    assert drafts_of(propose(drafter, [rows[2]], [4]), 0) == fresh(rows[2], 4)[0]
    assert drafter.num_bytes() == held
    drafter.finish([rows[0], rows[2], newcomer])
    # the memory of one row may stay, for the next one
    assert drafter.model.cache.num_bytes() <= drafter.state_bytes([1])


def test_finishing_a_row_that_never_started_is_harmless() -> None:
    draft_model().finish([FakeRow(0, [1])])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sure_chains_are_greedy_chains_with_their_probabilities_up_to_their_end(
    architecture: str,
) -> None:
    rows = [FakeRow(0, [3, 1, 4, 1, 5]), FakeRow(1, [9, 2, 6])]
    drafter = draft_model(architecture)
    start(drafter, rows)
    with torch.inference_mode():
        whole, sure = drafter.draft_while_sure(rows, [4, 3], ChainEnds((0.5,) * 16, (0.0, 0.0)))
        assert [len(chain) for chain in whole] == [4, 3]
        for row, chain, probabilities in zip(rows, whole, sure, strict=True):
            assert chain == fresh(row, len(chain), architecture=architecture)[0]
            for k, probability in enumerate(probabilities):
                text = torch.tensor([*row.tokens, *chain[:k]])
                slot = drafter.model.acquire()
                hidden = drafter.model.forward(text, [Span(slot, 0, len(text))])
                logits = drafter.model.unembed(hidden[-1:]).float()
                drafter.model.release(slot)
                assert probability == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
        # 0.5, 0.25: the first row has ended after two tokens, both after three
        ended, _ = drafter.draft_while_sure(rows, [4, 4], ChainEnds((0.5,) * 16, (0.3, 0.2)))
    assert ended == [fresh(row, 4, architecture=architecture)[0][:3] for row in rows]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sure_chains_of_a_batch_stay_within_the_context_of_the_longest_row(
    architecture: str,
) -> None:
    context = 32
    full, short = FakeRow(0, [i % VOCABULARY for i in range(context - 1)]), FakeRow(1, [7, 8])
    drafter = draft_model(architecture, context)
    start(drafter, [full, short])
    limits = [drafter.longest_draft(full), drafter.longest_draft(short)]
    assert limits == [2, 4]
    with torch.inference_mode():
        chains, _ = drafter.draft_while_sure(
            [full, short], limits, ChainEnds((1.0,) * 16, (0.0, 0.0))
        )
    assert chains[0] == fresh(full, 2, architecture=architecture, context=context)[0]
    assert chains[1] == fresh(short, 4, architecture=architecture, context=context)[0][:2]
