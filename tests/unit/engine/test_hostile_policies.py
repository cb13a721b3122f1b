"""Faulty `choose` and `on_complete` functions, and drafters that fail repeatedly."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from support.random_controller import RandomController
from support.reference import greedy_reference

from paceline.assembly import Pace, build_from_objects, open_log
from paceline.collection.replays import ReplayTask
from paceline.config import Config, LogSection, ModelSection
from paceline.contracts import GREEDY, Completion, Context, Decision, Request
from paceline.drafting.none import NoneDrafter
from paceline.engine import Engine
from paceline.errors import DrafterError, RequestError
from paceline.models.language_model import LanguageModel
from paceline.store import read_decisions
from paceline.store.layout import Trajectory
from paceline.testing.scripted import ScriptedDrafter, copying
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PROMPT = tuple(b"to be or not to be")
N = 10
MODEL = tiny_model("llama", context=64)
TARGET = LanguageModel(MODEL, "target")
OUTPUT = greedy_reference(MODEL, PROMPT, 30).tokens


class Moody(ScriptedDrafter):
    """Right about everything, in a good mood."""

    def __init__(self, name: str = "math") -> None:
        super().__init__(name, copying([*PROMPT, *OUTPUT]), num_draft_tokens=2)
        self.is_well = True

    def draft(self, tokens: Sequence[int], limit: int) -> list[int]:
        if not self.is_well:
            raise ValueError("not today")
        return super().draft(tokens, limit)


def engine_with(
    drafter: Moody | None = None, choose: Callable[[Context], Any] | None = None, **settings: Any
) -> Engine:
    drafter = drafter or Moody()
    arms = {"none": NoneDrafter(), "math": drafter}
    return Engine(TARGET, arms, lambda tokens: "", choose, **settings)


def serve(engine: Engine, *arms: str) -> list[Completion]:
    tickets = [engine.submit(Request(arm, PROMPT, N, drafter=arm)) for arm in arms]
    done: dict[int, Completion] = {}
    for _ in range(300):
        for progress in engine.step():
            if progress.completion is not None:
                done[progress.ticket] = progress.completion
    assert engine.num_rows == 0 and TARGET.cache.num_rows == 0
    return [done[ticket] for ticket in tickets]


# --- a caller's own choice ------------------------------------------------------------------------


def decision(**fields: Any) -> Decision:
    return Decision(**({"arm": "math", "policy": "mine"} | fields))


NAN = float("nan")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "choose must return a Decision, got None (NoneType)"),
        ("math", "choose must return a Decision, got 'math' (str)"),
        (("math", 1.0), "choose must return a Decision"),
        (decision(arm=None), "arm must be a string, got None"),
        (decision(arm=3), "arm must be a string, got 3 (int)"),
        (decision(arm="gone"), "unknown drafter 'gone'"),
        (decision(arm="math@9"), "drafter 'math' drafts up to 2 tokens"),
        (decision(policy=b"mine"), "policy must be a string"),
        (decision(propensity=NAN), "propensity must be a finite number, got nan"),
        (decision(propensity=float("inf")), "propensity must be a finite number, got inf"),
        (decision(propensity=None), "propensity must be a finite number, got None"),
        (decision(propensity="0.5"), "propensity must be a finite number, got '0.5'"),
        (decision(propensity=0.0), "propensity must be a probability above 0, got 0"),
        (decision(propensity=1.5), "propensity must be a probability above 0, got 1.5"),
        (decision(scores=[0.5, 0.5]), "scores must map arms to numbers, got [0.5, 0.5]"),
        (decision(scores=None), "scores must map arms to numbers, got None"),
        (decision(scores={0: 0.5}), "scores must be given by arm, got 0 (int)"),
        (decision(scores={"math": "high"}), "scores of 'math' must be a finite number, got 'high'"),
        (decision(scores={"math": np.float32(NAN)}), "scores of 'math' must be a finite number"),
        (decision(scores={"math": torch.zeros(2)}), "scores of 'math' must be a finite number"),
        (decision(features="text"), "features must be an array of numbers"),
        (decision(features=np.zeros((2, 2))), "features must have one dimension, got [2, 2]"),
        (decision(seconds_per_token={"none": 0.0}), "seconds_per_token of 'none' must be above 0"),
        (decision(seconds_in_rounds={"none": -1}), "seconds_in_rounds of 'none' must be above 0"),
    ],
)
@pytest.mark.parametrize("by_watch", [False, True])
def test_a_decision_that_is_none_ends_its_row(answer: Any, words: str, by_watch: bool) -> None:
    controller = None
    if by_watch:
        controller = RandomController([], [])
        controller.begin = lambda ticket, context, decision, room: answer
    engine = engine_with(choose=lambda c: decision() if by_watch else answer, controller=controller)

    bad, *good = serve(engine, "auto", "none", "math")

    assert bad.finish_reason == "error"
    assert bad.error is not None and bad.error.startswith("policy: ") and words in bad.error
    assert bad.token_ids == OUTPUT[:1]
    assert [c.token_ids for c in good] == [OUTPUT[:N]] * 2


class OfItsOwnError(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("by hand"), "policy: by hand"),
        (SystemExit(1), "policy: SystemExit: 1"),
        (OfItsOwnError(), "policy: OfItsOwnError"),
    ],
)
def test_whatever_a_choice_raises_ends_its_row(error: BaseException, words: str) -> None:
    def choose(context: Context) -> Decision:
        raise error

    bad, *good = serve(engine_with(choose=choose), "auto", "none", "math")

    assert bad.error == words
    assert [c.token_ids for c in good] == [OUTPUT[:N]] * 2


def test_the_users_own_interrupt_stops_a_choice() -> None:
    def choose(context: Context) -> Decision:
        raise KeyboardInterrupt

    engine = engine_with(choose=choose)
    engine.submit(Request("0", PROMPT, N))

    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert serve(engine, "none")[0].token_ids == OUTPUT[:N]


def test_numbers_of_other_libraries_leave_as_plain_ones() -> None:
    scores: Any = {
        np.str_("math"): np.float32(0.75),
        "none": torch.tensor(0.25),
        "@": np.int64(1),
    }
    given = decision(
        arm=np.str_("math"),
        propensity=np.float64(0.5),
        scores=scores,
        features=torch.arange(3),
        seconds_per_token={"math": np.float16(0.5)},
    )

    [completion] = serve(engine_with(choose=lambda c: given), "auto")

    assert completion.error is None
    told = completion.decision
    assert told == decision(
        propensity=0.5,
        scores={"math": 0.75, "none": 0.25, "@": 1.0},
        seconds_per_token={"math": 0.5},
    )
    assert type(told.arm) is str and type(told.propensity) is float
    assert {type(value) for value in told.scores.values()} == {float}
    assert told.features is not None and told.features.dtype == np.float32
    json.dumps({key: value for key, value in asdict(told).items() if key != "features"})
    assert completion.token_ids == OUTPUT[:N]


def test_a_sum_of_shares_may_be_rounded() -> None:
    [completion] = serve(engine_with(choose=lambda c: decision(propensity=1.0 + 1e-9)), "auto")

    assert completion.decision.propensity == 1.0


# --- drafters that fail again and again -----------------------------------------------------------


def always_math(context: Context) -> Decision:
    return decision(propensity=0.5)


def test_a_drafter_that_failed_three_times_in_a_row_is_set_aside_for_auto() -> None:
    drafter = Moody()
    engine = engine_with(drafter, always_math)
    drafter.is_well = False

    for arm in ("auto", "math"):
        assert serve(engine, arm)[0].error == "drafter 'math': not today"
    with pytest.warns(UserWarning, match=r"'math' failed in 3 requests in a row .* not today"):
        assert serve(engine, "auto")[0].error == "drafter 'math': not today"

    # set aside: told once, and told in the decision
    first, second = serve(engine, "auto", "auto")
    assert first.error is None and first.token_ids == second.token_ids == OUTPUT[:N]
    assert first.decision.policy == "mine, set aside: math"
    assert (first.decision.arm, first.decision.propensity) == ("none", 1.0)
    # who names it still gets it; and a success brings it back
    assert serve(engine, "math")[0].error == "drafter 'math': not today"
    assert serve(engine, "auto")[0].drafter == "none"
    drafter.is_well = True
    assert serve(engine, "math")[0].drafter == "math"
    [completion] = serve(engine, "auto")
    assert (completion.drafter, completion.decision.policy) == ("math", "mine")


def test_three_requests_of_one_batch_are_three() -> None:
    drafter = Moody()
    engine = engine_with(drafter, always_math)
    drafter.is_well = False

    with pytest.warns(UserWarning, match="set aside"):
        serve(engine, "auto", "math", "auto")

    assert serve(engine, "auto")[0].drafter == "none"


def test_failures_with_a_success_between_them_set_nothing_aside() -> None:
    drafter = Moody()
    engine = engine_with(drafter, always_math)

    for is_well in (False, False, True, False, False, True):
        drafter.is_well = is_well
        [completion] = serve(engine, "auto")
        assert (completion.error is None) == is_well
    assert completion.decision.policy == "mine"


def test_failures_of_others_do_not_count() -> None:
    engine = engine_with(choose=always_math)
    engine.drafters["other"] = Moody("other")
    engine.drafters["other"].is_well = False

    with pytest.warns(UserWarning, match="'other' failed"):
        serve(engine, "other", "other", "other")

    assert serve(engine, "auto")[0].drafter == "math"


class Wanting(RandomController):
    """A controller that always chooses one arm."""

    def __init__(self, arm: str, shadow_drafters: Sequence[str] = ()) -> None:
        super().__init__([arm], shadow_drafters)
        self.arm = arm

    def shadow_drafters(self, ticket: int) -> Sequence[str]:
        return self._shadow_drafters

    def after_round(self, ticket: int, seen: Any) -> str | None:
        return self.arm


def test_a_controller_does_not_switch_to_a_disabled_drafter() -> None:
    drafter = Moody()
    choose = lambda context: Decision("none", policy="mine")  # noqa: E731
    engine = engine_with(drafter, choose, controller=Wanting("math"))
    assert serve(engine, "auto")[0].switches == [(2, "math")]
    drafter.is_well = False

    with pytest.warns(UserWarning, match="set aside"):
        failed = serve(engine, "auto", "auto", "auto")
    [completion] = serve(engine, "auto")

    assert {c.error for c in failed} == {"drafter 'math': not today"}
    assert completion.switches == [] and completion.token_ids == OUTPUT[:N]


def test_failures_of_shadow_drafters_count_and_fail_no_request() -> None:
    drafter = Moody()
    choose = lambda context: Decision("none", policy="mine")  # noqa: E731
    engine = engine_with(drafter, choose, controller=Wanting("none", ["math"]))
    drafter.is_well = False

    with pytest.warns(UserWarning, match="set aside"):
        done = serve(engine, "auto", "auto", "auto")
    drafter.is_well = True  # which nobody finds out: it is not asked again
    done += serve(engine, "auto")

    assert [c.token_ids for c in done] == [OUTPUT[:N]] * 4
    assert {c.error for c in done} == {None}
    assert drafter.proposed == []


# --- what is done with completed requests ---------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit(1), OfItsOwnError()])
def test_what_is_done_with_completed_requests_may_fail(error: BaseException) -> None:
    seen: list[str] = []

    def on_complete(request: Request, *rest: Any) -> None:
        seen.append(request.id)
        raise error

    engine = engine_with(on_complete=on_complete)

    with pytest.warns(UserWarning, match="on_complete failed for request") as told:
        done = serve(engine, "none", "math")
        done += serve(engine, "none")

    assert [c.token_ids for c in done] == [OUTPUT[:N]] * 3
    assert len(seen) == 3 and len(told) == 1


def test_where_warnings_are_errors_they_are_shown_and_end_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def on_complete(*given: Any) -> None:
        raise OSError("disk full")

    drafter = Moody()
    drafter.is_well = False
    engine = engine_with(drafter, on_complete=on_complete)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = serve(engine, "none", "math", "math", "math")

    assert done[0].token_ids == OUTPUT[:N]
    shown = capsys.readouterr().err
    assert "on_complete failed" in shown and "'math' failed in 3 requests" in shown


def logging_pace(folder: Path, choose: Callable[[Context], Decision]) -> Pace:
    log = LogSection.model_validate({"folder": folder})
    config = Config(target=ModelSection(model="in memory"), log=log)
    parts = build_from_objects(MODEL, byte_tokenizer(), {"math": Moody()}, config)
    return Pace(parts, choose, on_complete=open_log(parts))


def test_a_choice_with_numbers_of_numpy_is_logged(tmp_path: Path) -> None:
    pace = logging_pace(
        tmp_path, lambda c: decision(propensity=np.float32(0.5), scores={"math": np.float32(0.25)})
    )

    pace.complete(list(PROMPT), max_new_tokens=N)

    [line] = read_decisions(tmp_path)[0]
    assert (line.arm, line.propensity, line.scores) == ("math", 0.5, {"math": 0.25})


def removed(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def replaced(folder: Path) -> None:
    removed(folder)
    folder.write_text("not a folder any more")


@pytest.mark.parametrize("harm", [removed, replaced])
def test_requests_go_on_where_decisions_cannot_be_logged(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = tmp_path / "log"
    pace = logging_pace(folder, always_math)
    pace.complete(list(PROMPT), max_new_tokens=N)
    harm(folder)

    with pytest.warns(UserWarning, match="decisions are lost") as told:
        done = pace.generate(["to be", "or not"], max_new_tokens=N)

    assert [c.error for c in done] == [None, None] and len(told) == 1
    assert "those after it are not logged" in str(told[0].message)
    assert "change log.folder" in str(told[0].message)


# --- a bad drafter in a collection ----------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("not today"), SystemExit(1)])
def test_a_collection_names_the_drafter_that_cannot_be_replayed(
    tmp_path: Path, error: BaseException
) -> None:
    pace = logging_pace(tmp_path, always_math)

    def fail(*given: Any) -> Any:
        raise error

    pace.parts.drafters["math"].propose = fail
    trajectory = Trajectory("0", "d", PROMPT, tuple(OUTPUT), "length", 30, GREEDY)

    with pytest.raises(DrafterError, match=r"^drafter 'math': (not today|SystemExit: 1)$"):
        ReplayTask([(trajectory, ["math"])]).run(pace, lambda count: None)


def test_an_impossible_draft_length_is_refused_before_decoding() -> None:
    drafter = Moody()
    drafter.num_draft_tokens = None
    engine = engine_with(drafter)

    with pytest.raises(RequestError, match="'math': num_draft_tokens must be a whole number"):
        engine.submit(Request("0", PROMPT, N, drafter="math@2"))
