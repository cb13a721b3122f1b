"""Pieces of text are the text, and stops are found, whatever a tokenizer makes of bytes and neighbours.

Compared with decoding everything anew at every token, for tokenizers of several kinds built here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from paceline.contracts import Request
from paceline.drafting.none import NoneDrafter
from paceline.engine.endings import final_text
from paceline.engine.reading import IncrementalText
from paceline.engine.rows import Row
from paceline.engine.streaming import TextStream
from paceline.errors import DecodingError
from paceline.models.detokenizer import Detokenizer
from paceline.models.translation import byte_characters
from paceline.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

SPECIAL = ("</s>", "<|a|>", "<|b|>")
PIECES = ("▁", "▁a", "b", "é", "▁é", "\ufffd", "xy", "▁▁", "€", "\n", "<", "|>", "▁x<|a|>"[:3])
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
STRIP = [decoders.Strip(" ", 1, 0)]


def fallback(ending: list[Any]) -> Tokenizer:
    """Return a tokenizer like Llama 2's (with Strip) or Gemma's, with byte tokens as its fallback."""
    names = [*BYTES, *dict.fromkeys(PIECES)]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2's: bytes in tokens of one or more, some of them parts of characters."""
    characters = byte_characters()
    several = [b"ab", "é".encode(), b" \xe2\x82", b"\x82\xac", b"\xac ", "�".encode()]
    joined = ["".join(characters[byte] for byte in token) for token in several]
    vocabulary = {name: i for i, name in enumerate([*characters, *joined])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def words(decoder: Any, names: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.decoder = decoder
    return tokenizer


PLAIN: dict[str, Tokenizer] = {
    "byte level": byte_level(),
    "byte fallback, stripped": fallback(STRIP),
    "byte fallback": fallback([]),
    "metaspace": words(decoders.Metaspace(), [*PIECES[:6], "a", ".", "▁."]),
    "wordpiece": words(decoders.WordPiece(), ["un", "##a", "##ing", "b", ".", "n't", "do", "'"]),
    "suffix": words(decoders.BPEDecoder(), ["a</w>", "b", "é</w>", "c"]),
    "names of bytes as text": words(decoders.Fuse(), [*BYTES[60:70], "a", "b"]),
}


def detokenizer_of(tokenizer: Tokenizer) -> Detokenizer:
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], extra_special_tokens=list(SPECIAL[1:])
    )
    return Detokenizer.of(fast, Vocabulary.of(fast))


KINDS = {name: detokenizer_of(tokenizer) for name, tokenizer in PLAIN.items()}


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Generate answers: any text, special tokens, ids without a token, and runs of likely bytes."""
    detokenizer = KINDS[kind]
    assert detokenizer.num_ids is not None
    anything = st.integers(0, detokenizer.num_ids + 1)
    rare = st.sampled_from([*detokenizer.special, detokenizer.num_ids])
    common = st.integers(0, detokenizer.num_ids - 1 - len(SPECIAL))
    likely = [0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0x20, 0x0A, 0xFF, 0x61]
    byte = st.sampled_from([b for b in likely if b < detokenizer.num_ids])
    if "byte" in kind:
        token = st.one_of(byte, byte, common, rare)
    else:
        token = st.one_of(common, common, rare, anything)
    return st.lists(token, max_size=60)


kinds = pytest.mark.parametrize("kind", KINDS)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def in_chunks(tokens: Sequence[int], chunks: Sequence[int]) -> list[list[int]]:
    parts, at, turn = [], 0, 0
    while at < len(tokens):
        parts.append(list(tokens[at : at + chunks[turn % len(chunks)]]))
        at, turn = at + len(parts[-1]), turn + 1
    return parts


@kinds
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_settled_text_stays_and_the_rest_is_open(kind: str, data: st.DataObject) -> None:
    decode = KINDS[kind]
    tokens = data.draw(ids_of(kind))
    heard = [t for t in tokens if not decode.is_silent(t)]
    reader, settled = IncrementalText(decode.decode, decode.byte_of), ""
    at = 0
    for chunk in in_chunks(heard, data.draw(sizes)):
        settled += reader.push(chunk)
        at += len(chunk)
        assert settled + reader.open_text() == decode(heard[:at])
    assert decode(tokens) == decode(heard) and decode(tokens).startswith(settled)


@kinds
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_pieces_are_the_text(kind: str, data: st.DataObject) -> None:
    decode = KINDS[kind]
    tokens = data.draw(ids_of(kind))
    stream = TextStream(decode)
    pieces = [stream.push(chunk) for chunk in in_chunks(tokens, data.draw(sizes))]

    assert "".join(pieces) + stream.finish(decode(tokens)) == decode(tokens)


@pytest.mark.wide
@kinds
def test_the_same_of_many_answers(kind: str) -> None:
    checks = [test_settled_text_stays_and_the_rest_is_open, test_pieces_are_the_text]
    if kind != "wordpiece":
        checks.append(test_stops_end_an_answer_where_the_text_first_holds_them)
    for check in checks:
        many = given(data=st.data())(check.hypothesis.inner_test)
        settings(max_examples=600, deadline=None)(many)(kind=kind)


def draw_stops(kind: str, tokens: Sequence[int], data: st.DataObject) -> tuple[str, ...]:
    """Stop strings that the answer is likely to hold: parts of it, also with special tokens."""
    decode = KINDS[kind]
    stops = []
    for _ in range(data.draw(st.integers(1, 3))):
        text = data.draw(st.sampled_from([decode(tokens), decode.spell(tokens), *SPECIAL, "xé"]))
        start = data.draw(st.integers(0, max(0, len(text) - 1)))
        stops.append(text[start : start + data.draw(st.integers(1, 8))] or "é")
    return tuple(stops)


# WordPiece, which no causal model uses, writes a first token as `##a`, and as `a` behind a special
# token: where that is spelled out, it is another text, and a stream that cannot know says so
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wordpiece"])
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_stops_end_an_answer_where_the_text_first_holds_them(
    kind: str, data: st.DataObject
) -> None:
    decode = KINDS[kind]
    tokens = data.draw(ids_of(kind))
    stops = draw_stops(kind, tokens, data)
    named = [stop for stop in stops if any(s in stop for s in SPECIAL)]

    def holds_stop(part: Sequence[int]) -> bool:
        text, spelled = decode(part), decode.spell(part)
        return any(s in text for s in stops) or any(s in spelled for s in named)

    expected = next((n for n in range(1, len(tokens) + 1) if holds_stop(tokens[:n])), None)
    request = Request("0", (1,), 1000, stop_strings=stops)
    row = Row(0, request, 0, 1001, 0.0, [1], NoneDrafter())
    stream, pieces = TextStream(decode, stops), []
    for chunk in in_chunks(tokens, data.draw(sizes)):
        num_appended = row.append_until_stop(chunk, decode)
        if row.finish_reason is not None:
            break
        pieces.append(stream.push(chunk[:num_appended]))
    text = final_text(row.output, row.request, decode)

    assert len(row.output) == (len(tokens) if expected is None else expected)
    assert (row.finish_reason == "stop") == (expected is not None)
    assert decode(row.output).startswith(text) and not any(stop in text for stop in stops)
    assert "".join(pieces) + stream.finish(text) == text


@pytest.mark.parametrize("num_ends", [1, 2])
def test_what_a_decoder_puts_before_a_special_token_is_text_or_not_sent(num_ends: int) -> None:
    """As BPEDecoder's blank, which the last token alone is without."""
    decode, stop = KINDS["suffix"], "</s>a "
    row = Row(0, Request("0", (1,), 9, stop_strings=(stop,)), 0, 10, 0.0, [1], NoneDrafter())
    stream, end = TextStream(decode, (stop,)), next(iter(decode.special))
    pieces = []
    for token in (0, *[end] * num_ends, 0, 0):
        row.append_until_stop([token], decode)
        pieces += [stream.push([token])] if row.finish_reason is None else []

    text = final_text(row.output, row.request, decode)
    assert (row.finish_reason, text.rstrip()) == ("stop", "a")
    assert "".join(pieces) + stream.finish(text) == text


# --- special tokens in stop strings ---------------------------------------------------------------

A, B = "<|a|>", "<|b|>"


def encode(kind: str, *parts: str) -> list[int]:
    """Ids of special tokens by name, of other text by its bytes."""
    by_name = {text: id for id, text in KINDS[kind].special.items()}
    return [id for part in parts for id in ([by_name[part]] if part in by_name else part.encode())]


@pytest.mark.parametrize("kind", ["byte level", "byte fallback, stripped", "byte fallback"])
@pytest.mark.parametrize(
    ("parts", "stop", "num_parts", "kept"),
    [
        (["one", A, "two"], A, 2, "one"),
        (["one", A, "two", B, "x"], f"two{B}", 4, "one"),
        (["one", B, A, "two"], B + A, 3, "one"),
        (["on", "e", A, "t", "wo"], f"e{A}t", 4, "on"),
        (["one", A, "xy", B, "z"], f"e{A}xy{B}", 4, "on"),
        (["one", A, "two"], "|a|", 3, "onetwo"),  # a part of a special token's name is no text
        (["one", A, "two"], ">", 3, "onetwo"),
        (["one", A, "two"], "netw", 3, "o"),  # it stands between, unseen
        (["a<|", "a|>", "b"], A, 2, "a"),  # written out as text
        (["one", A], f"x{A}", 2, "one"),
    ],
)
def test_stop_strings_of_special_tokens_stop(
    kind: str, parts: list[str], stop: str, num_parts: int, kept: str
) -> None:
    decode, tokens = KINDS[kind], encode(kind, *parts)
    request = Request("0", (1,), 1000, stop_strings=(stop,))
    row = Row(0, request, 0, 1001, 0.0, [1], NoneDrafter())
    stream, pieces = TextStream(decode, (stop,)), []
    for token in tokens:
        row.append_until_stop([token], decode)
        if row.finish_reason is not None:
            break
        pieces.append(stream.push([token]))

    text = final_text(row.output, row.request, decode)
    assert text == kept
    assert "".join(pieces) + stream.finish(text) == kept
    assert len(row.output) <= len(encode(kind, *parts[:num_parts]))
    assert (row.finish_reason == "stop") == (kept != decode(tokens))


# --- what it costs --------------------------------------------------------------------------------

LONG = 3000
COSTLY: dict[str, tuple[str, bytes]] = {
    "stray bytes": ("byte level", b"\xff"),
    "continuations": ("byte level", b"\x80"),
    "characters that never end": ("byte level", b"\xf0\x9f\x98"),
    "three bytes each": ("byte level", "日".encode()),
    "real replacement characters": ("byte level", "\ufffd".encode()),
    "one run": ("byte fallback, stripped", "日".encode()),
    "one bad run": ("byte fallback, stripped", b"\xff"),
    "a run of spaces": ("byte fallback, stripped", b" "),
    "newlines": ("byte fallback", b"\n"),
}


@pytest.mark.parametrize("what", COSTLY)
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("ending", [None, "b"])
def test_the_work_is_linear_in_the_answer(what: str, size: int, ending: str | None) -> None:
    kind, repeated = COSTLY[what]
    counted = [0]

    def count(tokens: Sequence[int]) -> str:
        counted[0] += len(tokens)
        return KINDS[kind].decode(tokens)

    decode = replace(KINDS[kind], decode=count)
    tokens = list(repeated * (LONG // len(repeated)))
    if ending is not None:  # runs that end, again and again
        piece = 256 + PIECES.index("b") if "fallback" in kind else ord("b")
        tokens = [t for i in range(0, LONG, 30) for t in (*tokens[i : i + 30], piece)]
    stream = TextStream(decode, ["no such text"])
    for chunk in in_chunks(tokens, [size]):
        stream.push(chunk)
    assert counted[0] <= 60 * len(tokens)

    counted[0] = 0
    request = Request("0", (1,), 10**6, stop_strings=("no such text",))
    row = Row(0, request, 0, 10**6, 0.0, [1], NoneDrafter())
    row.append_until_stop(tokens, decode)
    assert counted[0] <= 60 * len(tokens)


def test_a_stray_byte_does_not_hold_back_what_follows() -> None:
    stream = TextStream(KINDS["byte level"])

    assert stream.push([0xFF, *b" and on"]) == "\ufffd and on"
    assert stream.push([0xE2, 0x82]) == ""
    assert stream.push(b"!") == "\ufffd!"


def test_a_change_of_streamed_text_raises() -> None:
    """As of a decoder that reads the text from its end."""
    stream = TextStream(Detokenizer.wrap(lambda tokens: "".join(map(str, reversed(tokens)))))
    assert stream.push([1]) == "1"
    assert stream.push([2]) == ""

    with pytest.raises(DecodingError, match="pieces are not the text"):
        stream.finish("21")
