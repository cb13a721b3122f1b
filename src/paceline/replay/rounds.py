"""The rounds that a drafter would have had along a trajectory, without speculative decoding.

A round is the number of drafted tokens and of those that equal the target's own output, so a recorded
output is enough to count rounds with the engine's limits and cuts. The count is valid if the text does
not depend on the arm: greedy or `invariant` sampling in float32. This module knows no engine, no file.
Symbols: T trajectory tokens, V the target's logits width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.compiled import compiled
from paceline.contracts import GREEDY, NONE, SamplingParams, split_arm
from paceline.drafting.contract import read_whole
from paceline.errors import DrafterError, StoreError
from paceline.models.packing import Span
from paceline.store.records import ReplayedDrafter
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.drafting.base import Drafter
    from paceline.drafting.draft_replay import DraftReplay, PositionScores, ReplayedNode
    from paceline.models.language_model import LanguageModel
    from paceline.store.records import CollectedPrompt

_UNWARPED = SamplingParams(temperature=1.0, method="residual")


@dataclass(frozen=True, slots=True)
class Replay:
    """One drafter on one trajectory."""

    rounds: np.ndarray  # [rounds, 2] int64: drafted, accepted, at the drafter's full length
    ahead: np.ndarray | None  # [T - 1, 2], see `look_ahead`; None if rounds depend on earlier ones
    scores: PositionScores | None  # of chain drafters
    nodes: Sequence[ReplayedNode] = ()  # of lookups: every token of `ahead`
    proposed: np.ndarray | None = None  # [rounds] of cascades, see `ReplayedDrafter`

    @property
    def record(self) -> ReplayedDrafter:
        """The record that a collection stores."""
        if self.ahead is not None:
            return ReplayedDrafter(self.ahead, everywhere=True)
        return ReplayedDrafter(self.rounds, everywhere=False, proposed=self.proposed)


def max_output(max_new_tokens: int, num_before: int, context_length: int) -> int:
    """Return the maximum number of output tokens; the last one is never fed and needs no position.

    num_before: tokens of the target's text before the output.
    """
    return min(max_new_tokens, context_length + 1 - num_before)


def simulate(draft_replay: DraftReplay, num_output: int, max_total_output: int) -> np.ndarray:
    """Return [rounds, 2] int64, drafted and accepted: the engine's rounds over `num_output` tokens.

    The prefill emits the first token. A round drafts at most the tokens that could still be emitted in
    addition to the target's own. Of a draft that reaches past the trajectory's end (a stop), only the
    emitted tokens count as accepted, as in the engine.
    """
    rounds: list[tuple[int, int]] = []
    position = 1
    while position < num_output:
        drafted, accepted = _round(draft_replay, position, max_total_output - position - 1)
        accepted = min(accepted, num_output - position)
        rounds.append((drafted, accepted))
        position += accepted + 1
    return _table(rounds)


def look_ahead(draft_replay: DraftReplay, num_output: int, max_total_output: int) -> np.ndarray:
    """Return [T - 1, 2] int64, drafted and accepted of a round at each position 1 to T - 1.

    `walk` makes rounds from it.
    """
    rounds: list[tuple[int, int]] = []
    for position in range(1, num_output):
        drafted, accepted = _round(draft_replay, position, max_total_output - position - 1)
        rounds.append((drafted, min(accepted, num_output - position)))
    return _table(rounds)


def _round(draft_replay: DraftReplay, position: int, limit: int) -> tuple[int, int]:
    """Return (drafted, accepted) tokens of a round at a position, checked.

    A negative count from a drafter's own replay would never end.
    """
    drafted, accepted = draft_replay.round_at(position, limit)
    drafted, accepted = read_whole("drafted", drafted), read_whole("accepted", accepted)
    if not 0 <= accepted <= drafted:
        raise DrafterError(f"foresees {accepted} accepted of {drafted} drafted tokens")
    return drafted, accepted


def walk(ahead: np.ndarray, num_draft_tokens: int | None = None) -> np.ndarray:
    """Return [rounds, 2] of `simulate` from the table of `look_ahead`.

    num_draft_tokens: a shorter draft length, valid for drafters whose shorter draft is the beginning of
    the longer one.
    """
    table = ahead if num_draft_tokens is None else np.minimum(ahead, num_draft_tokens)
    places = _places(table[:, 1].astype(np.int64))
    rounds: np.ndarray = table[places].astype(np.int64)
    return rounds


@compiled
def _places(accepted: np.ndarray) -> np.ndarray:
    """Return the starts of rounds, as indices into `accepted` [T - 1]."""
    places = np.empty(len(accepted), dtype=np.int64)
    count = place = 0
    while place < len(accepted):
        places[count] = place
        count += 1
        place += accepted[place] + 1
    return places[:count]


def rounds_of(prompt: CollectedPrompt, arm: str) -> np.ndarray:
    """Return [rounds, 2] drafted and accepted of an arm on a collected prompt.

    Raises StoreError if the drafter was not replayed, or the rounds at a shorter length are unknown.
    """
    drafter, length = split_arm(arm)
    if drafter == NONE:
        return np.zeros((max(len(prompt.output_tokens) - 1, 0), 2), dtype=np.int64)
    replayed = prompt.replays.get(drafter)
    if replayed is None:
        raise StoreError(
            f"arm '{drafter}' was not replayed on prompt '{prompt.id}'; run `paceline collect PROMPTS` "
            "again with this configuration"
        )
    if replayed.everywhere:
        return walk(replayed.table, length)
    if length is not None:
        raise StoreError(
            f"'{arm}': the rounds of '{drafter}' depend on one another, so nothing is known of a "
            "shorter draft; configure another drafter with that length"
        )
    return replayed.table


def replay(
    drafter: Drafter,
    prompt: Sequence[int],
    trajectory: Sequence[int],
    max_total_output: int,
    p: Tensor | None = None,
    sampling: SamplingParams = GREEDY,
) -> Replay:
    """Return the rounds and scores of one drafter.

    p: [T, V], see `target_distributions`. sampling: of the trajectory.
    """
    with torch.inference_mode():
        draft_replay = drafter.would_accept(prompt, trajectory, p, sampling)
        try:
            if not drafter.replays_everywhere:
                rounds = simulate(draft_replay, len(trajectory), max_total_output)
                proposed = draft_replay.proposed
                return Replay(
                    rounds,
                    None,
                    draft_replay.scores,
                    proposed=None if proposed is None else np.array(proposed, dtype=np.int64),
                )
            ahead = look_ahead(draft_replay, len(trajectory), max_total_output)
        finally:
            draft_replay.close()
    return Replay(walk(ahead), ahead, draft_replay.scores, draft_replay.nodes or ())


def _table(rounds: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array(rounds, dtype=np.int64).reshape(-1, 2)


def target_distributions(
    target: LanguageModel,
    prompt: Sequence[int],
    trajectory: Sequence[int],
    chunk: int = 512,
    sampling: SamplingParams = GREEDY,
) -> Tensor:
    """Return p [T, V] float32, the target's warped distribution of each trajectory token.

    Greedy text is read at temperature 1. The target runs one teacher-forced pass over the text, `chunk`
    tokens per forward.
    """
    warping = _UNWARPED if sampling.method == "greedy" else sampling
    text = torch.tensor(target.text_of([*prompt, *trajectory[:-1]], len(prompt)))
    first = target.num_before_output(len(prompt)) - 1  # what predicts the first output token
    parts: list[Tensor] = []
    slot = target.acquire()
    try:
        with torch.inference_mode():
            if target.encoder is not None:
                target.begin(slot, prompt)
            for start in range(0, len(text), chunk):
                piece = text[start : start + chunk]
                hidden = target.forward(piece, [Span(slot, start, len(piece))])
                if start + len(piece) > first:
                    logits = target.unembed(hidden[max(0, first - start) :])
                    parts.append(warp(logits, warping).cpu())
    finally:
        target.release(slot)
    return torch.cat(parts)
