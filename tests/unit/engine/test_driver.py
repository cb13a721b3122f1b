"""The driver: each caller gets its own updates, a caller that leaves frees its rows, no caller hangs."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import torch

import paceline
from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import Decision
from paceline.engine.driver import _stop
from paceline.errors import DecodingError, QueueFullError, RequestError
from paceline.models.detokenizer import Detokenizer
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.contracts import Context

MODEL = tiny_model(context=600)
LONG = {"drafter": "none", "max_new_tokens": 400, "ignore_eos": True}
SHORT = {**LONG, "max_new_tokens": 6}


def pace_of(
    choose: Callable[[Context], Decision] | None = None,
    ended: list[str] | None = None,
    **engine: Any,
) -> Pace:
    """ended: is given the finish reason of every request."""
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(**engine))
    parts = build_from_objects(MODEL, byte_tokenizer(), {}, config)
    reasons = [] if ended is None else ended
    return Pace(parts, choose, on_complete=lambda r, c, context: reasons.append(c.finish_reason))


def wait_until(holds: Callable[[], bool]) -> None:
    """Else the test's timeout ends it."""
    while not holds():
        time.sleep(0.002)


def test_a_request_ends_while_another_stream_is_open() -> None:
    pace = pace_of()
    expected = pace.complete("abc", **LONG).text

    stream = pace.stream_text("abc", **LONG)
    first = next(stream)
    beside = pace.complete("xyz", **SHORT)

    assert len(beside.token_ids) == 6
    assert first + "".join(stream) == expected


def test_requests_can_be_made_while_completions_are_read() -> None:
    pace = pace_of()
    requests = [pace.request("a", id="0", **SHORT), pace.request("b", id="1", **LONG)]

    inner = [pace.complete("c", **SHORT).text for _ in pace.stream(requests)]

    assert inner == [pace.complete("c", **SHORT).text] * 2


def test_two_streams_read_in_turn_keep_apart() -> None:
    pace = pace_of()
    texts = [pace.complete(prompt, **LONG).text for prompt in ("abc", "xyz")]

    one, two = (pace.stream_text(prompt, **LONG) for prompt in ("abc", "xyz"))
    pairs = list(zip(one, two, strict=False))

    assert "".join(a for a, _ in pairs) + "".join(one) == texts[0]
    assert "".join(b for _, b in pairs) + "".join(two) == texts[1]


def test_between_two_reads_the_models_are_the_callers_own() -> None:
    """Nobody waits, so nothing runs: transformers may use the same model meanwhile."""
    pace = pace_of()
    stream = pace.stream_text("abc", **LONG)
    next(stream)
    batch = pace.stream(
        [pace.request("abc", id=str(i), **SHORT | {"max_new_tokens": 4 + i}) for i in range(3)]
    )
    next(batch)

    before = [list(row.tokens) for row in pace.engine._rows]
    time.sleep(0.05)
    assert [row.tokens for row in pace.engine._rows] == before and len(before) == 3


@pytest.mark.parametrize("leave", ["close", "collect", "abandon a batch"])
def test_who_goes_away_frees_their_rows(leave: str) -> None:
    pace = pace_of()
    if leave == "abandon a batch":
        batch = pace.stream([pace.request("abc", id=str(i), **LONG) for i in range(3)])
        short = pace.stream([pace.request("b", **SHORT), *(pace.request("c", **LONG),)])
        next(short)
        batch.close()  # never begun
        short.close()
    else:
        stream = pace.stream_text("abc", **LONG)
        next(stream)
        assert pace.engine.num_rows == 1
        if leave == "close":
            stream.close()
        else:
            del stream

    assert pace.engine.num_rows == 0
    assert not pace.driver._mail


def test_a_stream_in_a_cycle_is_cancelled_when_it_is_collected() -> None:
    pace = pace_of()
    holder: dict[str, Any] = {}
    holder["self"], holder["stream"] = holder, pace.stream_text("abc", **LONG)
    next(holder["stream"])
    del holder

    gc.collect()

    assert pace.engine.num_rows == 0


def test_an_asyncio_task_that_is_cancelled_frees_its_row() -> None:
    ended: list[str] = []
    pace = pace_of(ended=ended)

    async def act() -> None:
        task = asyncio.create_task(pace.acomplete("abc", **LONG))
        while pace.engine.num_rows == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(act())
    wait_until(lambda: pace.engine.num_rows == 0)
    assert ended == ["cancelled"]


def test_an_event_loop_that_ends_with_requests_open_leaves_nothing() -> None:
    ended: list[str] = []
    pace = pace_of(ended=ended)
    loop = asyncio.new_event_loop()
    stream = pace.astream_text("abc", **LONG)
    loop.run_until_complete(anext(stream))
    loop.close()  # no reader is left, and nothing cancelled the request

    wait_until(lambda: not pace.driver._mail and pace.engine.num_rows == 0)
    assert ended == ["cancelled"]
    assert len(pace.complete("abc", **SHORT).token_ids) == 6


def test_an_idle_driver_burns_no_cpu() -> None:
    pace = pace_of()
    pace.complete("abc", **SHORT)
    thread = pace.driver._thread
    assert thread is not None and thread.is_alive()

    def burnt() -> float:
        """CPU seconds of the driver's thread alone."""
        with open(f"/proc/self/task/{thread.native_id}/stat") as file:  # noqa: PTH123
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = burnt()
    time.sleep(0.5)
    assert burnt() - before <= 0.02


def test_an_unreferenced_driver_ends_its_thread() -> None:
    pace = pace_of()
    pace.complete("abc", **SHORT)
    thread, driver = pace.driver._thread, weakref.ref(pace.driver)
    assert thread is not None

    del pace
    gc.collect()

    assert driver() is None
    wait_until(lambda: not thread.is_alive())


def test_time_in_the_queue_is_reported_outside_the_total() -> None:
    pace = pace_of(max_rows=1)
    requests = [pace.request("abc", id=str(i), **LONG) for i in range(3)]

    first, second, third = pace.stream(requests)

    assert third.seconds.queue > second.seconds.queue > first.seconds.queue >= 0
    assert third.seconds.queue > first.seconds_total
    for completion in (first, second, third):
        assert completion.seconds.total <= completion.seconds_total
        parts = asdict(completion.seconds)
        assert completion.seconds.total == pytest.approx(sum(parts.values()) - parts["queue"])


def test_what_breaks_a_step_is_the_cause_of_every_failure_and_the_next_request_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace = pace_of()
    expected = pace.complete("abc", **SHORT).text
    target = pace.parts.target
    plain = target.forward
    monkeypatch.setattr(
        target, "forward", lambda *a, **k: (_ for _ in ()).throw(MemoryError("all"))
    )

    for ask in (pace.complete, lambda p, **s: "".join(pace.stream_text(p, **s))):
        with pytest.raises(DecodingError, match="the engine stopped: all") as caught:
            ask("abc", **SHORT)
        assert isinstance(caught.value.__cause__, MemoryError)
    with pytest.raises(DecodingError, match="the engine stopped: all"):
        asyncio.run(pace.acomplete("abc", **SHORT))

    monkeypatch.setattr(target, "forward", plain)
    assert pace.complete("abc", **SHORT).text == expected


def test_a_request_that_cannot_be_admitted_fails_and_later_ones_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace = pace_of()
    monkeypatch.setattr(pace.parts.target, "acquire", lambda: 1 // 0)
    requests = [pace.request("abc", id=str(i), **SHORT) for i in range(3)]

    done = list(pace.driver.generate(requests, return_errors=True))

    assert [c.error for c in done] == ["the engine stopped: integer division or modulo by zero"] * 3


def test_a_policy_that_asks_its_own_engine_is_refused() -> None:
    pace: Pace

    def choose(context: Context) -> Decision:
        return Decision(pace.complete("deeper", **SHORT).drafter)

    pace = pace_of(choose)
    with pytest.raises(DecodingError, match="asked the engine that it works for"):
        pace.complete("abc", max_new_tokens=4)
    assert pace.engine.num_rows == 0


def test_a_full_queue_is_said_at_once_to_a_task_and_waited_for_by_a_batch() -> None:
    pace = pace_of(max_rows=1, max_waiting=1)

    async def act() -> list[object]:
        tasks = [pace.acomplete("abc", **LONG) for _ in range(6)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(act())

    assert any(isinstance(one, QueueFullError) for one in found)
    assert all(isinstance(one, (QueueFullError, paceline.Completion)) for one in found)
    assert len(pace.generate(["abc"] * 5, **SHORT)) == 5


def test_a_mistake_is_raised_by_the_call_itself() -> None:
    pace = pace_of()
    with pytest.raises(RequestError, match="max_new_tokens"):
        pace.stream_text("abc", drafter="none", max_new_tokens=0)
    with pytest.raises(RequestError, match="max_new_tokens"):
        asyncio.run(pace.acomplete("abc", drafter="none", max_new_tokens=0))


def test_the_engine_runs_with_the_number_of_threads_that_the_caller_set() -> None:
    seen: list[int] = []

    def choose(context: Context) -> Decision:
        seen.append(torch.get_num_threads())
        return Decision("none")

    pace, before = pace_of(choose), torch.get_num_threads()
    try:
        for number in (2, 1, 3):
            torch.set_num_threads(number)
            pace.complete("abc", max_new_tokens=3)
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 1, 3]


def test_a_forked_child_decodes_by_itself() -> None:
    """A child has none of its parent's threads; requests in flight stay the parent's."""
    pace, before = pace_of(), torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork either
    try:
        expected = pace.complete("abc", **SHORT).text
        assert in_child(lambda: pace.complete("abc", **SHORT).text == expected)
        stream = pace.stream_text("abc", **LONG)
        next(stream)
        assert in_child(lambda: "forked while requests were in flight" in error_of(pace))
        assert pace.complete("abc", **SHORT).text == expected
    finally:
        torch.set_num_threads(before)


def error_of(pace: Pace) -> str:
    try:
        pace.complete("abc", **SHORT)
    except DecodingError as error:
        return str(error)
    return ""


def in_child(holds: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if holds() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_threads_that_step_for_one_another_would_be_seen() -> None:
    """Only the driver's thread ever runs a step."""
    pace = pace_of()
    steppers: set[str] = set()
    step = pace.engine.step

    def noted() -> object:
        steppers.add(threading.current_thread().name)
        return step()

    pace.engine.step = noted  # type: ignore[method-assign, assignment]
    threads = [
        threading.Thread(target=pace.complete, args=("abc",), kwargs=SHORT) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steppers == {"paceline driver"}


@pytest.mark.parametrize("what", ["release", "decode", "finish"])
def test_an_exception_at_the_end_of_a_row_reaches_its_waiting_caller(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = pace_of()
    expected = pace.complete("abc", **SHORT).text
    broken: Any = {
        "release": pace.parts.target,
        "decode": pace.engine,
        "finish": pace.engine.drafters["none"],
    }[what]
    error: BaseException = KeyboardInterrupt() if what == "finish" else MemoryError("all")

    def fail(*given: Any, **named: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if what == "decode":
            patch.setattr(broken, "_detokenizer", Detokenizer.wrap(fail))
        else:
            patch.setattr(broken, what, fail)
        requests = [pace.request("abc", id=str(i), **SHORT) for i in range(3)]
        done = list(pace.driver.generate(requests, return_errors=True))

    assert [c.finish_reason for c in done] == ["error"] * 3
    assert pace.complete("abc", **SHORT).text == expected
    assert not pace.driver._mail and pace.engine.num_rows == 0


def test_room_that_was_free_before_the_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue may empty, and the thread go idle, between its being found full and that being said."""
    pace = pace_of(max_rows=1, max_waiting=1)
    submit, refused = pace.engine.submit, [True]

    def full_at_first(*given: Any) -> int:
        if refused and refused.pop():
            raise QueueFullError("by the time this is read there is room")
        return submit(*given)

    monkeypatch.setattr(pace.engine, "submit", full_at_first)
    assert len(pace.complete("abc", **SHORT).token_ids) == 6
    assert not pace.driver._room


def test_who_waits_for_room_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = pace_of(max_rows=1, max_waiting=1)
    requests = [pace.request("abc", id=str(i), **SHORT) for i in range(4)]
    most = 0
    for _ in pace.driver.progress(requests):
        most = max(most, len(pace.driver._room))
    assert most <= 1


def test_a_reader_in_the_drivers_own_thread_is_refused() -> None:
    """Whoever reads on in a policy or a log would wait for themselves."""
    told: list[BaseException] = []

    def choose(context: Context) -> Decision:
        try:
            next(stream)
        except DecodingError as error:
            told.append(error)
        return Decision("none")

    pace = pace_of(choose)
    stream = pace.stream_text("abc", **LONG)
    next(stream)
    pace.complete("xyz", max_new_tokens=3, ignore_eos=True)
    assert "asked the engine that it works for" in str(told[0])
    assert pace.engine.num_rows == 0


def test_a_delivery_that_exits_ends_its_request_alone() -> None:
    pace, ended = pace_of(), []

    def deliver(progress: object) -> None:
        raise SystemExit

    pace.driver.submit(pace.request("abc", **LONG), deliver)
    ended.append(pace.complete("abc", **SHORT))
    wait_until(lambda: pace.engine.num_rows == 0)
    assert len(ended[0].token_ids) == 6


def test_a_task_that_is_thrown_away_frees_its_row() -> None:
    pace = pace_of()
    loop = asyncio.new_event_loop()
    asking = pace.acomplete("abc", **LONG)

    async def begin() -> None:
        asking.send(None)

    loop.run_until_complete(begin())
    wait_until(lambda: pace.engine.num_rows == 1)
    asking.close()
    loop.close()

    pace.complete("abc", **SHORT | {"max_new_tokens": 1})
    assert pace.engine.num_rows == 0


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = pace_of()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            pace.complete("abc", **LONG)

    assert len(pace.complete("abc", **SHORT).token_ids) == 6
    assert pace.engine.num_rows == 0


def test_a_stream_that_is_open_after_the_threads_end_blocks_no_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As at the end of a process, where streams are collected after the thread."""
    monkeypatch.setattr("paceline.engine.driver._LONGEST_ROUND", None)  # would wait for ever
    pace = pace_of()
    stream = pace.stream_text("abc", **LONG)
    next(stream)
    thread = pace.driver._thread
    assert thread is not None
    _stop(pace.driver._orders, thread)

    stream.close()
    assert not thread.is_alive()


def test_a_stream_of_the_parent_cannot_be_read_in_a_forked_child() -> None:
    pace, before = pace_of(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stream = pace.stream_text("abc", **LONG)
        next(stream)

        def is_refused() -> bool:
            with pytest.raises(DecodingError, match="forked while requests were in flight"):
                list(stream)
            return True

        assert in_child(is_refused)
    finally:
        torch.set_num_threads(before)
