"""Token-to-id maps decide whether two tokenizers are the same; a difference is described."""

from __future__ import annotations

import pytest

from paceline.assembly import build_from_objects
from paceline.config import Config, ModelSection
from paceline.errors import ConfigError, VocabularyError
from paceline.models.vocabulary import Vocabulary, check_same_vocabulary
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import NUM_TOKENS, byte_tokenizer

BASE = {"a": 0, "b": 1, "c": 2, "d": 3}


def test_padding_of_the_embedding_does_not_make_another_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    target = tiny_model("llama", vocab_size=NUM_TOKENS + 29)
    drafter = tiny_model("gpt2", vocab_size=NUM_TOKENS)

    parts = build_from_objects(
        target, tokenizer, {"small": (drafter, byte_tokenizer())}, Config(target=_section())
    )

    assert parts.vocabulary.num_tokens == NUM_TOKENS
    assert parts.target.num_logits == NUM_TOKENS + 29


def test_a_drafter_with_another_map_is_refused_though_its_size_is_the_same() -> None:
    other = byte_tokenizer()
    other.add_tokens(["one more"])

    with pytest.raises(VocabularyError, match=r"'small'.*1 of its own \(such as 'one more'\)"):
        build_from_objects(
            tiny_model("llama", vocab_size=280),
            byte_tokenizer(),
            {"small": (tiny_model("llama", vocab_size=280), other)},
            Config(target=_section()),
        )


def test_a_drafter_with_too_few_outputs_is_refused_without_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"'small' has 100 output tokens.*259"):
        build_from_objects(
            tiny_model("llama"),
            byte_tokenizer(),
            {"small": tiny_model("llama", vocab_size=100)},
            Config(target=_section()),
        )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": 0, "b": 1, "c": 2}, ["4 against 3 tokens", "1 missing (such as 'd')"]),
        ({**BASE, "e": 4, "f": 5}, ["4 against 6", "2 of its own (such as 'e')"]),
        ({**BASE, "b": 2, "c": 1}, ["2 with another id (such as 'b': 1 against 2)"]),
        ({"a": 0, "b": 1, "x": 2, "d": 9}, ["1 missing", "1 of its own", "'d': 3 against 9"]),
    ],
)
def test_differing_maps_say_how(other: dict[str, int], words: list[str]) -> None:
    with pytest.raises(VocabularyError) as caught:
        check_same_vocabulary("small", Vocabulary(BASE), Vocabulary(other))

    message = str(caught.value)
    assert "'small'" in message and "\n" not in message
    assert all(word in message for word in words), message


def test_the_order_of_the_map_does_not_matter() -> None:
    other = Vocabulary(dict(reversed(BASE.items())))

    check_same_vocabulary("small", Vocabulary(BASE), other)
    assert other.hash() == Vocabulary(BASE).hash()
    assert other.hash() != Vocabulary({**BASE, "d": 4}).hash()


def test_ids_may_have_gaps() -> None:
    assert Vocabulary({"a": 0, "b": 7}).num_tokens == 8


def _section() -> ModelSection:
    return ModelSection(model="in memory")
