"""An answer ends at the token that completes a stop, however tokens and characters overlap."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paceline.contracts import Request
from paceline.drafting.none import NoneDrafter
from paceline.engine.endings import final_text
from paceline.engine.rows import Row
from paceline.models.detokenizer import Detokenizer
from paceline.testing.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = 256


@Detokenizer.wrap
def decode(tokens: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(tokens), skip_special_tokens=True)
    return text


def row_for(max_new_tokens: int = 100, **fields: object) -> Row:
    request = Request("0", (1, 2), max_new_tokens, **fields)
    return Row(0, request, 0, 2 + max_new_tokens, 0.0, [1, 2], NoneDrafter())


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("naïve café, déjà vu", ["é"], "naïve caf"),  # two bytes, two tokens
        ("well done 🎉🎉 done", ["🎉"], "well done "),
        ("a long line\nanother\n\nend", ["\n\n"], "a long line\nanother"),
        ("aaab", ["aab"], "a"),
        ("x", ["x"], ""),
        ("abcabc", ["cab", "abc"], ""),
    ],
)
@pytest.mark.parametrize("run", [1, 3, 100])
def test_text_ends_before_the_stop_string(text: str, stops: list[str], kept: str, run: int) -> None:
    tokens = list(text.encode())
    row = row_for(stop_strings=tuple(stops))
    while row.finish_reason is None:
        row.append_until_stop(tokens[len(row.output) : len(row.output) + run], decode)

    completed = min(
        n for n in range(1, len(tokens) + 1) if any(s in decode(tokens[:n]) for s in stops)
    )
    assert row.finish_reason == "stop"
    assert row.output == tokens[:completed]
    assert final_text(row.output, row.request, decode) == kept


def test_a_long_stop_string_is_found_far_into_a_text() -> None:
    stop = "🎉 the party is over 🎉"
    tokens = list(("🎉 the party " * 30 + stop + " go home").encode())
    row = row_for(1000, stop_strings=(stop,))

    row.append_until_stop(tokens, decode)

    assert decode(row.output).endswith(stop)


def test_append_returns_the_number_of_emitted_tokens() -> None:
    row = row_for(stop_token_ids=frozenset({END}))

    assert row.append_until_stop([10, 11], decode) == 2
    assert row.finish_reason is None
    assert row.append_until_stop([12, END, 13], decode) == 2
    assert row.output == [10, 11, 12, END]
    assert row.finish_reason == "stop"


def test_a_stop_token_is_not_text_but_what_came_before_is() -> None:
    row = row_for(stop_token_ids=frozenset({ord("!")}))
    row.append_until_stop(list(b"hi!"), decode)

    assert final_text(row.output, row.request, decode) == "hi"


def test_a_stop_at_the_limit_is_a_stop() -> None:
    row = row_for(3, stop_token_ids=frozenset({END}))
    row.append_until_stop([10, 11, END], decode)

    assert row.finish_reason == "stop"


def test_the_limit_ends_an_answer_inside_an_accepted_run() -> None:
    row = row_for(3)

    assert row.append_until_stop([10, 11, 12, 13], decode) == 3
    assert row.finish_reason == "length"
