"""The kernels with the settings and memory of one drafter.

Imported only when a drafter is built, because numba takes a second to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.drafting.trigram import kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.drafting.trigram.settings import TrigramTreeSettings
    from paceline.drafting.trigram.table import Table

_MIN_PAIRS: Final = 256  # initial room for learned pairs
_SEARCHES: Final = {"mcts": kernels.MCTS, "greedy": kernels.GREEDY, "full": kernels.FULL}


class Learned:
    """The statistics that the text of one row, or of all rows, added to a table."""

    def __init__(self, max_pairs: int) -> None:
        self._max_pairs = max_pairs
        self.overlay = kernels.new_overlay(min(_MIN_PAIRS, max_pairs))

    def make_room(self, num_trigrams: int) -> None:
        """Grow, within the bound, for this number of further tri-grams, whose pairs may all be new."""
        room = len(self.overlay.keys)
        wanted = min(int(self.overlay.state[0]) + num_trigrams, self._max_pairs)
        if wanted > room:
            larger = min(max(wanted, 2 * room), self._max_pairs)
            self.overlay = kernels.grown(self.overlay, larger)


class TreeSearch:
    """Learning and drafting on a table, with the settings of one drafter."""

    def __init__(self, table: Table, settings: TrigramTreeSettings) -> None:
        self.table = table
        self.settings = s = settings
        kind = kernels.RELEASED if s.update == "released" else kernels.COUNTS
        self._rule = kernels.Rule(kind, s.update_step, s.update_cap, s.decay, s.prior)
        self._explore = kernels.exploration(s.c1, s.c2, s.iterations)
        # compile now, or read compiled code from disk, instead of in the first request
        learned = Learned(s.max_pairs)
        self.learn(learned, [0, 0, 0])
        learned.make_room(_MIN_PAIRS)
        self.draft(learned, [0, 0], 1)

    def learn(self, learned: Learned, text: Sequence[int]) -> None:
        """Learn every tri-gram of a piece of text."""
        if len(text) > 2:
            learned.make_room(len(text) - 2)
            tokens = np.array(text, dtype=np.int64)
            kernels.learn(self.table, learned.overlay, self._rule, tokens, 2, len(tokens))

    def draft(
        self, learned: Learned, tokens: Sequence[int], limit: int
    ) -> tuple[list[int], list[int]]:
        """Return (tokens, parents) of a draft after the text, at most `limit` levels deep."""
        s = self.settings
        if limit < 1 or len(tokens) < 2:
            return [], []
        draft = kernels.grow_tree(
            self.table,
            learned.overlay,
            self._rule.kind == kernels.COUNTS,
            self._explore,
            _SEARCHES[s.search],
            min(limit, s.depth),
            s.iterations,
            s.paths,
            s.num_draft_tokens,
            tokens[-2],
            tokens[-1],
            s.seed,
            len(tokens),
        )
        drafted, parents = draft.tolist()
        return drafted, parents
