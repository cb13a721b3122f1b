"""A drafter of trees from tri-gram statistics: the tokens that followed the last two tokens earlier.

It starts from a table built beforehand, or from nothing, and learns from each row's text as it is
decoded. It needs no model; proposals are a function of the row's text, so they are judged exactly. ADED
(arXiv 2407.12021); the differences are in docs/drafters/trigram_tree.md. `drafting.draft_length` has the
rules of a draft's length, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from paceline.contracts import Drafts
from paceline.drafting.base import Drafter
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import (
    Table,
    check_tokenizer,
    empty_table,
    load_table,
    read_facts,
)
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import RowView
    from paceline.drafting.base import BuildContext
    from paceline.drafting.trigram.search import Learned
    from paceline.models.vocabulary import Vocabulary
    from paceline.store.trained_on import TrainedOn


@dataclass(slots=True)
class _RowState:
    learned: Learned
    num_read: int = 0  # leading tokens of the row that `counts` learned


class TrigramTree(Drafter):
    kind = "trigram_tree"
    Settings = TrigramTreeSettings

    def __init__(
        self,
        name: str,
        settings: TrigramTreeSettings,
        table: Table | None = None,
        table_hash: str | None = None,
    ) -> None:
        """table, table_hash: the content and hash of the settings' file."""
        # imported here because numba takes a second to import
        from paceline.drafting.trigram.search import Learned, TreeSearch

        super().__init__(name, settings.num_draft_tokens)
        self.settings = settings
        self._table_hash = table_hash
        self.replays_everywhere = settings.update != "released"  # `released` learns per round
        self._search = TreeSearch(table or empty_table(), settings)
        self._new_learned = partial(Learned, settings.max_pairs)
        # one for all rows if they share it; without updates it stays empty
        is_common = settings.share or settings.update == "none"
        self._common = self._new_learned() if is_common else None
        self._rows: dict[int, _RowState] = {}

    @classmethod
    def check(cls, name: str, settings: TrigramTreeSettings, vocabulary: Vocabulary) -> None:
        if settings.table is not None:
            facts = read_facts(settings.table)
            check_tokenizer(name, settings.table, facts, vocabulary.hash())

    @classmethod
    def build(cls, name: str, settings: TrigramTreeSettings, context: BuildContext) -> TrigramTree:
        if settings.table is None:
            return cls(name, settings)
        cls.check(name, settings, context.vocabulary)
        table, facts = load_table(settings.table)
        return cls(name, settings, table, facts.sha256)

    def start(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._rows[row.id] = self._new_state()

    def _new_state(self) -> _RowState:
        return _RowState(self._new_learned() if self._common is None else self._common)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        state = self._state(row)
        self._read(state, row.tokens, max_tokens)
        return self.settings.update != "counts" or state.num_read == len(row.tokens)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        learned, texts, positions = [], [], []
        for row in rows:
            state, tokens = self._state(row), row.tokens
            learned.append(state.learned)
            texts.append(tokens[self._start_of(state, len(tokens)) :])
            positions.append(len(tokens))
            state.num_read = len(tokens)
        drafts, sizes = self._search.learn_and_draft(learned, texts, positions, limits)
        tokens, parents = drafts[:, :, : max(sizes, default=0)]
        return Drafts(torch.from_numpy(tokens), sizes, parents=torch.from_numpy(parents))

    def _start_of(self, state: _RowState, num_tokens: int) -> int:
        """Return the place of the first token that a draft needs: to learn from, or to follow."""
        start = num_tokens - 2
        if self.settings.update == "counts":
            start = min(start, state.num_read - 2)
        elif self.settings.update == "released":
            start -= self.settings.update_window
        return max(0, start)

    def _state(self, row: RowView) -> _RowState:
        if row.id not in self._rows:
            self._rows[row.id] = self._new_state()
        return self._rows[row.id]

    def _read(self, state: _RowState, tokens: Sequence[int], max_tokens: int) -> None:
        """Under `counts`, learn the tri-grams of up to `max_tokens` more tokens of the row."""
        if self.settings.update == "counts":
            end = min(len(tokens), state.num_read + max_tokens)
            self._search.learn(state.learned, tokens[max(0, state.num_read - 2) : end])
            state.num_read = end

    def finish(self, rows: Sequence[RowView]) -> None:
        for row in rows:
            self._rows.pop(row.id, None)

    def identity(self) -> dict[str, object]:
        settings = self.settings.model_dump(exclude={"table", "preset"})
        return {**super().identity(), **settings, "table": self._table_hash}

    def trained_on(self) -> TrainedOn | None:
        return NOTHING if self._table_hash is None else None

    def num_bytes(self) -> int:
        own = {id(state.learned): state.learned for state in self._rows.values()}
        if self._common is not None:
            own[id(self._common)] = self._common
        return self._search.table.num_bytes() + sum(
            learned.overlay.num_bytes() for learned in own.values()
        )
