"""Replay of a chain drafter from the scores of one teacher-forced pass.

Symbols: T trajectory tokens, V the target's logits width, V' the drafter's, p and q the next-token
distributions of target and drafter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.drafting.draft_length import FIXED_LENGTH, confidences
from paceline.drafting.draft_replay import DraftReplay, PositionScores
from paceline.drafting.drawing import draw_along
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import SamplingParams
    from paceline.drafting.draft_length import StopRule

NO_SCORES = PositionScores(np.zeros(0, dtype=bool), *(np.zeros(0, dtype=np.float32),) * 3)


class ChainReplay(DraftReplay):
    """Rounds that follow from the runs of matching positions.

    The number of accepted tokens is exact under every stop rule, because the chain equals the text
    up to the first wrong token. The number of drafted tokens is exact at fixed length. For a stop rule
    it is an estimate: after a wrong token the rule reads the confidences along the text, and after the
    text's end the last confidence.
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
        self._confidences: list[float] = scores.confidence.tolist()
        # run[i]: number of successive matches from position i on
        self._run = np.zeros(len(scores.match) + 1, dtype=np.int64)
        for i in range(len(scores.match) - 1, -1, -1):
            self._run[i] = self._run[i + 1] + 1 if scores.match[i] else 0

    def round_at(self, position: int, limit: int) -> tuple[int, int]:
        room = int(self._rooms[position]) if position < len(self._rooms) else 0
        longest = max(0, min(limit, self._num_draft_tokens, room))
        drafted = self._stopped_length(position, longest)
        matches = int(self._run[position]) if position < len(self._run) else 0
        return drafted, min(drafted, matches)

    def _stopped_length(self, position: int, longest: int) -> int:
        """Return the length at which the rule ends a draft of up to `longest` tokens."""
        if self._rule is FIXED_LENGTH or not longest:
            return longest
        known = self._confidences[position : position + longest]
        known += known[-1:] * (longest - len(known))
        context = self._num_prompt + position - 1
        drafted = 1
        while drafted < longest and self._rule.allows_next(known[:drafted], context):
            drafted += 1
        return drafted


def score_positions(
    logits: Tensor,
    trajectory: Sequence[int],
    num_prompt: int,
    p: Tensor | None,
    sampling: SamplingParams,
) -> PositionScores:
    """Return a chain drafter's scores of T trajectory tokens.

    logits: [T, V'] float32, the drafter's before each token. p: [>= T, V] as in
    `Drafter.would_accept`. sampling: how the trajectory was drawn.
    """
    truth = torch.tensor(trajectory)
    if sampling.method == "greedy":
        drafted = logits.argmax(dim=-1).cpu()
    else:
        q = warp(logits, sampling).cpu()
        drafted = draw_along(q, sampling.seed, num_prompt)
    ratio = overlap = torch.full((len(truth),), float("nan"))
    if p is not None:
        if sampling.method == "greedy":
            q = logits.softmax(dim=-1).cpu()
        p = p[: len(truth), : q.shape[-1]].float()
        is_shared = truth < q.shape[-1]
        ids = torch.where(is_shared, truth, 0)[:, None]
        ratio = (q.gather(1, ids) / p.gather(1, ids)).clamp(max=1.0)[:, 0]
        ratio = torch.where(is_shared, ratio, 0.0)
        overlap = torch.minimum(p, q).sum(dim=-1)
    match = (drafted == truth).numpy()
    return PositionScores(match, ratio.numpy(), overlap.numpy(), confidences(logits).cpu().numpy())
