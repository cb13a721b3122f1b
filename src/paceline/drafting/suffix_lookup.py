"""Drafts the most frequent continuations of the text's own suffix, as a tree.

No model and no training; wins where answers repeat the prompt, themselves or, with `share`, earlier
answers. The longest earlier match of the suffix is the context; the longer it is, the more is
drafted. After SuffixDecoding (arXiv 2411.04975), on a suffix automaton instead of suffix trees.
Symbols: R rows, K = num_draft_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS
from paceline.contracts import GREEDY, Drafts
from paceline.drafting.base import Drafter, Foresight
from paceline.drafting.foresight import SimulatedForesight
from paceline.drafting.shared_text import SharedText
from paceline.drafting.suffix_index import RowIndices, Tree
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.drafting.base import Surroundings
    from paceline.drafting.suffix_index import Match


class SuffixLookupSettings(BaseModel):
    """num_draft_tokens: most tokens of a draft; a match of m tokens is worth length_factor * m +
    length_offset of them. paths: most paths of the tree, 1 drafts a chain. min_match, max_match:
    bounds of the suffix matched. min_probability: least estimated probability of a drafted token.

    share: match in answers to earlier requests too, the last `shared_tokens` tokens of them at most.
    tenant: whose answers they are; drafters of one tenant share them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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


class SuffixLookup(Drafter):
    kind: ClassVar[str] = "suffix_lookup"
    Settings: ClassVar[type[BaseModel]] = SuffixLookupSettings

    def __init__(
        self, name: str, settings: SuffixLookupSettings, shared: SharedText | None = None
    ) -> None:
        """shared: the text of the tenant's earlier answers, by default a new one where it is asked."""
        super().__init__(name, settings.num_draft_tokens)
        self.settings = settings
        self.shared = shared
        if shared is None and settings.share:
            self.shared = SharedText(settings.max_match, settings.shared_tokens)
        self._rows = RowIndices(settings.max_match)
        self._first_shared: dict[int, int] = {}  # by row: where the part of it begins to be shared

    @classmethod
    def build(cls, name: str, settings: Any, around: Surroundings) -> SuffixLookup:
        return cls(name, settings, _tenants_text(name, settings, around.drafters))

    def start(self, rows: Sequence[RowView]) -> None:
        self._rows.start(rows)
        for row in rows:
            # the last token is the first that this drafter did not find in the row
            self._first_shared[row.id] = max(row.num_prompt, len(row.tokens) - 1)

    def prepare(self, row: RowView, max_tokens: int) -> bool:
        return self._rows.prepare(row, max_tokens)

    def finish(self, rows: Sequence[RowView]) -> None:
        self._rows.finish(rows)
        for row in rows:
            first = self._first_shared.pop(row.id, None)
            if self.shared is not None and first is not None:
                self.shared.add(row.tokens[first:])

    def identity(self) -> dict[str, object]:
        return {**super().identity(), **self.settings.model_dump()}

    def num_bytes(self) -> int:
        return self._rows.num_bytes() + (0 if self.shared is None else self.shared.num_bytes())

    def propose(self, rows: Sequence[RowView], limits: Sequence[int]) -> Drafts:
        out = np.full((2, len(rows), self.num_draft_tokens), -1, dtype=np.int64)  # [2, R, K]
        trees = [
            self._draft(row, limit, out[:, i])
            for i, (row, limit) in enumerate(zip(rows, limits, strict=True))
        ]
        lengths = [tree.num_tokens for tree in trees]
        tokens, parents = out[:, :, : max(lengths)]
        drafts = Drafts(torch.from_numpy(tokens), lengths)
        if any(tree.num_leaves > 1 for tree in trees):
            drafts.parents = torch.from_numpy(parents)
        return drafts

    def _draft(self, row: RowView, limit: int, out: np.ndarray) -> Tree:
        """Write a row's draft into `out` [2, K], tokens and parents.

        Of its own text and the shared ones that one drafts whose draft promises most.
        """
        best = Tree(0, 0, 0.0)
        if limit < 1:
            return best
        own = self._rows.of(row)
        sources = [(own, own.match_own())]
        if self.shared is not None:
            sources += self.shared.match(row.tokens)
        for index, found in sources:
            num_worth = self._num_worth(found)
            if num_worth <= best.expected:
                continue  # it cannot promise more
            # what an earlier source wrote stays until this one does
            into = np.empty_like(out) if best.num_tokens else out
            tree = index.grow(
                found, self.settings.min_match, limit, self.settings.paths,
                self.settings.min_probability, into[0, :num_worth], into[1, :num_worth],
            )  # fmt: skip
            if tree.expected > best.expected:
                best = tree
                if into is not out:
                    out[:, : best.num_tokens] = into[:, : best.num_tokens]
        return best

    def _num_worth(self, found: Match) -> int:
        """How many tokens to draft behind a match."""
        worth = self.settings.length_factor * found.length + self.settings.length_offset
        return int(max(0, min(self.num_draft_tokens, worth)))

    def would_accept(
        self,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        p: Tensor | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> Foresight:
        """With `share`, what earlier requests and replays left decides too, so order matters."""
        return SimulatedForesight(self, prompt, trajectory, sampling=sampling)


def _tenants_text(
    name: str, settings: SuffixLookupSettings, drafters: Mapping[str, Drafter]
) -> SharedText | None:
    """The text that a drafter built earlier shares with this one, if there is one."""
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
