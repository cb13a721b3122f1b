"""Settings of the drafter `trigram_tree`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from paceline.config import MAX_DRAFT_TOKENS, Section

_RELEASED: Final = {
    "num_draft_tokens": 64,
    "search": "mcts",
    "iterations": 150,
    "paths": 24,
    "depth": 4,
    "c1": 32.0,
    "c2": 8.0,
    "update": "released",
    "update_step": 0.04,
    "update_cap": 3.0,
    "update_window": 16,
    "share": True,
}


class TrigramTreeSettings(Section):
    """The table, the search for drafts, and the update of the statistics by text.

    table: a file of `paceline trigram build`; answers: folder of a collection, which holds the table of
    its answers; without either the statistics start empty. num_draft_tokens:
    nodes per draft; depth: levels per draft.
    search: `greedy` adds the likeliest paths first; `mcts` is the paper's search, with its number of
    iterations, the number of paths to read out and the PUCT constants c1 and c2; `full` goes level by
    level.
    update: `counts` learns each tri-gram of the text once; each time, the counts of its pair decay by
    `decay`; the table's probabilities weigh `prior` observations. `released` adds update_step to the
    last update_window tri-grams in every round, up to update_cap. `none` learns nothing.
    max_pairs: maximum number of learned pairs. share: all requests learn into, and draft from, the same
    statistics. tenant: the owner of these statistics; drafters of one tenant share them. preset:
    `released` sets all omitted settings to those of the released code. seed: of the search's random
    draws.
    """

    table: Path | None = None
    answers: Path | None = None
    preset: Literal["released"] | None = None
    num_draft_tokens: int = Field(default=8, ge=1, le=MAX_DRAFT_TOKENS)
    depth: int = Field(default=6, ge=1, le=16)
    search: Literal["greedy", "mcts", "full"] = "greedy"
    iterations: int = Field(default=150, ge=1, le=10_000)
    paths: int = Field(default=24, ge=1)
    c1: float = Field(default=32.0, ge=0.0)
    c2: float = Field(default=8.0, gt=0.0)
    update: Literal["counts", "released", "none"] = "counts"
    decay: float = Field(default=0.9, gt=0.0, le=1.0)
    prior: float = Field(default=1.0, gt=0.0)
    update_step: float = Field(default=0.04, gt=0.0)
    update_cap: float = Field(default=3.0, gt=0.0)
    update_window: int = Field(default=16, ge=1)
    max_pairs: int = Field(default=16_384, ge=1, le=1 << 24)
    share: bool = False
    tenant: str = ""
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "released":
            return {**_RELEASED, **given}
        return given

    @model_validator(mode="after")
    def _agree(self) -> TrigramTreeSettings:
        if self.tenant and not self.share:
            raise ValueError("tenant needs share: true")
        if self.answers is not None and self.table is not None:
            raise ValueError("'table' and 'answers' both name the table; remove one")
        if self.answers is not None and self.share:
            raise ValueError(
                "shared statistics take over those of 'answers', so a replay could not leave out the "
                "answer to its own prompt; set share: false, or name a 'table'"
            )
        return self
