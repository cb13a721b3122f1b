"""A drafter of trees from tri-gram statistics: the tokens that followed the last two tokens earlier.

It starts from a table built beforehand, or from nothing, and learns from each row's text as it is
decoded. It needs no model; proposals are a function of the row's text, so they are judged exactly. ADED
(arXiv 2407.12021); the differences are in docs/drafters/trigram_tree.md. `drafting.draft_length` has the
rules of a draft's length, in order.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from paceline.contracts import Drafts
from paceline.drafting.answers import check_answers, find_answers, require_answers
from paceline.drafting.base import Drafter
from paceline.drafting.trigram.answer_table import load_answer_table
from paceline.drafting.trigram.settings import TrigramTreeSettings
from paceline.drafting.trigram.table import (
    Table,
    check_tokenizer,
    empty_table,
    load_table,
    read_facts,
)
from paceline.errors import ConfigError
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from paceline.contracts import RowView
    from paceline.drafting.answers import Answers
    from paceline.drafting.base import BuildContext
    from paceline.drafting.trigram.search import Learned
    from paceline.models.vocabulary import Vocabulary
    from paceline.store.trained_on import TrainedOn


# settings that decide what shared statistics hold
_SHARED: Final = ("update", "decay", "prior", "update_step", "update_cap", "max_pairs")


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
        common: Learned | None = None,
        answers: Answers | None = None,
    ) -> None:
        """table, table_hash: the content and hash of the settings' file. common: the tenant's shared
        statistics; by default new ones if the settings share. answers: of the settings' collection.
        """
        # imported here because numba takes a second to import
        from paceline.drafting.trigram.search import Learned, TreeSearch

        super().__init__(name, settings.num_draft_tokens)
        require_answers(name, settings.answers, answers)
        self.settings = settings
        self.table_hash = table_hash
        self._answers = answers
        self.replays_everywhere = settings.update != "released"  # `released` learns per round
        self._search = TreeSearch(table or empty_table(), settings)
        self._new_learned = partial(Learned, settings.max_pairs)
        # one for all rows if they share it; without updates it stays empty
        is_common = settings.share or settings.update == "none"
        if common is None and is_common:
            common = self._new_learned()
        self.common = common
        self._rows: dict[int, _RowState] = {}
        self._table_version = -1  # of the answers whose table is in use
        self._use_answers()

    @classmethod
    def check(cls, name: str, settings: TrigramTreeSettings, vocabulary: Vocabulary) -> None:
        check_answers(settings.answers, vocabulary)
        if settings.table is not None:
            facts = read_facts(settings.table)
            check_tokenizer(name, settings.table, facts, vocabulary.hash())

    @classmethod
    def build(cls, name: str, settings: TrigramTreeSettings, context: BuildContext) -> TrigramTree:
        table, table_hash = None, None
        if settings.table is not None:
            cls.check(name, settings, context.vocabulary)
            table, facts = load_table(settings.table)
            table_hash = facts.sha256
        common = _find_common(name, settings, table_hash, context.drafters)
        answers = find_answers(name, settings.answers, context)
        return cls(name, settings, table, table_hash, common, answers)

    @property
    def note(self) -> str:  # type: ignore[override] # it changes when there are answers
        """The remark that there are no answers yet."""
        return "" if self._answers is None else self._answers.note

    @contextmanager
    def without_answers_to(self, group: str) -> Iterator[None]:
        if self._answers is None:
            yield
            return
        try:
            with self._answers.without(group):
                self._use_answers()
                yield
        finally:
            self._use_answers()

    def _use_answers(self) -> None:
        """Draft from the table of the collected answers, if it is another one than before."""
        answers = self._answers
        if answers is None or answers.index is None or answers.version == self._table_version:
            return
        self._search.use(load_answer_table(self.name, answers))
        self._table_version = answers.version

    def start(self, rows: Sequence[RowView]) -> None:
        if self._answers is not None:
            self._answers.refresh()
            self._use_answers()
        for row in rows:
            self._rows[row.id] = self._new_state()

    def _new_state(self) -> _RowState:
        return _RowState(self._new_learned() if self.common is None else self.common)

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
        settings = self.settings.model_dump(exclude={"table", "preset", "answers", "tenant"})
        if self.settings.tenant:
            settings["tenant"] = self.settings.tenant
        if self.settings.answers is not None:
            settings["answers"] = True  # not its folder: a collection grows, and moves
        return {**super().identity(), **settings, "table": self.table_hash}

    def trained_on(self) -> TrainedOn | None:
        return NOTHING if self.table_hash is None else None

    def num_bytes(self) -> int:
        own = {id(state.learned): state.learned for state in self._rows.values()}
        if self.common is not None:
            own[id(self.common)] = self.common
        return self._search.table.num_bytes() + sum(
            learned.overlay.num_bytes() for learned in own.values()
        )


def _find_common(
    name: str,
    settings: TrigramTreeSettings,
    table_hash: str | None,
    drafters: Mapping[str, Drafter],
) -> Learned | None:
    """Return the statistics that a drafter built earlier shares with this one, if there is one."""
    for other in drafters.values() if settings.share else ():
        if not isinstance(other, TrigramTree) or not other.settings.share:
            continue
        theirs = other.settings
        if theirs.tenant != settings.tenant:
            continue
        differing = [key for key in _SHARED if getattr(theirs, key) != getattr(settings, key)]
        differing += ["table"] if other.table_hash != table_hash else []
        if differing:
            raise ConfigError(
                f"drafter '{name}' shares its statistics with '{other.name}', so its {differing[0]} "
                "must be the same; or give it a tenant of its own"
            )
        return other.common
    return None
