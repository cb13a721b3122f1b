"""The engine step by step: admission, cancellation, switches, shared prefixes, streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from support.reference import greedy_reference

from paceline.assembly import Pace, build_from_objects
from paceline.config import Config, EngineSection, ModelSection
from paceline.contracts import Drafts, Request
from paceline.drafting.base import Drafter
from paceline.engine import TextStream
from paceline.engine.prefixes import PrefixStore
from paceline.errors import DecodingError, QueueFullError, RequestError
from paceline.models.cache import RowCache
from paceline.models.detokenizer import Detokenizer
from paceline.models.packing import PREFILL_BLOCK as BLOCK
from paceline.testing.scripted import ScriptedDrafter, copying
from paceline.testing.tiny_models import perturbed, tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT = 320
MODEL = tiny_model("llama", context=CONTEXT)
PROMPT = tuple(b"to be or not to be")
LONG = tuple(b"All the world is a stage, and all the men and women merely players. " * 3)
TOKENIZER = byte_tokenizer()


def pace_with(drafters: dict[str, Any] | None = None, **engine: Any) -> Pace:
    config = Config(target=ModelSection(model="in memory"), engine=EngineSection(**engine))
    return Pace(build_from_objects(MODEL, TOKENIZER, drafters or {}, config))


def ask(id: str = "0", prompt: tuple[int, ...] = PROMPT, n: int = 10, **fields: Any) -> Request:
    return Request(id, prompt, n, drafter=fields.pop("drafter", "none"), **fields)


def run_out(pace: Pace) -> dict[int, Any]:
    done = {}
    while pace.engine.num_rows or pace.engine.num_waiting:
        for progress in pace.engine.step():
            if progress.completion is not None:
                done[progress.ticket] = progress.completion
    return done


# --- admission ------------------------------------------------------------------------------------


def test_the_queue_is_bounded() -> None:
    engine = pace_with(max_rows=1, max_waiting=2).engine
    for i in range(2):
        engine.submit(ask(str(i)))

    assert engine.is_full
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.submit(ask("2"))
    engine.step()
    engine.submit(ask("3"))


def test_generate_takes_more_requests_than_may_wait() -> None:
    pace = pace_with(max_rows=2, max_waiting=1)

    assert len(list(pace.driver.generate([ask(str(i)) for i in range(7)]))) == 7


def test_rows_are_admitted_as_far_as_the_cache_reaches() -> None:
    pace = pace_with(max_rows=8, max_positions=150)
    for i in range(4):
        pace.engine.submit(ask(str(i), n=20))  # 38 positions each, held in blocks of 64
    pace.engine.step()

    assert (pace.engine.num_rows, pace.engine.num_waiting) == (2, 2)
    assert len(run_out(pace)) == 4
    with pytest.raises(RequestError, match=r"may need 192 positions.*holds 150.*max_positions"):
        pace.engine.submit(ask(n=150))


def test_a_drafter_without_memory_for_a_row_leaves_it_to_none() -> None:
    near = perturbed(MODEL, 0.05)
    plain = pace_with().complete("spam and spam", drafter="none", max_new_tokens=20)
    pace = pace_with({"near": near})
    drafter = pace.parts.drafters["near"]
    total = plain.num_prompt_tokens + 20
    one_row = drafter.state_bytes([total]) / 1e6
    pace = pace_with({"near": near}, max_rows=3, max_drafter_mb=one_row * 1.5)

    first, second = pace.generate(["spam and spam"] * 2, drafter="near", max_new_tokens=20)

    assert [first.drafter, second.drafter] == ["near", "none"]
    assert second.decision.policy == "no memory for near"
    assert first.token_ids == second.token_ids == plain.token_ids
    assert pace.complete("spam and spam", drafter="near", max_new_tokens=20).drafter == "near"


def test_a_draft_models_cache_is_there_when_first_used_and_as_large_as_it_says() -> None:
    pace = pace_with({"near": perturbed(MODEL, 0.05)})
    drafter = pace.parts.drafters["near"]
    weights = drafter.num_bytes()

    pace.complete("spam", drafter="none", max_new_tokens=4)
    assert drafter.num_bytes() == weights
    pace.complete("spam", drafter="near", max_new_tokens=4)
    # a cache grows by blocks of 128 positions
    assert drafter.num_bytes() - weights == drafter.state_bytes([128])


def test_running_rows_move_on_while_a_long_prompt_is_prefilled() -> None:
    near = perturbed(MODEL, 0.05)
    pace = pace_with({"near": near}, prefill_chunk=32)
    short = pace.engine.submit(ask("short", n=40))
    for _ in range(3):
        pace.engine.step()
    long = pace.engine.submit(ask("long", LONG, 4, drafter="near"))

    waited = 0
    for _ in range(40):
        progress = pace.engine.step()
        if any(p.ticket == long for p in progress):
            break
        waited += 1
        assert [p.ticket for p in progress] == [short]
    # 7 pieces of the target's prefill; the last one brings the first token
    assert waited == -(-len(LONG) // 32) - 1
    # and as many of the drafter's before the second: one in that step, one in the step that drafts
    steps = 0
    while not any(p.ticket == long for p in pace.engine.step()):
        steps += 1
    assert steps == waited - 1


# --- cancelling and switching ---------------------------------------------------------------------


def test_a_cancelled_row_is_free_before_the_next_round() -> None:
    pace = pace_with({"near": perturbed(MODEL, 0.05)}, max_rows=1)
    first = pace.engine.submit(ask("first", n=200, drafter="near"))
    second = pace.engine.submit(ask("second", n=3))
    pace.engine.step()
    pace.engine.cancel(first)

    progress = pace.engine.step()

    ended = next(p for p in progress if p.ticket == first).completion
    assert ended is not None and ended.finish_reason == "cancelled"
    assert 0 < len(ended.token_ids) < 200 and ended.text
    assert any(p.ticket == second for p in progress)  # it has the row in this very step
    assert pace.parts.drafters["near"]._states == {}  # type: ignore[attr-defined]


def test_a_waiting_request_can_be_cancelled() -> None:
    pace = pace_with(max_rows=1)
    pace.engine.submit(ask("first"))
    second = pace.engine.submit(ask("second"))
    pace.engine.cancel(second)
    pace.engine.cancel(12345)  # nobody's

    done = run_out(pace)

    assert done[second].finish_reason == "cancelled" and done[second].token_ids == []
    assert pace.engine.num_rows == 0


def test_a_row_may_change_its_drafter_between_rounds() -> None:
    expected = greedy_reference(MODEL, PROMPT, 40).tokens
    right = ScriptedDrafter("right", copying([*PROMPT, *expected]), 4)
    pace = pace_with({"near": perturbed(MODEL, 0.05), "right": right})
    ticket = pace.engine.submit(ask(n=40, drafter="none"))
    for arm in ("right", "near", "none", "right"):
        pace.engine.step()
        pace.engine.switch(ticket, arm)

    completion = run_out(pace)[ticket]

    assert completion.token_ids == expected
    assert completion.drafter == "right" and completion.decision.policy == "switched"
    assert max(r.accepted for r in completion.rounds) == 4
    with pytest.raises(RequestError, match="unknown drafter 'left'"):
        pace.engine.switch(ticket, "left")


# --- shared beginnings ----------------------------------------------------------------------------


def prefilled_tokens(pace: Pace) -> list[int]:
    """Token counts of the target's forwards from here on."""
    counts: list[int] = []
    forward = pace.parts.target.forward
    pace.parts.target.forward = lambda tokens, *rest: (  # type: ignore[method-assign]
        counts.append(len(tokens)) or forward(tokens, *rest)  # type: ignore[func-returns-value]
    )
    return counts


def test_a_conversation_that_goes_on_is_not_prefilled_again() -> None:
    pace = pace_with(prefix_positions=512)
    counts = prefilled_tokens(pace)
    again = (*LONG, *b" And one man in his time plays many parts.")
    first = pace.complete(list(LONG), drafter="none", max_new_tokens=5)
    [*_] = counts
    start = len(counts)
    second = pace.complete(list(again), drafter="none", max_new_tokens=5)

    shared = len(LONG) // BLOCK * BLOCK
    assert counts[0] == len(LONG)
    assert counts[start] == len(again) - shared
    assert first.token_ids == greedy_reference(MODEL, LONG, 5).tokens
    assert second.token_ids == greedy_reference(MODEL, again, 5).tokens


def test_a_prompt_of_whole_blocks_still_runs_its_last_token() -> None:
    pace = pace_with({"near": perturbed(MODEL, 0.05)}, prefix_positions=512)
    prompt = LONG[: 2 * BLOCK]
    first, second = (
        pace.complete(list(prompt), drafter="near", max_new_tokens=5) for _ in range(2)
    )

    assert first.token_ids == second.token_ids == greedy_reference(MODEL, prompt, 5).tokens
    # without a prefill there would be neither a first token from it nor a choice of drafter
    assert second.drafter == "near" and second.rounds == first.rounds


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    pace = pace_with(prefix_positions=512)
    other = tuple(reversed(LONG[:BLOCK])) + LONG[BLOCK:]
    for prompt in (LONG, other, LONG[BLOCK:] + LONG[:BLOCK]):
        completion = pace.complete(list(prompt), drafter="none", max_new_tokens=5)
        assert completion.token_ids == greedy_reference(MODEL, prompt, 5).tokens


def test_the_policy_sees_the_same_features_of_a_shared_prompt() -> None:
    seen = []

    def choose(context: Any) -> Any:
        seen.append((context.mean_hidden.copy(), context.last_hidden.copy()))
        from paceline.contracts import Decision

        return Decision("none")

    parts = pace_with(prefix_positions=512).parts
    pace = Pace(parts, choose)
    for _ in range(2):
        pace.complete(list(LONG), max_new_tokens=2)

    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    np.testing.assert_allclose(seen[0][1], seen[1][1], atol=1e-5)


def test_stored_prefixes_are_bounded_and_the_oldest_goes_first() -> None:
    pace = pace_with(prefix_positions=4 * BLOCK)
    store = pace.engine.prefixes
    prompts = [tuple([i]) + LONG for i in range(5)]
    for prompt in prompts:
        pace.complete(list(prompt), drafter="none", max_new_tokens=1)
        assert len(store) <= 4

    cache = RowCache()
    assert store.load(prompts[0], cache, cache.acquire()) == []
    assert len(store.load(prompts[4], cache, 0)) == 3
    assert (
        store.num_bytes() == len(store) * BLOCK * 2 * 2 * 8 * 4 * 2
    )  # k, v; heads; dim; f32; layers


def test_a_store_of_nothing_keeps_nothing() -> None:
    store = PrefixStore(0)
    store.keep(LONG, RowCache(), 0, [np.zeros(1)])

    assert len(store) == 0


# --- streaming ------------------------------------------------------------------------------------


def test_pieces_of_text_are_the_whole_text() -> None:
    pace = pace_with({"near": perturbed(MODEL, 0.05)})
    settings: dict[str, Any] = {"max_new_tokens": 60, "drafter": "near"}
    whole = pace.complete(list(PROMPT), **settings)

    pieces = list(pace.stream_text(list(PROMPT), **settings))

    assert "".join(pieces) == whole.text
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("<|user|>", "hi", 3),
        ("i<|user|>", "h", 3),
        (["zz", "o<|user|>"], "hiy", 6),
        ("yo", "hi", 5),
    ],
)
def test_a_stop_string_may_name_a_special_token(stop: Any, text: str, num_tokens: int) -> None:
    pace = pace_with({"near": perturbed(MODEL, 0.05)})
    answer = [*b"hi", 257, *b"yo", 257, *b"zzz"]
    settings: dict[str, Any] = {"forced_tokens": answer, "stop": stop, "max_new_tokens": 20}
    done = pace.complete(list(PROMPT), drafter="near", **settings)

    assert (done.finish_reason, done.text, len(done.token_ids)) == ("stop", text, num_tokens)
    assert "".join(pace.stream_text(list(PROMPT), drafter="near", **settings)) == text


def test_a_stream_that_is_given_up_frees_its_row() -> None:
    pace = pace_with()
    stream = pace.stream_text(list(PROMPT), drafter="none", max_new_tokens=200)
    next(stream)

    stream.close()

    assert pace.engine.num_rows == 0


def test_a_stream_whose_drafter_fails_says_so() -> None:
    def broken(tokens: Sequence[int], limit: int) -> list[int]:
        raise ValueError("no idea")

    pace = pace_with({"odd": ScriptedDrafter("odd", broken)})

    with pytest.raises(DecodingError, match="drafter 'odd': no idea"):
        list(pace.stream_text(list(PROMPT), drafter="odd", max_new_tokens=20))


TEXT = "naïve 🙂 日本語 and plain; STOPS here STOP there"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_piece_holds_half_a_character(size: int) -> None:
    @Detokenizer.wrap
    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    tokens = list(TEXT.encode())
    stream = TextStream(decode)
    pieces = [stream.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == TEXT
    assert stream.finish(TEXT) == ""


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_piece_holds_the_beginning_of_a_stop_string(size: int) -> None:
    @Detokenizer.wrap
    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    stop, other = " STOP ", "zzz"
    end = TEXT.index(stop)
    before = list(TEXT[: end + len(stop) - 1].encode())  # all but what completes the stop string
    stream = TextStream(decode, [stop, other])
    sent = "".join(stream.push(before[i : i + size]) for i in range(0, len(before), size))

    assert sent == TEXT[:end]
    assert stream.finish(TEXT[:end]) == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    @Detokenizer.wrap
    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    stream = TextStream(decode, ["###"])
    assert stream.push(list(b"a ##")) == "a "
    assert stream.push(list("é".encode())[:1]) == ""
    assert stream.finish("a ##\ufffd") == "##\ufffd"


# --- log-probabilities and hidden states ----------------------------------------------------------


def test_log_probabilities_are_those_of_the_emitted_tokens() -> None:
    pace = pace_with({"near": perturbed(MODEL, 0.05)})
    for arm in ("none", "near"):
        completion = pace.complete(
            list(PROMPT), drafter=arm, max_new_tokens=12, temperature=0.8, seed=1, logprobs=True
        )
        text = torch.tensor([[*PROMPT, *completion.token_ids]])
        with torch.inference_mode():
            logits = MODEL(input_ids=text).logits[0, len(PROMPT) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, text[0, len(PROMPT) :, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert pace.complete(list(PROMPT), drafter="none", max_new_tokens=2).logprobs is None


class CachedPositions(Drafter):
    """Drafts two tokens per round, and records how many positions of the target's cache hold the row."""

    kind: ClassVar[str] = "cached_positions"

    def __init__(self) -> None:
        super().__init__("positions", 2)
        self.seen: list[tuple[int, int]] = []  # (tokens, cached positions)

    def propose(self, rows: Any, limits: Any) -> Drafts:
        self.seen += [(len(row.tokens), row.num_cached) for row in rows]
        lengths = [min(2, max(0, limit)) for limit in limits]
        return Drafts(
            torch.full((len(rows), 2), greedy_reference(MODEL, PROMPT, 2).tokens[1]), lengths
        )

    def would_accept(self, prompt: Any, trajectory: Any, p: Any) -> Any:
        raise NotImplementedError


def test_a_drafter_can_read_the_number_of_cached_positions() -> None:
    drafter = CachedPositions()
    pace = pace_with({"positions": drafter})

    completion = pace.complete(list(PROMPT), drafter="positions", max_new_tokens=20)

    assert completion.token_ids == greedy_reference(MODEL, PROMPT, 20).tokens
    assert drafter.seen[0] == (len(PROMPT) + 1, len(PROMPT))
    assert len(drafter.seen) == len(completion.rounds)
    assert all(num_cached == num_tokens - 1 for num_tokens, num_cached in drafter.seen)


def test_nan_entries_of_a_failed_row_reach_no_other_row() -> None:
    """They stay in its slot of the cache, as masked positions next to a longer row."""
    model = tiny_model("llama", context=CONTEXT)
    assert not model.config.tie_word_embeddings
    pace = Pace(build_from_objects(model, TOKENIZER, {}, Config(target=ModelSection(model="x"))))
    engine = pace.engine
    model.model.embed_tokens.weight.data[200] = float("nan")
    neighbour = ask("neighbour", LONG, 30)
    bad = ask("bad", (*LONG[:100], 200), 5)
    engine.submit(neighbour)
    engine.submit(bad)
    for _ in range(4):
        engine.step()
    assert engine.num_rows == 1
    engine.submit(ask("next", PROMPT, 20))

    done = {c.request_id: c for c in run_out(pace).values()}

    assert done["neighbour"].error is None
    assert done["next"].token_ids == greedy_reference(model, PROMPT, 20).tokens
