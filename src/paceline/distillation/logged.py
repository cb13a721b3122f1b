"""The texts of served requests, and their split by prompt.

A text is a prompt and the tokens that the target committed for it. The hash of a prompt's tokens
decides its part, so a longer log moves no prompt. A prompt that begins with another logged prompt, such
as a later turn of a conversation, is in that prompt's part: it repeats its answer. Knows no model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from paceline.distillation.batches import Example

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.store import LoggedDecision

SERVED: Final = "served"
"""The domain of logged requests, whose real domain is unknown."""

_TOKEN: Final = np.dtype(">u4")  # in this order of bytes, texts sort by their tokens
_SHORTEST_START: Final = 8  # tokens of a conversation's first prompt


class LoggedTexts(NamedTuple):
    """The different texts of a log. left_out: reason -> number of requests."""

    examples: list[Example]
    left_out: dict[str, int]


class LogSplit(NamedTuple):
    """The parts of a log, without a common prompt or conversation.

    Validation and held-out texts are one per conversation, so that they are independent.
    """

    training: list[Example]
    validation: list[Example]
    held_out: list[Example]


def read_requests(
    decisions: Sequence[LoggedDecision], target: str, tokenizer: str, context: int
) -> LoggedTexts:
    """Return the texts that this target wrote, each once, in the order of the log.

    Greedy and sampled answers both count; answers under rules for the logits are not the target's own.
    target: its fingerprint; tokenizer: its hash; context: the number of tokens at which texts are cut.
    """
    left_out: Counter[str] = Counter()
    texts: dict[str, Example] = {}
    for decision in decisions:
        reason = decision.why_no_text(target, tokenizer, context)
        if reason is None and decision.has_rules:
            reason = "had rules for the logits"
        if reason is not None:
            left_out[reason] += 1
            continue
        prompt, output = decision.prompt_tokens or (), decision.output_tokens or ()
        tokens, num_prompt = np.array([*prompt, *output], dtype=np.int64), len(prompt)
        example = Example(_id(tokens, num_prompt), SERVED, tokens[:context], num_prompt)
        texts.setdefault(example.id, example)
    return LoggedTexts(list(texts.values()), dict(left_out))


def _id(tokens: np.ndarray, num_prompt: int) -> str:
    digest = hashlib.sha256(f"{num_prompt} ".encode() + tokens.astype(_TOKEN).tobytes())
    return f"{SERVED}/{digest.hexdigest()[:24]}"


def prompt_key(example: Example) -> bytes:
    """Return the tokens of a text's prompt as bytes."""
    return example.tokens[: example.num_prompt].astype(_TOKEN).tobytes()


def split_by_prompt(
    examples: Sequence[Example],
    held_out: float,
    validation: float,
    may_judge: Callable[[Example], bool] = lambda example: True,
) -> LogSplit:
    """Return the parts of a log's texts.

    held_out: share of the conversations. validation: share of the others. may_judge: whether a drafter
    can be judged on a text; a conversation with another text is trained on.
    """
    parts = LogSplit([], [], [])
    for first, members in _conversations(examples).items():
        judges = all(may_judge(example) for example in members)
        if judges and _hash("held out", first) < held_out:
            parts.held_out.append(_longest(members))
        elif judges and _hash("validation", first) < validation:
            parts.validation.append(_longest(members))
        else:
            parts.training.extend(members)
    return parts


def num_conversations(examples: Sequence[Example]) -> int:
    """Return the number of different prompts, where one that begins with another does not count."""
    return len(_conversations(examples))


def _conversations(examples: Sequence[Example]) -> dict[bytes, list[Example]]:
    """Return first prompt -> texts whose prompts begin with it."""
    found: dict[bytes, list[Example]] = {}
    first = b""
    # a prompt's continuations follow it in this order
    for key, example in sorted(((prompt_key(e), e) for e in examples), key=lambda pair: pair[0]):
        is_long = len(first) >= _SHORTEST_START * _TOKEN.itemsize
        if not (is_long and key.startswith(first)):
            first = key
        found.setdefault(first, []).append(example)
    return found


def _longest(members: Sequence[Example]) -> Example:
    return max(members, key=lambda example: (example.num_output, example.id))


def _hash(part: str, first: bytes) -> float:
    """Return a number from 0 to 1, independent for each part."""
    digest = hashlib.sha256(part.encode() + first).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
