"""One pace, many callers: threads, generators and asyncio tasks each get the text of a single call.

Requests may be closed early or cancelled at any time: no caller gets another's progress, and no row
stays in the engine.
"""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from support.examples import OTHER_KINDS, add_examples

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_REQUESTS, NUM_THREADS, NUM_STREAMS, NUM_TASKS = 200, 16, 8, 8
WAYS = ("complete", "stream", "stream cut short", "batch")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, the method that makes it, and its text in a single call."""

    way: str
    prompt: str
    settings: dict[str, Any]
    alone: str = ""


def pace_of(**engine: Any) -> Pace:
    model = tiny_model("llama", context=128)
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(**engine))
    parts = build_from_objects(model, byte_tokenizer(), {"near": perturbed(model, 0.05)}, config)
    return Pace(add_examples(parts))


def random_ask(order: random.Random) -> Ask:
    words = ["to be or not to be", "spam, spam and eggs; ", "a", "def add(a, b):", "xyz" * 9]
    settings: dict[str, Any] = {
        "drafter": order.choice(["none", "near", "near@2", *OTHER_KINDS]),
        "max_new_tokens": order.randint(1, 30),
        "ignore_eos": order.random() < 0.5,
    }
    if order.random() < 0.3:
        settings["stop"] = [order.choice("aeiou st,")]
    if order.random() < 0.4:
        settings |= {"temperature": 0.8, "seed": order.randrange(2**40)}
        settings["sampling"] = order.choice(["invariant", "residual", "block"])
    prompt = "".join(order.choices(words, k=order.randint(1, 3)))[:90]
    return Ask(order.choice(WAYS), prompt, settings)


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    """Return requests with their texts, decoded one at a time by another pace."""
    order, alone = random.Random(5), pace_of()
    found = [random_ask(order) for _ in range(NUM_REQUESTS + NUM_STREAMS + NUM_TASKS)]
    return [
        Ask(ask.way, ask.prompt, ask.settings, alone.complete(ask.prompt, **ask.settings).text)
        for ask in found
    ]


def answer(pace: Pace, ask: Ask) -> str:
    """Return the text that a thread reads, which may stop early."""
    if ask.way == "complete":
        return pace.complete(ask.prompt, **ask.settings).text
    if ask.way == "batch":
        first, second = pace.generate([ask.prompt, ask.prompt], **ask.settings)
        assert first.text == second.text
        return first.text
    stream = pace.stream_text(ask.prompt, **ask.settings)
    return "".join(stream if ask.way == "stream" else islice(stream, 2))


def is_expected(ask: Ask, found: str) -> bool:
    return ask.alone.startswith(found) if "cut short" in ask.way else found == ask.alone


def is_empty(pace: Pace) -> bool:
    """Return whether no row is left after one more request, whose rounds end the cancelled ones."""
    pace.complete("the last one", drafter="none", max_new_tokens=2)
    engine, cache = pace.engine, pace.parts.target.cache
    held = [engine.num_rows, engine.num_waiting, len(pace.driver._mail), cache.num_rows]
    return held == [0, 0, 0, 0]


def in_threads(number: int, act: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=act, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads


def test_many_callers_of_every_kind_each_get_their_own_text(asks: list[Ask]) -> None:
    pace = pace_of(max_rows=6, prefill_chunk=32)
    todo: SimpleQueue[Ask] = SimpleQueue()
    wrong: list[object] = []
    for ask in asks[:NUM_REQUESTS]:
        todo.put(ask)

    def work() -> None:
        while True:
            try:
                ask = todo.get_nowait()
            except Empty:
                return
            try:
                found = answer(pace, ask)
            except Exception as error:  # noqa: BLE001 - reported below
                wrong.append((ask, error))
                continue
            if not is_expected(ask, found):
                wrong.append((ask, found))

    async def of_a_task(ask: Ask, number: int) -> None:
        if number % 4 == 3:  # closed after its first piece
            async with aclosing(pace.astream_text(ask.prompt, **ask.settings)) as stream:
                async for piece in stream:
                    found = piece
                    break
                else:
                    found = ""
            good = ask.alone.startswith(found)
        elif number % 2:
            pieces = [piece async for piece in pace.astream_text(ask.prompt, **ask.settings)]
            good = "".join(pieces) == ask.alone
        else:
            good = (await pace.acomplete(ask.prompt, **ask.settings)).text == ask.alone
        if not good:
            wrong.append(ask)

    async def all_tasks() -> None:
        await asyncio.gather(*(of_a_task(ask, i) for i, ask in enumerate(asks[-NUM_TASKS:])))

    threads = in_threads(NUM_THREADS, work)
    threads += in_threads(1, lambda: asyncio.run(all_tasks()))
    streamed = asks[NUM_REQUESTS:-NUM_TASKS]
    streams = [pace.stream_text(ask.prompt, **ask.settings) for ask in streamed]
    found = [""] * NUM_STREAMS
    left = set(range(NUM_STREAMS))
    while left:  # one piece per stream in turn
        for i in sorted(left):
            piece = next(streams[i], None)
            if piece is None:
                left.remove(i)
            else:
                found[i] += piece
    for thread in threads:
        thread.join()

    assert wrong == []
    assert found == [ask.alone for ask in streamed]
    assert is_empty(pace)


def test_more_requests_than_the_queue_holds_are_all_answered(asks: list[Ask]) -> None:
    """Batches of several callers enter the queue one request at a time, in any order."""
    pace = pace_of(max_rows=2, max_waiting=1)
    wrong: list[object] = []

    def work() -> None:
        requests = [
            pace.request(ask.prompt, id=str(i), **ask.settings) for i, ask in enumerate(asks[:12])
        ]
        done = {completion.request_id: completion.text for completion in pace.stream(requests)}
        wrong.extend(ask for i, ask in enumerate(asks[:12]) if done[str(i)] != ask.alone)

    for thread in in_threads(4, work):
        thread.join()

    assert wrong == []
    assert is_empty(pace)
