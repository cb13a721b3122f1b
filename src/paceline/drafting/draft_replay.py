"""Replays of a drafter along a known text: which tokens each round drafts, and how many are accepted.

`SimulatedReplay` runs the drafter itself and gives it the text as the engine would, so its drafts are
those of the engine at the same position. Chain drafters have a faster replay,
`chain_replay.ChainReplay`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from paceline.contracts import GREEDY
from paceline.drafting.contract import prepare_all, read_drafts, read_length
from paceline.errors import DrafterError
from paceline.models.packing import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from paceline.contracts import RowView, SamplingParams
    from paceline.drafting.contract import Proposer
    from paceline.models.language_model import LanguageModel

# id of a row that belongs to no request: the engine counts its rows from 0
_REPLAYED: Final = -2

_PIECE: Final = 512  # tokens per piece of a drafter's own prefill


@dataclass(slots=True)
class SimpleRow:
    """A row as a plain record; `slot` and `num_cached` are set if the target's cache is needed."""

    tokens: Sequence[int]
    num_prompt: int
    slot: int = -1
    id: int = _REPLAYED
    sampling: SamplingParams = GREEDY
    num_cached: int = 0
    features: Tensor | None = None


def row_for_parts(row: RowView) -> RowView:
    """Return the row as a composed drafter's parts see it: greedy, unless sampled by `invariant`."""
    if row.sampling.method in ("greedy", "invariant"):
        return row
    return SimpleRow(
        row.tokens,
        row.num_prompt,
        row.slot,
        row.id,
        num_cached=row.num_cached,
        features=row.features,
    )


@dataclass(frozen=True, slots=True)
class PositionScores:
    """A chain drafter's teacher-forced scores of a trajectory of T tokens, by position.

    match: the drafter's most likely token is the trajectory's. ratio: min(1, q/p) at the
    trajectory's token, the probability that a token drawn from p would also be drawn from q. overlap:
    sum of min(p, q), the acceptance probability under sampling. confidence: the drafter's largest
    probability. ratio and overlap are NaN where no target distribution was given.
    """

    match: np.ndarray  # [T] bool
    ratio: np.ndarray  # [T] float32
    overlap: np.ndarray  # [T] float32
    confidence: np.ndarray  # [T] float32


class ReplayedNode(NamedTuple):
    """One drafted token: the class of its evidence, its parent in the draft, whether it is right."""

    evidence: int
    parent: int
    kept: bool


class DraftReplay(ABC):
    """The rounds of one drafter along one trajectory."""

    scores: PositionScores | None = None
    nodes: list[ReplayedNode] | None = None
    """Of a lookup, every token of every round so far, one round after the other."""
    proposed: list[int] | None = None
    """Of a cascade, the tokens of every round so far that a model drafted."""

    @abstractmethod
    def round_at(self, position: int, limit: int) -> tuple[int, int]:
        """Return (drafted, accepted) of the round that starts after `position` emitted tokens.

        limit: maximum number of draft tokens that the engine would allow there.
        """

    def close(self) -> None:  # noqa: B027 - most replays hold nothing
        """Release the resources of the replay."""


class SimulatedReplay(DraftReplay):
    """The drafter's own rounds along a text, at positions that must not fall.

    The first `round_at` starts the drafter and `close` finishes it; nothing else may use the drafter
    in between.
    """

    def __init__(
        self,
        drafter: Proposer,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        scores: PositionScores | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        self.scores = scores
        self._drafter = drafter
        self._text = [*prompt, *trajectory]
        self._tokens = list(prompt)  # the text that the drafter has seen
        self._row = SimpleRow(self._tokens, len(prompt), sampling=sampling)
        self._started = False

    def round_at(self, position: int, limit: int) -> tuple[int, int]:
        row, tokens = self._row, self._tokens
        end = row.num_prompt + position
        if end < len(tokens):
            raise ValueError(f"position {position} lies before one that was replayed")
        if not self._started:
            tokens.extend(self._text[len(tokens) : row.num_prompt + 1])
            self._started = True  # `close` finishes the row even if `start` fails
            self._drafter.start([row])
            prepare_all(self._drafter, row, _PIECE)
        tokens.extend(self._text[len(tokens) : end])
        drafts = self._drafter.propose([row], [limit])
        if len(row.tokens) != end:
            raise DrafterError("changed row.tokens; copy them first")
        [draft] = read_drafts(drafts, [row], [limit], read_length(self._drafter))
        if drafts.proposed is not None:
            self.proposed = [*(self.proposed or ()), drafts.proposed[0]]
        path = accepted_path(draft.tokens, draft.parents, self._text[end:])
        if drafts.evidence is not None:
            parents = draft.parents or range(-1, len(draft.tokens) - 1)
            of_tokens = drafts.evidence[0].tolist()
            kept = set(path)
            if self.nodes is None:
                self.nodes = []
            self.nodes += (
                ReplayedNode(of_tokens[node], parent, node in kept)
                for node, parent in enumerate(parents)
            )
        return len(draft.tokens), len(path)

    def close(self) -> None:
        if self._started:
            self._drafter.finish([self._row])


class CachedReplay(SimulatedReplay):
    """A simulated replay of a drafter that reads and overwrites the target's cache at the row's slot.

    One prefill of the text fills the cache. After each round the entries that the draft overwrote are
    restored, as the engine's verification would restore them.
    """

    def __init__(
        self,
        drafter: Proposer,
        target: LanguageModel,
        prompt: Sequence[int],
        trajectory: Sequence[int],
        chunk: int = 512,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        """chunk: tokens per forward of the prefill."""
        super().__init__(drafter, prompt, trajectory, sampling=sampling)
        self._target = target
        self._row.slot = target.acquire()
        try:
            cache_text(target, self._row.slot, self._text[:-1], len(prompt), chunk)
        except BaseException:
            target.release(self._row.slot)
            raise

    def round_at(self, position: int, limit: int) -> tuple[int, int]:
        row, cache = self._row, self._target.cache
        before = self._target.num_before_output(row.num_prompt)
        start = before + position - 1  # of the last token, which the drafter feeds first
        stop = start + max(0, min(limit, self._drafter.num_draft_tokens))
        # the text's last token is never fed
        stop = min(stop, before + len(self._text) - row.num_prompt - 1)
        row.num_cached = start
        true = cache.read(row.slot, start, stop)
        rounds = super().round_at(position, limit)
        cache.write(row.slot, start, true)
        return rounds

    def close(self) -> None:
        super().close()
        self._target.release(self._row.slot)


def cache_text(
    target: LanguageModel,
    slot: int,
    tokens: Sequence[int],
    num_prompt: int,
    chunk: int = 512,
    start: int = 0,
) -> None:
    """Put prompt and output into a row of the target's cache, in the engine's pieces.

    num_prompt: leading tokens that are the prompt. start: the row's cached positions.
    """
    if target.encoder is not None and start == 0:
        target.begin(slot, tokens[:num_prompt])
    text, before = target.text_of(tokens, num_prompt), target.num_before_output(num_prompt)
    while start < len(text):
        stop = min(start + chunk, len(text))
        if start < before:
            stop = min(stop, before)
        piece = torch.tensor(text[start:stop])
        target.forward(piece, [Span(slot, start, len(piece), prefill=start < before)])
        start = stop


def count_accepted(
    tokens: Sequence[int], parents: Sequence[int] | None, truth: Sequence[int]
) -> int:
    """Return the number of draft tokens that are accepted by a target that writes `truth`."""
    return len(accepted_path(tokens, parents, truth))


def accepted_path(
    tokens: Sequence[int], parents: Sequence[int] | None, truth: Sequence[int]
) -> list[int]:
    """Return the places of the draft tokens that are accepted by a target that writes `truth`.

    parents: as in `Drafts`, None for a chain. Of equal siblings the first is followed.
    """
    if parents is None:
        parents = range(-1, len(tokens) - 1)
    last = -1
    path: list[int] = []
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        # parents precede their children, so one pass follows the path
        if len(path) < len(truth) and parent == last and token == truth[len(path)]:
            last = node
            path.append(node)
    return path
