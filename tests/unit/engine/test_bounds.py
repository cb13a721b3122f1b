"""What the caches hold stays within bounds, also after a long request; steady traffic moves nothing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import paceline
from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.drafting.bridged_drafters import Bridge
from paceline.drafting.cross_vocabulary import CrossVocabulary, CrossVocabularySettings
from paceline.drafting.union import Union, UnionSettings
from paceline.engine import Engine
from paceline.errors import RequestError
from paceline.models.cache import RowCache
from paceline.models.compiled.cache import PackedRows
from paceline.models.language_model import LanguageModel
from paceline.testing.scripted import ScriptedTree
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from paceline.contracts import Completion, Request

CONTEXT, BOUND = 1200, 1100
TOKENIZER = byte_tokenizer()
# one whose rows own memory of their own, and one whose rows share a tensor per layer
CACHES = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


@functools.cache
def model_of(architecture: str, seed: int = 0) -> PreTrainedModel:
    return tiny_model(architecture, seed=seed, context=CONTEXT)


def pace_with(architecture: str, drafters: dict[str, Any] | None = None, **engine: Any) -> Pace:
    config = Config(target=ModelSection(model="m"), engine=EngineSection(**engine))
    return Pace(build_from_objects(model_of(architecture), TOKENIZER, drafters or {}, config))


def caches(engine: Engine) -> dict[str, RowCache]:
    found = {"target": engine.target.cache}
    for name, drafter in engine.drafters.items():
        model = getattr(drafter, "model", None)
        if model is not None:
            found[name] = model.cache
    return found  # type: ignore[return-value]


def held(cache: RowCache | PackedRows) -> int:
    """Return the positions of all rows; of a shared tensor, slots x positions of the largest layer."""
    if isinstance(cache, PackedRows):
        return sum(cache._capacities)
    return max((s.shape[0] * s.shape[2] for s in cache.layers if s is not None), default=0)


def run(engine: Engine, requests: list[Request], check: Any) -> dict[str, Completion]:
    for request in requests:
        engine.submit(request)
    done: dict[str, Completion] = {}
    while len(done) < len(requests):
        for progress in engine.step():
            if progress.completion is not None:
                done[progress.completion.request_id] = progress.completion
        check()
    return done


@CACHES
def test_a_bound_holds_after_a_long_request_has_passed(architecture: str) -> None:
    model = tiny_model(architecture, context=9000)
    pace = paceline.load(target=model, tokenizer=TOKENIZER, drafters={})
    for first in (None, "x" * 8000):
        target = LanguageModel(model, "target")
        engine = Engine(
            target, dict(pace.parts.drafters), decode=str, max_rows=8, max_positions=9000
        )
        most = [0]

        def check(held_by: RowCache = target.cache, most: list[int] = most) -> None:  # type: ignore[assignment]
            most[0] = max(most[0], held(held_by))

        settings: dict[str, Any] = {"drafter": "none", "max_new_tokens": 8}
        if first:
            run(engine, [pace.request(first, **settings)], check)
            assert most[0] >= 8000
        run(engine, [pace.request("hello", id=str(i), **settings) for i in range(8)], check)
        assert most[0] <= 9000
        assert held(target.cache) <= 8 * 128


def drafters_of_every_cache(architecture: str) -> dict[str, Any]:
    """Return a draft model, one with another tokenizer that makes more ids, and a union of two."""
    near, far = (model_of(architecture, seed) for seed in (1, 3))
    config = Config(target=ModelSection(model="m"))
    parts = build_from_objects(
        model_of(architecture), TOKENIZER, {"near": near, "far": far}, config
    )
    context = parts.build_context()
    union = Union.build("both", UnionSettings(parts=("near", "far")), context)
    own = LanguageModel(model_of(architecture, 2), "own")
    settings = CrossVocabularySettings(model="m", level="text")
    bridge = Bridge.between(TOKENIZER, TOKENIZER, "text")
    through = CrossVocabulary.from_model("through", own, settings, bridge, context)
    assert type(through).__name__ == "ThroughText"
    del parts.drafters["none"]
    return {**parts.drafters, "both": union, "through": through}


def traffic(pace: Pace, arms: list[str], seed: int, n: int = 14) -> list[Request]:
    order = np.random.default_rng(seed)
    requests = []
    for i in range(n):
        length = int(order.choice([5, 40, 150, 500], p=[0.4, 0.3, 0.2, 0.1]))
        prompt = order.integers(1, 250, length).tolist()
        settings = {
            "drafter": str(order.choice(arms)),
            "max_new_tokens": int(order.integers(1, 40)),
        }
        requests.append(pace.request(prompt, id=str(i), **settings))
    return requests


@CACHES
@pytest.mark.parametrize("seed", range(3))
def test_every_cache_stays_within_max_positions(architecture: str, seed: int) -> None:
    drafters = drafters_of_every_cache(architecture)
    pace = pace_with(architecture, drafters, max_rows=6, max_positions=BOUND, prefix_positions=256)
    engine = pace.engine
    controlled = caches(engine) | {"through": drafters["through"]._inside.model.cache}
    requests = traffic(pace, list(engine.drafters), seed)
    most_rows = [0]

    def check() -> None:
        most_rows[0] = max(most_rows[0], engine.num_rows)
        for name, cache in controlled.items():
            assert held(cache) <= BOUND, name

    done = run(engine, requests, check)

    assert most_rows[0] >= 3
    alone = pace_with(architecture)
    for request in requests:
        plain = alone.complete(
            list(request.prompt_tokens), drafter="none", max_new_tokens=request.max_new_tokens
        )
        assert done[request.id].token_ids == plain.token_ids


@pytest.mark.parametrize(("architecture", "needed"), [("llama", 384), ("gpt2", 344)])
def test_a_tree_counts_with_all_its_branches(architecture: str, needed: int) -> None:
    wide = ScriptedTree("wide", lambda tokens, limit: ([7] * 60, [-1] * 60) if limit else ([], []))
    pace = pace_with(architecture, {"wide": wide}, max_rows=4, max_positions=330)
    with pytest.raises(RequestError, match=f"may need {needed} positions"):
        pace.request([1] * 200, drafter="wide", max_new_tokens=80)
    pace.request([1] * 200, drafter="none", max_new_tokens=80)

    requests = [pace.request([1], str(i), drafter="wide", max_new_tokens=40) for i in range(6)]
    cache = pace.engine.target.cache

    run(pace.engine, requests, lambda: held(cache) <= 330 or pytest.fail(str(held(cache))))


@CACHES
@pytest.mark.parametrize("seed", range(2))
def test_drafters_hold_no_more_megabytes_than_they_may(architecture: str, seed: int) -> None:
    near, far = (model_of(architecture, seed) for seed in (1, 2))
    probe = pace_with(architecture, {"near": near})
    one = probe.parts.drafters["near"].state_bytes([128])
    bound = 5 * one
    pace = pace_with(
        architecture, {"near": near, "far": far}, max_rows=6, max_drafter_mb=bound / 1e6
    )
    drafters = [pace.parts.drafters[name] for name in ("near", "far")]
    most = [0]

    def check() -> None:
        bytes_held = sum(drafter.model.cache.num_bytes() for drafter in drafters)
        assert bytes_held <= bound
        most[0] = max(most[0], bytes_held)

    done = run(pace.engine, traffic(pace, ["near", "far"], seed, 20), check)

    assert most[0] >= 2 * one
    assert {c.drafter for c in done.values()} == {"near", "far", "none"}
    assert sum(drafter.model.cache.num_bytes() for drafter in drafters) == 0


@pytest.mark.parametrize("bound", [None, BOUND])
@pytest.mark.parametrize(("architecture", "rows"), [("llama", 1), ("gpt2", 1), ("gpt2", 4)])
def test_steady_traffic_moves_no_storage(bound: int | None, architecture: str, rows: int) -> None:
    pace = pace_with(architecture, {"near": model_of(architecture, 1)}, max_positions=bound)
    engine, grown = pace.engine, [0]
    for cache in caches(engine).values():
        grow = cache._grow

        def counted(*args: Any, grow: Any = grow) -> Any:
            grown[0] += 1
            return grow(*args)

        cache._grow = counted  # type: ignore[method-assign]
    prompt, submitted, ended = [1] * 60, 0, 0
    after_warm_up = None
    while ended < 30:
        while submitted < 30 and submitted - ended < rows:
            # of unequal lengths, so that rows do not end together
            settings = {"drafter": "near", "max_new_tokens": 10 + 7 * (submitted % 4)}
            engine.submit(pace.request(prompt, id=str(submitted), **settings))
            submitted += 1
        ended += sum(p.completion is not None for p in engine.step())
        if ended >= 6 and after_warm_up is None:
            after_warm_up = grown[0]
    assert grown[0] == after_warm_up


@CACHES
def test_a_drafter_without_room_in_its_cache_does_not_draft(architecture: str) -> None:
    """As one that reads the text in many more ids than the target: its rows may be longer."""
    pace = pace_with(architecture, {"near": model_of(architecture, 1)}, max_rows=2)
    drafter = pace.parts.drafters["near"]
    drafter.bound_cache(100, exact_fit=False)
    settings: dict[str, Any] = {"drafter": "near", "max_new_tokens": 30}
    cache = drafter.model.cache  # type: ignore[attr-defined]

    [long] = run(pace.engine, [pace.request([1] * 200, **settings)], lambda: None).values()
    assert sum(r.drafted for r in long.rounds) == 0 and held(cache) <= 100
    [short] = run(pace.engine, [pace.request([1] * 30, **settings)], lambda: None).values()
    assert sum(r.drafted for r in short.rounds) > 0 and held(cache) <= 100

    def check() -> None:
        assert held(cache) <= 100

    first, second = (pace.request([1] * 55, str(i), **settings) for i in range(2))
    pace.engine.submit(first)
    for _ in range(3):  # it has more cached than two rows may have each
        pace.engine.step()
        check()
    assert pace.engine.num_rows == 1
    done = run(pace.engine, [second], check)
    assert all(c.error is None for c in done.values())


@CACHES
def test_empty_slots_of_the_target_count(architecture: str) -> None:
    """The storage of a row in the last slot includes all slots before it."""
    pace = pace_with(architecture, max_rows=3, max_positions=600)
    settings: dict[str, Any] = {"drafter": "none", "ignore_eos": True}
    lengths = [2, 2, 60]
    requests = [
        pace.request([1], str(i), max_new_tokens=n, **settings) for i, n in enumerate(lengths)
    ]
    for request in requests:
        pace.engine.submit(request)
    for _ in range(4):
        pace.engine.step()
    assert (pace.engine.num_rows, pace.engine.target.cache.num_slots) == (1, 3)

    cache = pace.engine.target.cache
    long = pace.request([1] * 250, "long", max_new_tokens=8, **settings)  # two fit, three do not
    run(pace.engine, [long], lambda: held(cache) <= 600 or pytest.fail(str(held(cache))))


def megabytes(architecture: str, units: int) -> tuple[Pace, Any, int]:
    """Return a pace whose drafters may hold a number of stretches of 128 positions, and its check."""
    near, far = (model_of(architecture, seed) for seed in (1, 2))
    one = pace_with(architecture, {"near": near}).parts.drafters["near"].state_bytes([128])
    pace = pace_with(
        architecture, {"near": near, "far": far}, max_rows=4, max_drafter_mb=units * one / 1e6
    )
    drafters: list[Any] = [pace.parts.drafters[name] for name in ("near", "far")]

    def check() -> None:
        assert sum(drafter.model.cache.num_bytes() for drafter in drafters) <= units * one

    return pace, check, one


@CACHES
def test_what_a_long_row_held_is_there_for_another_drafter(architecture: str) -> None:
    pace, check, _ = megabytes(architecture, 9)
    long = pace.request([1] * 400, "long", drafter="near", max_new_tokens=3)
    short = pace.request([1] * 5, "short", drafter="near", max_new_tokens=100, ignore_eos=True)
    pace.engine.submit(long)
    pace.engine.submit(short)
    while pace.engine.num_rows != 1:
        pace.engine.step()
        check()

    other = pace.request([1] * 400, "other", drafter="far", max_new_tokens=3)
    assert run(pace.engine, [other], check)["other"].drafter == "far"


@CACHES
def test_empty_slots_of_a_drafter_count(architecture: str) -> None:
    pace, check, _ = megabytes(architecture, 9)
    settings: dict[str, Any] = {"drafter": "near", "ignore_eos": True}
    for i, n in enumerate((2, 2, 100)):
        pace.engine.submit(pace.request([1] * 5, str(i), max_new_tokens=n, **settings))
    for _ in range(4):
        pace.engine.step()
        check()
    assert pace.engine.num_rows == 1

    long = pace.request(
        [1] * 400, "long", max_new_tokens=3, **settings
    )  # of three slots, not of two
    assert run(pace.engine, [long], check)["long"].decision.policy == "no memory for near"
