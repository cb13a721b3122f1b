"""The first lines of prompts, for the table that a policy must beat to have learned more.

What all prompts of the training part begin with, such as a chat template's opening, says nothing
and is passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Prompts = Sequence[Sequence[int]]

_LONGEST: Final = 256  # tokens of a line that are compared


class FirstLines:
    """Reads first lines as a training part would have them read."""

    def __init__(self, train: Prompts, decode: Callable[[list[int]], str]) -> None:
        """decode: tokens -> text."""
        self._shared = list(train[0][: _num_shared(train)])
        self._decode = decode

    def of(self, prompts: Prompts) -> tuple[str, ...]:
        return tuple(map(self._line, prompts))

    def _line(self, prompt: Sequence[int]) -> str:
        own, num = list(prompt), len(self._shared)
        start = num if own[:num] == self._shared else 0
        text = self._decode(own[start : start + _LONGEST]).lstrip()
        return text.split("\n", 1)[0].strip()


def _num_shared(prompts: Prompts) -> int:
    """The number of tokens that all prompts begin with."""
    # what the least and the greatest share, all between them share
    ordered = sorted(map(tuple, prompts))
    least, greatest = ordered[0], ordered[-1]
    shared = 0
    for a, b in zip(least, greatest, strict=False):
        if a != b:
            break
        shared += 1
    return shared
