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
        self._hold(kernels.new_overlay(min(_MIN_PAIRS, max_pairs)))

    def _hold(self, overlay: kernels.Overlay) -> None:
        self.overlay, self.arrays = overlay, tuple(overlay)
        self._num_free = len(overlay.keys) - int(overlay.state[0])  # pairs that surely fit

    def make_room(self, num_trigrams: int) -> None:
        """Grow, within the bound, for this number of further tri-grams, whose pairs may all be new."""
        self._num_free -= num_trigrams
        if self._num_free >= 0:
            return
        room, used = len(self.overlay.keys), int(self.overlay.state[0])
        wanted = min(used + num_trigrams, self._max_pairs)
        if wanted > room:
            larger = min(max(wanted, 2 * room), self._max_pairs)
            self._hold(kernels.grown(self.overlay, larger))
        self._num_free = len(self.overlay.keys) - used - num_trigrams


class TreeSearch:
    """Learning and drafting on a table, with the settings of one drafter."""

    def __init__(self, table: Table, settings: TrigramTreeSettings) -> None:
        self.settings = s = settings
        kind = kernels.RELEASED if s.update == "released" else kernels.COUNTS
        self._rule = kernels.Rule(kind, s.update_step, s.update_cap, s.decay, s.prior)
        self._explore = kernels.exploration(s.c1, s.c2, s.iterations)
        search = kernels.Search(
            _SEARCHES[s.search], s.depth, s.iterations, s.paths, s.num_draft_tokens, s.seed
        )
        self._rule_numbers, self._search = tuple(self._rule), tuple(search)
        self.use(table)
        # compile now, or read compiled code from disk, instead of in the first request
        learned = Learned(s.max_pairs)
        self.learn(learned, [0, 0, 0])
        learned.make_room(_MIN_PAIRS)
        self.draft(learned, [0, 0], 1)

    def use(self, table: Table) -> None:
        """Draft from another table. Pairs that were learned already keep their statistics."""
        self.table, self._arrays = table, tuple(table)

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
        drafts, [size] = self.learn_and_draft([learned], [tokens[-2:]], [len(tokens)], [limit])
        drafted, parents = drafts[:, 0, :size].tolist()
        return drafted, parents

    def learn_and_draft(
        self,
        learned: Sequence[Learned],
        texts: Sequence[Sequence[int]],
        positions: Sequence[int],
        limits: Sequence[int],
    ) -> tuple[np.ndarray, list[int]]:
        """Learn the end of each row's text, then draft after it.

        Return the drafts' tokens and parents [2, R, K] int64, -1 after their ends, and their sizes.
        positions: number of tokens of each row's whole text. limits: maximum number of levels.
        """
        drafts = np.full((2, len(texts), self.settings.num_draft_tokens), -1, dtype=np.int64)
        tokens = np.array([token for text in texts for token in text], dtype=np.int64)
        sizes: list[int] = []
        first = 0
        for row, (known, text) in enumerate(zip(learned, texts, strict=True)):
            last = first + len(text)
            if last - first > 2:
                known.make_room(last - first - 2)
            sizes.append(
                kernels.learn_and_draft(
                    self._arrays, known.arrays, self._rule_numbers, self._search, self._explore,
                    tokens, first, last, limits[row], positions[row], drafts, row,
                )
            )  # fmt: skip
            first = last
        return drafts, sizes
