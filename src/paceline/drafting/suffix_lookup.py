"""A drafter of the most frequent continuations of the text's own suffix, as a tree.

The drafter needs no model and no training. It is fast where answers repeat the prompt, themselves or,
with `share`, earlier answers. The longest earlier match of the suffix is the context; a longer match
gives a longer draft. After SuffixDecoding (arXiv 2411.04975), on a suffix automaton instead of suffix
trees. `drafting.draft_length` has the rules of a draft's length, in order. Symbols: R rows, K =
num_draft_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from pydantic import ConfigDict, Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section
from paceline.contracts import Drafts
from paceline.drafting.base import Drafter
from paceline.drafting.suffix_index import RowIndices, SuffixIndex, Tree
from paceline.errors import ConfigError
from paceline.store.trained_on import NOTHING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from paceline.contracts import RowView
    from paceline.drafting.base import BuildContext
    from paceline.drafting.suffix_index import Match
    from paceline.store.trained_on import TrainedOn

_END: Final = -1  # after every answer; it is no token, so no match crosses it


class SuffixLookupSettings(Section):
    """The settings.

    num_draft_tokens: maximum per draft; after a match of m tokens it is at most length_factor * m +
    length_offset. paths: maximum number of paths of the tree, 1 drafts a chain. min_match, max_match:
    bounds of the matched suffix. min_probability: least estimated probability of a drafted token.

    share: match answers to earlier requests as well, at most their last `shared_tokens` tokens.
    tenant: the owner of these answers; drafters of one tenant share them.
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


class SharedText:
    """The answers to earlier requests as one bounded text; the oldest are dropped first.

    Two suffix indices alternate: one is being filled, the other is full or does not exist yet. When the
    first is full as well, the older one is dropped as a whole. So the answers kept are
    between half of the bound and all of it, and no request waits for an index to be rebuilt. parts: the
    indices to search; the first is the one being filled.
    """

    def __init__(self, max_match: int, max_tokens: int) -> None:
        self._max_match = max_match
        self._room = max_tokens // 2  # of one index
        self.parts = [self._empty()]

    def _empty(self) -> SuffixIndex:
        # allocated at full size, so that growing never copies
        return SuffixIndex(self._max_match, self._room)

    def add(self, tokens: Sequence[int]) -> None:
        """Keep an answer, or its end if it is longer than an index."""
        if not tokens:
            return
        answer = [*tokens[-(self._room - 1) :], _END]
        if self.parts[0].num_tokens + len(answer) > self._room:
            self.parts = [self._empty(), self.parts[0]]
        self.parts[0].extend(answer)

    def match(self, tokens: Sequence[int]) -> list[tuple[SuffixIndex, Match]]:
        """Return each part with the longest suffix of a row's tokens that occurs in it."""
        suffix = np.array(tokens[-self._max_match :], dtype=np.int32)
        return [(part, part.match(suffix)) for part in self.parts]

    def num_bytes(self) -> int:
        return sum(part.num_bytes() for part in self.parts)


class SuffixLookup(Drafter):
    """A lookup drafter. With `share`, drafts depend on the order of earlier requests and replays."""

    kind = "suffix_lookup"
    Settings = SuffixLookupSettings

    def __init__(
        self, name: str, settings: SuffixLookupSettings, shared: SharedText | None = None
    ) -> None:
        """shared: the tenant's earlier answers; by default a new text if the settings share."""
        super().__init__(name, settings.num_draft_tokens)
        self.settings = settings
        self.shared = shared
        if shared is None and settings.share:
            self.shared = SharedText(settings.max_match, settings.shared_tokens)
        self._rows = RowIndices(settings.max_match)
        self._first_shared: dict[int, int] = {}  # row id -> index of the first token to share

    @classmethod
    def build(cls, name: str, settings: Any, context: BuildContext) -> SuffixLookup:
        return cls(name, settings, _find_shared_text(name, settings, context.drafters))

    def start(self, rows: Sequence[RowView]) -> None:
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
        return {**super().identity(), **self.settings.model_dump()}

    def num_bytes(self) -> int:
        return self._rows.num_bytes() + (0 if self.shared is None else self.shared.num_bytes())

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        found, trees = self.grow_trees(rows, limits)
        lengths = [tree.num_tokens for tree in trees]
        tokens, parents, evidence = found[:, :, : max(lengths)]
        drafts = Drafts(torch.from_numpy(tokens), lengths, evidence=evidence)
        if any(tree.num_leaves > 1 for tree in trees):
            drafts.parents = torch.from_numpy(parents)
        return drafts

    def grow_trees(
        self, rows: Sequence[RowView], limits: Sequence[int]
    ) -> tuple[np.ndarray, list[Tree]]:
        """Return tokens, parents and evidence [3, R, K] int64 of the rows' drafts, and their sizes."""
        out = np.full((3, len(rows), self.num_draft_tokens), -1, dtype=np.int64)
        own = self._rows.match_own(rows)
        trees = [
            self._draft(row, limit, own[i], out[:, i])
            for i, (row, limit) in enumerate(zip(rows, limits, strict=True))
        ]
        return out, trees

    def _draft(
        self, row: RowView, limit: int, own: tuple[SuffixIndex, Match], out: np.ndarray
    ) -> Tree:
        """Write a row's draft into `out` [3, K]: tokens, parents, evidence. own: the match in its text.

        Of the row's own text and the shared ones, the draft with the most expected tokens is kept.
        """
        best = Tree(0, 0, 0.0)
        if limit < 1:
            return best
        sources = [own]
        if self.shared is not None:
            sources += self.shared.match(row.tokens)
        for index, match in sources:
            longest = self._max_length(match)
            if longest <= best.expected:
                continue  # it cannot expect more
            # the best draft so far stays in `out` until a better one is known
            into = np.empty_like(out) if best.num_tokens else out
            tree = index.grow(
                match, self.settings.min_match, limit, self.settings.paths,
                self.settings.min_probability, *into[:, :longest],
            )  # fmt: skip
            if tree.expected > best.expected:
                best = tree
                if into is not out:
                    out[:, : best.num_tokens] = into[:, : best.num_tokens]
        return best

    def _max_length(self, match: Match) -> int:
        """Return the maximum number of tokens to draft after a match."""
        settings = self.settings
        longest = settings.length_factor * match.length + settings.length_offset
        return int(max(0, min(self.num_draft_tokens, longest)))


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
