"""A drafter of your own: it proposes, after each token, the one that last followed it in the row's text.

In paceline.yaml, with this file's folder on PYTHONPATH:

    drafters:
      bigram: {kind: "bigram_drafter:Bigram", settings: {num_draft_tokens: 6}}
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

from paceline import Drafter, Drafts, pad_drafts


class BigramSettings(BaseModel):
    """The keys under `settings`; any other key is refused with the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_draft_tokens: int = Field(default=4, ge=1, le=64)


class Bigram(Drafter):
    """A drafter of bigrams: each drafted token is the one that last followed the token before it."""

    kind = "bigram"
    nests = True  # a shorter draft is the beginning of a longer one
    Settings = BigramSettings

    def __init__(self, name, settings):
        super().__init__(name, settings.num_draft_tokens)
        self._followers = {}  # row id -> {token: the token that last followed it}
        self._num_read = {}  # row id -> number of the row's tokens that were read

    def start(self, rows):
        for row in rows:
            self._followers[row.id], self._num_read[row.id] = {}, 1

    def propose(self, rows, limits):
        drafts = [self._draft(row, limit) for row, limit in zip(rows, limits, strict=True)]
        return Drafts(*pad_drafts(drafts, torch.device("cpu")))

    def _draft(self, row, limit):
        followers = self._followers[row.id]
        for i in range(self._num_read[row.id], len(row.tokens)):  # catch up with the engine
            followers[row.tokens[i - 1]] = row.tokens[i]
        self._num_read[row.id] = len(row.tokens)
        draft, last = [], row.tokens[-1]
        while len(draft) < min(limit, self.num_draft_tokens) and last in followers:
            last = followers[last]
            draft.append(last)
        return draft

    def finish(self, rows):
        for row in rows:
            self._followers.pop(row.id, None)
            self._num_read.pop(row.id, None)
