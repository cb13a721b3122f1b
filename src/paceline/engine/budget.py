"""One budget of verified tokens per round, shared by all rows.

Every token of a draft makes the forward longer for all rows. Of all rows' drafts those tokens are
verified that make the expected tokens per second of the whole round largest. They are taken likeliest
first; no token is likelier than its parent, so a chain keeps its beginning and a tree its root. One row
alone keeps its whole draft. vLLM and DSpark budget a batch by its load in a similar way (arXiv
2607.05147).

For exact sampling, whether a token drawn from q is verified must not depend on which token it is. So the
draws of this round do not influence the cut of a draft with `probs`: its chances are powers of the row's
acceptance in earlier rounds, its length is the one it was allowed, since a drafter may stop by what it
has drawn, and the seconds of drafting are the mean of earlier rounds.
Symbols: R rows, N draft tokens of all rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from paceline.drafting.contract import Draft
from paceline.engine.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.costs.round_seconds import RoundSeconds
    from paceline.engine.rows import Row
    from paceline.verification import Verdict

_NEWEST: Final = 0.1  # weight of a round's seconds of drafting in their mean


class Budget:
    """The cut of a round's drafts, by prices of this machine.

    gate: decides before the drafts which drafters are called.
    """

    def __init__(self, seconds: RoundSeconds) -> None:
        self.gate = Gate(seconds)
        self._seconds = seconds
        self._likeliest_cut = (
            0.0  # chance of a token that the last round did not keep; 0 without one
        )
        self._drafting = 0.0  # mean seconds of drafting, per row that drafts, of earlier rounds

    def limit(self, row: Row, num_draft_tokens: int) -> int:
        """Return the useful length of a row's draft: one token more than the last round's budget allows.

        A row without a learned acceptance may draft `num_draft_tokens`.
        """
        acceptance = row.in_use.acceptance
        if not acceptance.has_learned or not self._likeliest_cut:
            return num_draft_tokens
        depth = acceptance.depth_above(self._likeliest_cut)
        return (
            num_draft_tokens if depth >= num_draft_tokens else min(num_draft_tokens, 1 + int(depth))
        )

    def cut(self, rows: Sequence[Row], drafts: list[Draft]) -> list[Draft]:
        """Return the drafts to verify, each the given one or its likeliest tokens."""
        num_rows = len(rows)
        if num_rows < 2:
            return drafts
        chances: list[float] = []
        ends: list[int] = []
        context = num_drafting = 0
        for row, draft in zip(rows, drafts, strict=True):
            if draft.tokens:
                chances += _chances(row, draft)
            ends.append(len(chances))
            context += row.num_read
            num_drafting += row.is_asked
        total = len(chances)
        if not total:
            return drafts
        seconds = self._seconds.up_to(num_rows, context // num_rows, total)[: total + 1]
        expected = np.array([num_rows, *chances])
        order = (-expected).argsort(kind="stable")  # a parent precedes its equally likely child
        rates = expected[order].cumsum() / (seconds + self._drafting * num_drafting)
        num_kept = int(rates.argmax())
        if num_kept == total:
            self._likeliest_cut = 0.0
            return drafts
        self._likeliest_cut = float(expected[order[num_kept + 1]])
        kept = [False] * (total + 1)
        for place in order[: num_kept + 1].tolist():
            kept[place] = True
        return _keep(rows, drafts, ends, kept[1:])  # the first entry is the rows' own tokens

    def learn(
        self,
        rows: Sequence[Row],
        drafts: Sequence[Draft],
        verified: Sequence[Draft],
        verdicts: Sequence[Verdict],
        drafting: float,
    ) -> None:
        """Learn from a judged round. drafts: as proposed. drafting: seconds of all rows' proposals."""
        num_drafting = 0
        for row, draft, cut, verdict in zip(rows, drafts, verified, verdicts, strict=True):
            num_drafting += row.is_asked
            is_estimated = draft.chances is not None and draft.probs is None
            if draft.tokens and not is_estimated and verdict.error is None:
                row.in_use.acceptance.learn(draft, cut, verdict)
        if num_drafting:
            self._drafting += _NEWEST * (drafting / num_drafting - self._drafting)


def _chances(row: Row, draft: Draft) -> list[float]:
    if draft.probs is not None:
        allowed = min(row.draft_limit, row.num_draft_tokens)
        return row.in_use.acceptance.chances(None, allowed)
    if draft.chances is not None:
        return draft.chances
    return row.in_use.acceptance.chances(draft.parents, len(draft.tokens))


def _keep(
    rows: Sequence[Row], drafts: Sequence[Draft], ends: Sequence[int], kept: list[bool]
) -> list[Draft]:
    """Return the drafts without the tokens that are not kept. ends: the end of each draft in `kept`."""
    cut: list[Draft] = []
    first = 0
    for row, draft, end in zip(rows, drafts, ends, strict=True):
        own, first = kept[first:end], end
        num_kept = own.count(True)
        if num_kept < len(draft.tokens):
            draft = _without(draft, own, num_kept)
            row.num_draft_tokens = num_kept
        cut.append(draft)
    return cut


def _without(draft: Draft, kept: Sequence[bool], num_kept: int) -> Draft:
    """Return a draft's kept tokens. kept: for each token, and for those that it could have had."""
    if draft.parents is None:
        probs = None if draft.probs is None or not num_kept else draft.probs[:num_kept]
        return Draft(draft.tokens[:num_kept], None, probs)
    number = {-1: -1}  # token -> its place among the kept ones
    for k, is_kept in enumerate(kept):
        if is_kept:
            number[k] = len(number) - 1
    nodes = list(number)[1:]
    return Draft([draft.tokens[k] for k in nodes], [number[draft.parents[k]] for k in nodes])
