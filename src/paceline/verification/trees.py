"""The path of a draft that equals the target's own choices.

Serves every draft that is judged by equality: greedy decoding, deterministic drafts, drafts drawn
with the judge's own noise, and all trees. In a chain, each token follows the previous one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Choices(Protocol):
    """The target's token at each place; read along one path only."""

    def __getitem__(self, place: int, /) -> int: ...


def follow(
    choices: Choices, tokens: Sequence[int], parents: Sequence[int] | None = None
) -> list[int]:
    """Return the indices of the accepted draft tokens, from the root down.

    choices: the target's token after the row's last token, then after each draft token. tokens: the
    draft. parents: the index of the token that each one follows, -1 for the row's last token; None for
    a chain. Of equal siblings, the first is followed.
    """
    path: list[int] = []
    if parents is None:
        for index, token in enumerate(tokens):
            if token != choices[index]:
                break
            path.append(index)
        return path
    children: dict[tuple[int, int], int] = {}
    for index, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        children.setdefault((parent, token), index)
    at = -1
    while (child := children.get((at, choices[at + 1]))) is not None:
        path.append(child)
        at = child
    return path


def depths(parents: Sequence[int]) -> list[int]:
    """Return the number of draft tokens above each one."""
    levels: list[int] = []
    for parent in parents:
        levels.append(0 if parent < 0 else levels[parent] + 1)
    return levels
