"""Logged tokens give back the message that was asked, as the record of training prompts hashes it."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.assembly import build_from_objects
from paceline.config import Config, ModelSection
from paceline.distillation.prompt_texts import PromptReader, PromptText
from paceline.testing.tiny_models import tiny_model
from paceline.testing.tokenizers import byte_tokenizer

USER = "what is 3 + 4?"


def reader(template: str | None = "") -> PromptReader:
    tokenizer = byte_tokenizer()
    if template != "":
        tokenizer.chat_template = template
    config = Config(target=ModelSection(model="in memory"))
    return PromptReader.of(build_from_objects(tiny_model(), tokenizer, {}, config))


def rendered(own: PromptReader, *messages: dict[str, str]) -> list[int]:
    tokenizer: Any = own.parts.tokenizer
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize("text", [USER, "two\nlines \u00e9 \u6771", "<|nothing|>"])
def test_a_message_is_read_out_of_its_template(text: str) -> None:
    own = reader()
    assert own.read(rendered(own, {"role": "user", "content": text})) == PromptText(text, True)


def test_a_conversation_is_no_single_message() -> None:
    own = reader()
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": "7"}]
    found = own.read(rendered(own, *turns, {"role": "user", "content": "and 5?"}))
    assert not found.is_message and USER in found.text and "and 5?" in found.text


def test_a_prompt_without_a_template_is_its_text() -> None:
    own = reader(None)
    ids = own.parts.tokenizer(USER)["input_ids"]
    assert own.read(ids) == PromptText(USER, True)
    assert not own.read([*ids, 0xC3]).is_message  # half a character


def test_a_template_that_needs_other_messages_is_no_error() -> None:
    own = reader("{{ raise_exception('system first') }}")
    ids = own.parts.tokenizer(USER)["input_ids"]
    assert own.read(ids) == PromptText(USER, True)
