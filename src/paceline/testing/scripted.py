"""Drafters whose proposals are a function of the text, for tests of everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from paceline.contracts import Drafts
from paceline.drafting.base import Drafter, pad_drafts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.contracts import RowView

    Propose = Callable[[Sequence[int], int], Sequence[int]]
    Grow = Callable[[Sequence[int], int], tuple[Sequence[int], Sequence[int]]]


class ScriptedDrafter(Drafter):
    """A drafter that proposes `function(tokens so far, limit)`, cut to the limit.

    The function must depend on its arguments only, so that proposals are deterministic. `proposed` has
    (row id, draft) of every proposal.
    """

    kind: ClassVar[str] = "scripted"

    def __init__(self, name: str, function: Propose, num_draft_tokens: int = 8) -> None:
        super().__init__(name, num_draft_tokens)
        self.function = function
        self.proposed: list[tuple[int, list[int]]] = []

    def draft(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Return at most min(limit, num_draft_tokens) of the function's tokens."""
        limit = min(limit, self.num_draft_tokens)
        return list(self.function(tokens, limit))[:limit] if limit > 0 else []

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        drafts = [self.draft(row.tokens, n) for row, n in zip(rows, limits, strict=True)]
        self.proposed.extend((row.id, draft) for row, draft in zip(rows, drafts, strict=True))
        return Drafts(*pad_drafts(drafts, torch.device("cpu")))


class ScriptedTree(Drafter):
    """A drafter that proposes the tree `function(tokens so far, limit)`: tokens and parents' indices.

    The tree is neither cut nor checked, so that a test can break the contract.
    """

    kind: ClassVar[str] = "scripted_tree"

    def __init__(self, name: str, function: Grow, num_draft_tokens: int = 64) -> None:
        super().__init__(name, num_draft_tokens)
        self.function = function

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        trees = [self.function(row.tokens, n) for row, n in zip(rows, limits, strict=True)]
        tokens, lengths = pad_drafts([list(tree[0]) for tree in trees], torch.device("cpu"))
        parents, _ = pad_drafts([list(tree[1]) for tree in trees], torch.device("cpu"))
        return Drafts(tokens, lengths, parents=parents)


def copying(text: Sequence[int], num_right: int | None = None, wrong: int = 0) -> Propose:
    """Return a function that proposes the continuation of the text so far.

    With `num_right`, only the first `num_right` tokens of a draft are right. The rest are `wrong`, or
    `wrong + 1` where `wrong` would be right.
    """

    def function(tokens: Sequence[int], limit: int) -> list[int]:
        draft = list(text[len(tokens) : len(tokens) + limit])
        if num_right is not None:
            for k in range(num_right, len(draft)):
                draft[k] = wrong + (draft[k] == wrong)
        return draft

    return function
