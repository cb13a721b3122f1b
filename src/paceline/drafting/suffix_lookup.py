"""A drafter of the most frequent continuations of the text's own suffix, as a tree.

The drafter needs no model and no training. It is fast where answers repeat the prompt, themselves,
earlier answers (`share`) or collected ones (`answers`). The longest earlier match of the suffix is the
context; a longer match gives a longer draft. After SuffixDecoding (arXiv 2411.04975), on a suffix
automaton instead of suffix trees. `drafting.draft_length` has the rules of a draft's length, in order.
Symbols: R rows, K = num_draft_tokens.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.contracts import Drafts
from paceline.drafting.answers import check_answers, find_answers, require_answers
from paceline.drafting.base import Drafter
from paceline.drafting.shared_text import SharedText
from paceline.drafting.suffix_index import RowIndices
from paceline.errors import ConfigError
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from paceline.contracts import RowView
    from paceline.drafting.answers import Answers
    from paceline.drafting.base import BuildContext
    from paceline.drafting.suffix_entry import SourceTable
    from paceline.models.vocabulary import Vocabulary
    from paceline.store.trained_on import TrainedOn


class SuffixLookupSettings(Section):
    """The settings.

    num_draft_tokens: maximum per draft; after a match of m tokens it is at most length_factor * m +
    length_offset. paths: maximum number of paths of the tree, 1 drafts a chain. min_match, max_match:
    bounds of the matched suffix. min_probability: least estimated probability of a drafted token.

    share: match answers to earlier requests as well, at most their last `shared_tokens` tokens.
    tenant: the owner of these answers; drafters of one tenant share them.
    answers: folder of a collection, whose answers are matched as well, in up to 32 tokens.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    num_draft_tokens: int = Field(default=16, ge=1, le=MAX_DRAFT_TOKENS)
    paths: int = Field(default=4, ge=1)
    min_match: int = Field(default=1, ge=1)
    max_match: int = Field(default=32, ge=1, le=256)
    length_factor: float = Field(default=2.0, ge=0.0)
    length_offset: float = 0.0
    min_probability: float = Field(default=0.1, ge=0.0, le=1.0)
    share: bool = False
    tenant: str = ""
    shared_tokens: int = Field(default=2**18, ge=1024, le=2**24)
    answers: Path | None = None

    @model_validator(mode="after")
    def _agree(self) -> SuffixLookupSettings:
        if self.min_match > self.max_match:
            raise ValueError(f"min_match {self.min_match} is above max_match {self.max_match}")
        if self.length_factor * self.max_match + self.length_offset < 1:
            raise ValueError(
                "length_factor and length_offset never allow a token, even for the longest match; "
                "raise one of them"
            )
        unused = {"tenant", "shared_tokens"} & self.model_fields_set
        if unused and not self.share:
            raise ValueError(f"{min(unused)} needs share: true")
        return self


class SuffixLookup(Drafter):
    """A lookup drafter. With `share`, drafts depend on the order of earlier requests and replays."""

    kind = "suffix_lookup"
    Settings = SuffixLookupSettings

    def __init__(
        self,
        name: str,
        settings: SuffixLookupSettings,
        shared: SharedText | None = None,
        answers: Answers | None = None,
    ) -> None:
        """shared: the tenant's earlier answers; by default a new text if the settings share. answers: of
        the settings' collection.
        """
        super().__init__(name, settings.num_draft_tokens)
        require_answers(name, settings.answers, answers)
        # imported here because numba takes a second to import
        from paceline.drafting import suffix_entry

        self._entry = suffix_entry
        self._sources: SourceTable | None = None
        self._out, self._out_at = suffix_entry.new_drafts(0, self.num_draft_tokens), 0
        self.settings = settings
        self._answers = answers
        self.shared = shared
        if shared is None and settings.share:
            self.shared = SharedText(settings.max_match, settings.shared_tokens)
        self._rows = RowIndices(settings.max_match)
        self._first_shared: dict[int, int] = {}  # row id -> index of the first token to share

    @classmethod
    def check(cls, name: str, settings: SuffixLookupSettings, vocabulary: Vocabulary) -> None:
        check_answers(settings.answers, vocabulary)

    @classmethod
    def build(cls, name: str, settings: Any, context: BuildContext) -> SuffixLookup:
        shared = _find_shared_text(name, settings, context.drafters)
        return cls(name, settings, shared, find_answers(name, settings.answers, context))

    @property
    def note(self) -> str:  # type: ignore[override] # it changes when there are answers
        """The remark that there are no answers yet."""
        return "" if self._answers is None else self._answers.note

    @contextmanager
    def without_answers_to(self, group: str) -> Iterator[None]:
        if self._answers is None:
            yield
            return
        with self._answers.without(group):
            yield

    def start(self, rows: Sequence[RowView]) -> None:
        if self._answers is not None:
            self._answers.refresh()
        self._rows.start(rows)
        for row in rows:
            # from the last token on, the row grows while this drafter serves it
            self._first_shared[row.id] = max(row.num_prompt, len(row.tokens) - 1)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        return self._rows.prepare(row, max_tokens)

    def finish(self, rows: Sequence[RowView]) -> None:
        self._rows.finish(rows)
        for row in rows:
            first = self._first_shared.pop(row.id, None)
            if self.shared is not None and first is not None:
                self.shared.add(row.tokens[first:])

    def trained_on(self) -> TrainedOn:
        return NOTHING

    def identity(self) -> dict[str, object]:
        # the folder is no part of it: a collection grows, and moves with its files
        used = {"answers": True} if self.settings.answers is not None else {}
        return {**super().identity(), **self.settings.model_dump(exclude={"answers"}), **used}

    def num_bytes(self) -> int:
        sources = (self._rows, self.shared, self._answers)
        return sum(source.num_bytes() for source in sources if source is not None)

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        if len(self._out) < len(rows) or self._out.shape[2] != self.num_draft_tokens:
            self._out = self._entry.new_drafts(2 * len(rows), self.num_draft_tokens)
            self._out_at = self._out.ctypes.data
        lengths, branches, at = [], False, self._out_at
        for row, limit in zip(rows, limits, strict=True):
            length, num_leaves = self.grow_tree(row, limit, at, self._out.shape[2])
            lengths.append(length)
            branches |= num_leaves > 1
            at += self._out.strides[0]
        # [R, K] each; the array is written again in the next round
        tokens, parents, evidence = self._out[: len(rows), :, : max(lengths)].transpose(1, 0, 2)
        return Drafts(tokens, lengths, parents=parents if branches else None, evidence=evidence)

    def grow_tree(self, row: RowView, limit: int, out: int, room: int) -> tuple[int, int]:
        """Read a row's new tokens and write its draft; return its numbers of nodes and of leaves.

        out: address of [3, room] int64, receives at most `room` tokens, their parents and evidence.
        """
        sources, index = self._sources, self._rows.write_new(row)
        if sources is None or sources.is_stale(self.num_draft_tokens):
            sources = self._sources = self._entry.SourceTable(
                self.num_draft_tokens,
                (
                    self.settings.min_match, self.settings.length_factor,
                    self.settings.length_offset, self.settings.paths, self.settings.min_probability,
                ),
                self.shared,
                self._answers,
            )  # fmt: skip
        found = self._entry.draft_row(
            index.address, sources.address, index.num_tokens, limit, out, room
        )
        return found % self._entry.LEAVES, found // self._entry.LEAVES

    def index_address(self, row: RowView) -> int:
        """Return the address of the index of a row's text, see `suffix_entry`."""
        return self._rows.index(row).address


def _find_shared_text(
    name: str, settings: SuffixLookupSettings, drafters: Mapping[str, Drafter]
) -> SharedText | None:
    """Return the text that a drafter built earlier shares with this one, if there is one."""
    for other in drafters.values() if settings.share else ():
        if not isinstance(other, SuffixLookup) or other.shared is None:
            continue
        theirs = other.settings
        if theirs.tenant != settings.tenant:
            continue
        for key in ("shared_tokens", "max_match"):
            if getattr(theirs, key) != getattr(settings, key):
                raise ConfigError(
                    f"drafter '{name}' shares its text with '{other.name}', so its {key} must be "
                    f"{getattr(theirs, key)}; or give it a tenant of its own"
                )
        return other.shared
    return None
