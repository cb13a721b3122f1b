"""The text of logged prompts, for the record of the prompts that a drafter was trained on.

That record hashes texts of users' messages, and a log has tokens that a chat template made from them.
Knows no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.assembly import Parts

_MESSAGE: Final = "a0message0in0its0place"
_LOST: Final = "\ufffd"  # bytes that are no character


class PromptText(NamedTuple):
    """A prompt's text. is_message: it is that of one message, or of a prompt without a template."""

    text: str
    is_message: bool


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads prompts of one tokenizer. frame: the chat template's text around a single message."""

    parts: Parts
    frame: tuple[str, str] | None

    @classmethod
    def of(cls, parts: Parts) -> PromptReader:
        """Return the reader of a target's tokenizer."""
        return cls(parts, _frame(parts.tokenizer))

    def read(self, tokens: Sequence[int]) -> PromptText:
        """Return a prompt's text: the message inside the template, else all of it.

        A conversation, or a prompt of another template, is no single message.
        """
        detokenizer = self.parts.detokenizer
        spelled = detokenizer.spell(tokens)
        if self.frame is not None and self._fits(spelled):
            before, after = self.frame
            text = spelled[len(before) : len(spelled) - len(after)]
            has_more = any(name in text for name in detokenizer.special.values())
            return PromptText(text, not has_more and _LOST not in text)
        text = self.parts.text(tokens)
        # a token at the start, such as <s>, is the tokenizer's own
        has_more = any(token in detokenizer.special for token in tokens[1:])
        return PromptText(text, not has_more and _LOST not in text)

    def _fits(self, spelled: str) -> bool:
        before, after = self.frame or ("", "")
        is_long_enough = len(spelled) >= len(before) + len(after)
        return is_long_enough and spelled.startswith(before) and spelled.endswith(after)


def _frame(tokenizer: Any) -> tuple[str, str] | None:
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    message = [{"role": "user", "content": _MESSAGE}]
    try:
        rendered = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
    except Exception:  # noqa: BLE001  # a template is the model's own code, and may want other messages
        return None
    before, found, after = rendered.partition(_MESSAGE)
    return (before, after) if found else None
