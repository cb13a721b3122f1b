"""The gate of drafters: which calls pay, when a closed drafter is tried again, and who is asked."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.reference import greedy_reference

from paceline.contracts import Request
from paceline.drafting.contract import Draft
from paceline.drafting.none import NoneDrafter
from paceline.engine import Driver, Engine
from paceline.engine.gate import Gate
from paceline.models.language_model import LanguageModel
from paceline.testing.scripted import ScriptedDrafter, copying
from paceline.testing.tiny_models import tiny_model
from paceline.verification import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROMPT = tuple(b"to be or not to be")
LENGTH = 120


class Seconds:
    """Seconds of a round: one for any number of rows, and more for each drafted token."""

    def __init__(self, per_token: float) -> None:
        self.per_token = per_token

    def up_to(self, rows: int, context: int, num_drafted: int) -> np.ndarray:
        return 1.0 + self.per_token * np.arange(num_drafted + 2)


class Rounds:
    """Rounds of a gate in which one drafter has some of the rows, and the others decode plainly."""

    def __init__(self, num_own: int = 2, num_rows: int = 4, per_token: float = 0.0) -> None:
        prices: Any = Seconds(per_token)
        self.gate = Gate(prices)
        drafter: Any = SimpleNamespace()
        self.rows: list[Any] = [
            SimpleNamespace(drafter=drafter, num_read=100, is_asked=False) for _ in range(num_rows)
        ]
        self.num_own = num_own

    def run(
        self, num: int, call: float | Callable[[int], float], accepted: int, drafted: int = 3
    ) -> list[bool]:
        """Return whether the drafter was called in each round.

        call: seconds of a call, perhaps by the round. accepted: tokens of each row that is asked.
        """
        called = []
        own = self.rows[: self.num_own]
        for i in range(num):
            is_called = self.gate.admits(own, len(self.rows))
            spent = call(i) if callable(call) else call
            if is_called:
                self.gate.learn_call(own[0].drafter, spent)
            drafts, verdicts = [], []
            for row in self.rows:
                row.is_asked = is_called and row in own
                drafts.append(Draft([1] * drafted if row.is_asked else []))
                verdicts.append(Verdict(list(range(accepted if row.is_asked else 0)), 9))
            self.gate.learn(self.rows, drafts, verdicts, spent * is_called)
            called.append(is_called)
        return called


def places(called: Sequence[bool]) -> list[int]:
    return [i for i, is_called in enumerate(called) if is_called]


def test_a_drafter_that_is_never_right_is_tried_ever_more_rarely() -> None:
    """Eight first calls, then trials of three after 16, 32, 64, ... and at most 256 rounds."""
    called = places(Rounds().run(2000, 1e-9, accepted=0))

    assert called[:8] == list(range(8))
    gaps = [b - a - 1 for a, b in itertools.pairwise(called[7:])]
    trials = [gap for gap in gaps if gap]
    assert trials == [16, 32, 64, 128, *[256] * (len(trials) - 4)]
    assert len(trials) > 6
    assert gaps == [gap for wait in trials for gap in (wait, 0, 0)][: len(gaps)]


def test_a_drafter_that_pays_is_called_in_every_round() -> None:
    # 4 rows emit 6 tokens in 1.2 seconds: two tokens are worth 0.4 seconds
    assert all(Rounds().run(300, 0.2, accepted=1))


def test_a_call_is_weighed_against_the_tokens_that_it_adds() -> None:
    """Two tokens per call of 4 rows: with c seconds per call, they are worth 2 (1 + c) / 6."""
    assert all(Rounds().run(60, 0.49, accepted=1))
    assert not all(Rounds().run(60, 0.51, accepted=1))


def test_the_added_verification_is_charged() -> None:
    """Six tokens are verified per call, two of them are accepted: worth 2 (1 + 6 v) / 6."""
    assert all(Rounds(per_token=0.08).run(60, 0.0, accepted=1))
    assert not all(Rounds(per_token=0.085).run(60, 0.0, accepted=1))


def test_call_and_verification_are_charged_together() -> None:
    assert all(Rounds(per_token=0.045).run(60, 0.2, accepted=1))
    assert not all(Rounds(per_token=0.055).run(60, 0.2, accepted=1))


def test_rows_share_a_call() -> None:
    """A call that one row cannot repay is repaid by four."""
    alone, shared = Rounds(num_own=1, num_rows=8), Rounds(num_own=4, num_rows=8)

    assert not all(alone.run(60, 0.2, accepted=1))
    assert all(shared.run(60, 0.2, accepted=1))


def test_more_rows_open_the_gate_at_once() -> None:
    rounds = Rounds(num_own=1, num_rows=8)
    assert not any(rounds.run(20, 0.2, accepted=1)[-8:])

    rounds.num_own = 4

    assert all(rounds.run(20, 0.2, accepted=1))


def test_a_change_of_the_text_is_noticed_in_a_trial() -> None:
    rounds = Rounds()
    assert sum(rounds.run(100, 0.1, accepted=0)) < 20

    called = rounds.run(200, 0.2, accepted=1)

    first = places(called)[0]
    assert first <= 64
    assert all(called[first:])


def test_interrupted_calls_close_nothing() -> None:
    """A call that lasts as long as fifty rounds, in one of four calls."""
    assert all(Rounds().run(300, lambda i: 50.0 if i % 4 == 3 else 0.1, accepted=1))


def test_a_drafter_that_loses_again_waits_from_the_start() -> None:
    rounds = Rounds()
    rounds.run(500, 0.1, accepted=0)
    assert all(rounds.run(300, 0.1, accepted=2)[-20:])

    called = rounds.run(60, 0.1, accepted=0)

    waits = np.diff(places(called))
    assert waits.max() == 17


# --- in the engine --------------------------------------------------------------------------------

MODEL = tiny_model("llama", context=256)
TEXT = [*PROMPT, *greedy_reference(MODEL, PROMPT, LENGTH).tokens]


def decode_with(drafter: ScriptedDrafter, *lengths: int) -> list[Any]:
    """Return the completions of requests of these lengths, decoded together.

    Rounds are priced at a second, so that a call, clocked at less, pays if any of its tokens is right.
    """
    prices: Any = Seconds(0.0)
    engine = Engine(
        LanguageModel(MODEL, "target"),
        {"none": NoneDrafter(), drafter.name: drafter},
        decode=str,
        max_rows=len(lengths),
        round_seconds=prices,
    )
    requests = [Request(str(n), PROMPT, n, drafter=drafter.name) for n in lengths]
    return list(Driver(engine).generate(requests))


def wrong() -> ScriptedDrafter:
    return ScriptedDrafter("wrong", copying(TEXT, num_right=0), num_draft_tokens=2)


def test_eight_rows_stop_asking_a_wrong_drafter_and_try_it_again() -> None:
    drafter = wrong()

    done = decode_with(drafter, *[LENGTH] * 8)

    assert all([*PROMPT, *c.token_ids] == TEXT for c in done)
    # 119 rounds: 8 first calls, and trials after 16, 32 and 64 rounds without one
    assert len(drafter.proposed) == 8 * (8 + 3 * 2)
    for completion in done:
        assert places([r.drafted > 0 for r in completion.rounds]) == [
            *range(8), *range(24, 27), *range(59, 62),
        ]  # fmt: skip


def test_a_right_drafter_is_asked_in_every_round() -> None:
    drafter = ScriptedDrafter("right", copying(TEXT), num_draft_tokens=2)

    done = decode_with(drafter, *[LENGTH] * 8)

    assert all([*PROMPT, *c.token_ids] == TEXT for c in done)
    assert all(r.drafted == 2 for c in done for r in c.rounds[:-2])


def test_one_row_alone_is_always_asked() -> None:
    """From the end of the other request on."""
    _, done = decode_with(wrong(), 40, LENGTH)

    assert [*PROMPT, *done.token_ids] == TEXT
    is_asked = [r.drafted > 0 for r in done.rounds]
    assert not any(is_asked[30:39])
    # the last round has no room for a draft
    assert all(is_asked[39:-1])


@pytest.mark.parametrize("num_rows", [2, 8])
def test_no_draft_is_charged_where_nobody_is_asked(num_rows: int) -> None:
    """The seconds of drafting that lengthen drafts are those of rows that were asked."""
    prices: Any = Seconds(0.0)
    drafter = wrong()
    target = LanguageModel(MODEL, "target")
    arms = {"none": NoneDrafter(), "wrong": drafter}
    engine = Engine(target, arms, decode=str, max_rows=num_rows, round_seconds=prices)
    budget: Any = engine._budget
    seen = []
    for i in range(num_rows):
        engine.submit(Request(str(i), PROMPT, LENGTH, drafter="wrong"))
    for _ in range(22):
        engine.step()
        seen.append(budget._drafting)

    assert seen[7] > 0.0
    assert seen[10:] == [seen[9]] * len(seen[10:])
