"""The first lines of prompts, for the strategy that picks an arm by them.

A policy that does not beat this strategy may have learned nothing but the line. Text that begins all
prompts of the training part, such as a chat template's opening, is skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Prompts = Sequence[Sequence[int]]

_LONGEST: Final = 256  # tokens of a line that are compared


class FirstLines:
    """Reader of first lines, after the beginning that all prompts of a training part share."""

    def __init__(self, train: Prompts, decode: Callable[[list[int]], str]) -> None:
        """decode: tokens -> text."""
        self._shared = list(train[0][: _num_shared(train)])
        self._decode = decode

    def of(self, prompts: Prompts) -> tuple[str, ...]:
        """Return the first line of each prompt."""
        return tuple(map(self._line, prompts))

    def _line(self, prompt: Sequence[int]) -> str:
        own, num = list(prompt), len(self._shared)
        start = num if own[:num] == self._shared else 0
        text = self._decode(own[start : start + _LONGEST]).lstrip()
        return text.split("\n", 1)[0].strip()


def _num_shared(prompts: Prompts) -> int:
    """Return the number of first tokens that all prompts share."""
    # in sorted order the first and the last prompt share the least
    ordered = sorted(map(tuple, prompts))
    least, greatest = ordered[0], ordered[-1]
    shared = 0
    for a, b in zip(least, greatest, strict=False):
        if a != b:
            break
        shared += 1
    return shared
