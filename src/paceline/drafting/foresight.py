"""What a drafter would propose at each place of a known text, in two ways.

A chain drafter's rounds are read off the scores of one pass. Rounds that cannot be (lookup, adaptive
tables, searches, stops by confidence) come from running the drafter itself: the text is dealt out as
the engine would, so the drafter sees the same at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from paceline.contracts import GREEDY
from paceline.drafting.base import Foresight, PositionScores
from paceline.drafting.contract import prepare_all, read_drafts, read_length
from paceline.drafting.stops import FIXED_LENGTH
from paceline.errors import DrafterError
from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.contracts import SamplingParams
    from paceline.drafting.base import Drafter
    from paceline.drafting.stops import StopRule
    from paceline.models.language_model import LanguageModel

# a row that is no request's: the engine counts its rows from 0
_REPLAYED: Final = -2

_PIECE: Final = 512  # tokens per piece of a drafter's own prefill


@dataclass(slots=True)
class ReplayedRow:
    """A row that reads a known text; `slot` and `num_cached` are set if the target's cache is needed."""

    tokens: list[int]
    num_prompt: int
    slot: int = -1
    id: int = _REPLAYED
    sampling: SamplingParams = GREEDY
    num_cached: int = 0


class SimulatedForesight(Foresight):
    """The drafter's own rounds along a text; positions may only be asked in rising order.

    The drafter is started at the first question and finished by `close`, so nothing else may use it
    meanwhile.
    """

    def __init__(
        self,
        drafter: Drafter,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        scores: PositionScores | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        self.scores = scores
        self._drafter = drafter
        self._text = [*prompt, *trajectory]
        self._row = ReplayedRow(list(prompt), len(prompt), sampling=sampling)
        self._started = False

    def accepted(self, position: int, limit: int) -> tuple[int, int]:
        row = self._row
        here = row.num_prompt + position
        if here < len(row.tokens):
            raise ValueError(f"position {position} lies before what was replayed already")
        if not self._started:
            row.tokens.extend(self._text[len(row.tokens) : row.num_prompt + 1])
            self._started = True  # whatever comes of it, `finish` clears it up
            self._drafter.start([row])
            prepare_all(self._drafter, row, _PIECE)
        row.tokens.extend(self._text[len(row.tokens) : here])
        drafts = self._drafter.propose([row], [limit])
        if len(row.tokens) != here:
            raise DrafterError("changed row.tokens; copy them first")
        [draft] = read_drafts(drafts, [row], [limit], read_length(self._drafter))
        return len(draft.tokens), num_on_text(draft.tokens, draft.parents, self._text[here:])

    def close(self) -> None:
        if self._started:
            self._drafter.finish([self._row])


class CachedForesight(SimulatedForesight):
    """The same for a drafter that reads and overwrites the target's cache at the row's slot.

    One prefill of the text rebuilds the cache; what a draft wrote over is put back, as the round's
    verification would have done.
    """

    def __init__(
        self,
        drafter: Drafter,
        target: LanguageModel,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        chunk: int = 512,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        """chunk: tokens a forward of the prefill."""
        super().__init__(drafter, prompt, trajectory, sampling=sampling)
        self._target = target
        self._row.slot = target.acquire()
        try:
            cache_text(target, self._row.slot, self._text[:-1], len(prompt), chunk)
        except BaseException:
            target.release(self._row.slot)
            raise

    def accepted(self, position: int, limit: int) -> tuple[int, int]:
        row, cache = self._row, self._target.cache
        start = row.num_prompt + position - 1  # of the last token, which the drafter feeds first
        # the text's last token is never fed
        stop = start + max(0, min(limit, self._drafter.num_draft_tokens))
        stop = min(stop, len(self._text) - 1)
        row.num_cached = start
        true = cache.read(row.slot, start, stop)
        rounds = super().accepted(position, limit)
        cache.write(row.slot, start, true)
        return rounds

    def close(self) -> None:
        super().close()
        self._target.release(self._row.slot)


def cache_text(
    target: LanguageModel,
    slot: int,
    text: Sequence[int],
    num_prompt: int,
    chunk: int = 512,
    start: int = 0,
) -> None:
    """Put a text, from `start` on, into a row of the target's cache, as the engine feeds it."""
    while start < len(text):
        stop = min(start + chunk, len(text))
        if start < num_prompt:
            stop = min(stop, num_prompt)
        piece = torch.tensor(text[start:stop])
        target.forward(piece, [Span(slot, start, len(piece), prefill=start < num_prompt)])
        start = stop


class ChainForesight(Foresight):
    """Rounds read off the run of matching positions.

    What is accepted is exact under every stop rule: up to the first wrong token the chain is the text.
    How much is drafted behind it is exact at fixed length; a rule is given the confidences along the
    text there, and past the text's end its last one.
    """

    def __init__(
        self,
        scores: PositionScores,
        rooms: np.ndarray,
        num_draft_tokens: int,
        rule: StopRule = FIXED_LENGTH,
        num_prompt: int = 0,
    ) -> None:
        """rooms: [T] tokens that the drafter's own context allows it to draft at each position."""
        self.scores = scores
        self._rooms = rooms
        self._num_draft_tokens = num_draft_tokens
        self._rule = rule
        self._num_prompt = num_prompt
        self._sure: list[float] = scores.confidence.tolist()
        # run[i]: matches in a row from position i on
        self._run = np.zeros(len(scores.match) + 1, dtype=np.int64)
        for i in range(len(scores.match) - 1, -1, -1):
            self._run[i] = self._run[i + 1] + 1 if scores.match[i] else 0

    def accepted(self, position: int, limit: int) -> tuple[int, int]:
        room = int(self._rooms[position]) if position < len(self._rooms) else 0
        drafted = self._stopped(position, max(0, min(limit, self._num_draft_tokens, room)))
        matches = int(self._run[position]) if position < len(self._run) else 0
        return drafted, min(drafted, matches)

    def _stopped(self, position: int, most: int) -> int:
        """Where the rule ends a draft of up to `most` tokens."""
        if self._rule is FIXED_LENGTH or not most:
            return most
        sure = self._sure[position : position + most]
        sure += sure[-1:] * (most - len(sure))
        context = self._num_prompt + position - 1
        drafted = 1
        while drafted < most and self._rule.goes_on(sure[:drafted], context):
            drafted += 1
        return drafted


def num_on_text(tokens: Sequence[int], parents: Sequence[int] | None, truth: Sequence[int]) -> int:
    """How many tokens of a draft a target that writes `truth` accepts. Of equal siblings the first."""
    if parents is None:
        parents = range(-1, len(tokens) - 1)
    here, depth = -1, 0
    for k, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        # parents stand before their children, so one pass walks the path
        if depth < len(truth) and parent == here and token == truth[depth]:
            here, depth = k, depth + 1
    return depth
