"""Text is translated between tokenizers exactly, or not at all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from support.relabelled import relabelled
from support.trained_tokenizers import byte_level_bpe, unigram
from tokenizers import normalizers

from paceline.experiments.demo_prompts import demo_prompts
from paceline.models.translation import (
    RunningText,
    TokenBytes,
    TokenTranslation,
    share_cut_alike,
    share_of_vocabulary,
    shared_tokens,
    special_pairs,
    split_incomplete,
)
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

ODD = "Zoë's naïve café — 東京 🙂 ﬁn\u00a0de\r\n\tsiècle   with  blanks\n\n\n"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [record.prompt for record in demo_prompts(6, 1)[0]]


@pytest.fixture(scope="module")
def sides(texts: list[str]) -> dict[str, TokenBytes]:
    small, large = byte_level_bpe(texts, 400), byte_level_bpe(texts, 800)
    relabelled_large = relabelled(tiny_model(vocab_size=len(large)), large)[1]
    return {
        "small bpe": TokenBytes(small),
        "large bpe": TokenBytes(large),
        "relabelled": TokenBytes(relabelled_large),
        "unigram": TokenBytes(unigram(texts, 500)),
        "bytes": TokenBytes(byte_tokenizer()),
    }


ALL = ("small bpe", "large bpe", "relabelled", "unigram", "bytes")


@pytest.mark.parametrize("name", ALL)
def test_tokens_join_to_the_text_they_were_cut_from(
    sides: dict[str, TokenBytes], texts: list[str], name: str
) -> None:
    side = sides[name]
    for text in texts[:8]:
        joined = side.join(side.encode(text))
        if name == "unigram":  # begins every text with a blank
            assert joined == b" " + text.encode()
        else:
            assert joined == text.encode()


def test_special_tokens_are_no_text(sides: dict[str, TokenBytes]) -> None:
    assert sides["bytes"].join([65, 256, 66]) == b"AB"
    assert sides["unigram"].special.keys() == {0, 1, 2}


def test_shared_tokens_are_found_by_bytes(sides: dict[str, TokenBytes]) -> None:
    bpe, uni = sides["large bpe"], sides["unigram"]
    pairs = shared_tokens(bpe, uni)

    assert len(pairs) > 100
    assert len(set(pairs.values())) == len(pairs)
    words = [
        i
        for i in pairs
        if i not in bpe.special and bpe.of[i].startswith(b" ") and bpe.of[i] != b" "
    ]
    assert len(words) > 20
    for i, own in pairs.items():
        assert bpe.of[i] == uni.of[own]
    assert pairs[bpe.tokenizer.eos_token_id] == uni.tokenizer.eos_token_id


def test_shares_tell_the_cases_apart(sides: dict[str, TokenBytes]) -> None:
    bpe = sides["large bpe"]

    assert share_of_vocabulary(bpe, sides["relabelled"]) == 1.0
    assert share_cut_alike(bpe, sides["relabelled"]) == 1.0
    assert share_of_vocabulary(bpe, sides["small bpe"]) > 0.9
    assert 0.3 < share_cut_alike(bpe, sides["small bpe"]) < 1.0
    assert share_of_vocabulary(bpe, sides["unigram"]) < 1.0
    assert share_cut_alike(bpe, sides["unigram"]) < 0.7
    assert share_cut_alike(bpe, sides["bytes"]) < 0.7


@pytest.mark.parametrize("other", ALL)
@pytest.mark.parametrize("target", ["large bpe", "unigram"])
def test_every_token_can_be_read(sides: dict[str, TokenBytes], target: str, other: str) -> None:
    mine, theirs = sides[target], sides[other]
    pairs = shared_tokens(mine, theirs)
    readings = TokenTranslation(mine, theirs, pairs)
    whole = 0
    for i in range(mine.num_tokens + 3):  # the last ones are padding of the logits
        own = readings.of(i)
        assert own and all(0 <= o < theirs.num_tokens for o in own)
        if i in pairs:
            assert own == (pairs[i],)
        elif i < mine.num_tokens:
            whole += theirs.join(own) == mine.of[i]
    if other != "unigram":
        assert whole >= mine.num_tokens - len(pairs) - 3  # all but special tokens


@pytest.mark.parametrize("name", ALL)
def test_text_after_a_text_is_encoded_in_exactly_its_bytes(
    sides: dict[str, TokenBytes], texts: list[str], name: str
) -> None:
    side, choose = sides[name], random.Random(0)
    said = tried = canonical = 0
    for text in [*texts[:12], ODD]:
        whole = text.encode()
        ids = side.encode(text)
        for _ in range(12):
            # at a token's end, where a target would stand
            place = choose.randrange(1, len(ids))
            cut = len(side.join(ids[:place])) - (name == "unigram")
            rest = whole[cut : cut + choose.randint(1, 12)]
            rest, _ = split_incomplete(rest)
            found = side.encode_after(whole[:cut], rest) if rest else []
            tried += 1
            if found is not None:
                said += 1
                assert side.join(found) == rest
                canonical += found[:1] == ids[place : place + 1]
    assert said > 0.8 * tried
    assert canonical > 0.5 * tried


def test_text_that_cannot_be_encoded_is_none(sides: dict[str, TokenBytes]) -> None:
    bpe, uni = sides["large bpe"], sides["unigram"]

    assert bpe.encode_after(b"a", b"\xff\xfe") is None  # no character
    assert (
        bpe.encode_after("é".encode()[:1], "é".encode()[1:]) is not None
    )  # its second half is one
    assert uni.encode_after(b"x", "東".encode()) is None  # <unk>
    assert bpe.encode_after(b"x", b"</s>") is None  # would become a special token
    assert bpe.encode_after(b"x", b"") == []


def test_a_tokenizer_that_changes_text_encodes_only_unchanged_text(texts: list[str]) -> None:
    tokenizer = byte_level_bpe(texts, 400)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    side = TokenBytes(tokenizer)

    assert side.encode_after(b"x", b" ABC") is None
    assert side.encode_after(b"X", b" abc") is not None  # what stands before is not in the way


def test_the_beginning_of_a_text_is_read_once(sides: dict[str, TokenBytes]) -> None:
    uni, bpe = sides["unigram"], sides["large bpe"]
    bos = uni.tokenizer.bos_token_id

    assert uni.first() == [bos] and bpe.first() == []
    assert running(bpe, uni).extend(bpe.encode("hi"))[:1] == [bos]
    whole = [bos, *uni.encode("hi")]
    assert running(uni, uni).extend(whole) == whole


@pytest.mark.parametrize(
    ("text", "whole", "rest"),
    [
        (b"", b"", b""),
        (b"abc", b"abc", b""),
        ("aé".encode(), "aé".encode(), b""),
        ("aé".encode()[:-1], b"a", b"\xc3"),
        ("a東".encode()[:-1], b"a", "東".encode()[:2]),
        ("🙂".encode()[:3], b"", "🙂".encode()[:3]),
        (b"a\x80\x80\x80\x80", b"a\x80\x80\x80\x80", b""),  # not the beginning of any
    ],
)
def test_the_beginning_of_a_character_is_split_off(text: bytes, whole: bytes, rest: bytes) -> None:
    assert split_incomplete(text) == (whole, rest)


# --- running text ---------------------------------------------------------------------------------


def running(target: TokenBytes, own: TokenBytes) -> RunningText:
    return RunningText(target, own, special_pairs(target, own))


@pytest.mark.parametrize("own", ALL)
@pytest.mark.parametrize("target", ["large bpe", "unigram", "bytes"])
def test_ids_depend_on_the_text_alone(
    sides: dict[str, TokenBytes], texts: list[str], target: str, own: str
) -> None:
    """The ids are the same token by token, in random pieces and at once, after closed pieces too."""
    choose = random.Random(3)
    mine, theirs = sides[target], sides[own]
    long = " ".join(texts[:3]) + ODD + "x" * 700
    ids = [*mine.encode(long), *[mine.tokenizer.eos_token_id] * 2, *mine.encode(texts[4])]
    slow, jumping = running(mine, theirs), running(mine, theirs)
    for stop in range(0, len(ids) + 1, 7):
        slow.extend(ids[:stop])
    at = 0
    while at < len(ids):
        at = min(len(ids), at + choose.randint(1, 90))
        jumping.extend(ids[:at])

    at_once = running(mine, theirs)

    assert slow.extend(ids) == jumping.extend(ids) == at_once.extend(ids)
    assert slow.text == at_once.text and slow.held == at_once.held


@pytest.mark.parametrize("own", ["small bpe", "bytes", "unigram"])
def test_a_text_reads_as_the_tokenizer_itself_would_cut_it(
    sides: dict[str, TokenBytes], texts: list[str], own: str
) -> None:
    mine, theirs = sides["large bpe"], sides[own]
    same = 0
    for text in texts[:10]:
        text = f"{text} {text}"
        found = running(mine, theirs).extend(mine.encode(text))
        found = found[len(theirs.first()) :]
        assert theirs.join(found).lstrip() == text.encode() or own == "unigram"
        same += found == theirs.encode(text)
    assert same >= 8


def test_only_a_bounded_part_is_read_again(
    sides: dict[str, TokenBytes], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = sides["large bpe"], sides["small bpe"]
    text = running(mine, theirs)
    ids = mine.encode(" ".join(texts))
    text.extend(ids[:-40])
    lengths: list[int] = []
    encode = theirs.encode
    monkeypatch.setattr(theirs, "encode", lambda s: lengths.append(len(s)) or encode(s))

    before = text.extend(ids[:-40])
    closed = text.num_closed
    for k in range(40, -1, -1):
        after = text.extend(ids[: len(ids) - k])
        assert after[:closed] == before[:closed]

    assert len(ids) > 800
    assert max(lengths) <= 24 + 256
    assert len(lengths) <= 2 * 42


def test_a_character_that_is_not_whole_waits(sides: dict[str, TokenBytes]) -> None:
    mine, theirs = sides["bytes"], sides["large bpe"]
    text = running(mine, theirs)
    ids = list("aé".encode())

    assert theirs.join(text.extend(ids[:2])) == b"a" and text.held == b"\xc3"
    assert theirs.join(text.extend(ids)) == "aé".encode() and text.held == b""


def test_special_tokens_pass_where_both_have_them(sides: dict[str, TokenBytes]) -> None:
    mine, theirs = sides["bytes"], sides["unigram"]
    eos = mine.tokenizer.eos_token_id
    ids: Sequence[int] = [*b"one", eos, 257, *b"two"]

    found = running(mine, theirs).extend(ids)

    assert theirs.tokenizer.eos_token_id in found
    assert theirs.join(found).split() == [b"one", b"two"]
    back = running(theirs, mine)
    assert back.extend([theirs.tokenizer.bos_token_id, *theirs.encode("hi")]) == list(b" hi")
