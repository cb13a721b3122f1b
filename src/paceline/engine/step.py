"""One round: drafters propose for their rows, one forward of the target verifies, rows take the result.

A row whose drafter or logits fail ends with its own error; the other rows continue.
Symbols: R rows, k draft tokens of a row, N packed tokens (each row's last token and its draft), V
logits.
"""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Final

import torch

from paceline.contracts import NONE, RoundStats
from paceline.drafting.contract import Draft, read_drafts, read_length
from paceline.engine.containment import text_changed
from paceline.errors import ENDS_ALL
from paceline.models.packing import Span
from paceline.verification import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.engine.budget import Budget
    from paceline.engine.rows import Row
    from paceline.models.detokenizer import Detokenizer
    from paceline.models.language_model import LanguageModel
    from paceline.models.scores import Scores
    from paceline.verification import Verdict

_stats_of: Final = lru_cache(maxsize=1024)(RoundStats)  # equal rounds share one record


def run_round(
    rows: Sequence[Row],
    target: LanguageModel,
    detokenizer: Detokenizer,
    budget: Budget | None = None,
) -> None:
    """Draft, cut, judge, commit. Afterwards a row that ended has a finish reason.

    budget: cuts the drafts of several rows, and its gate skips drafters that do not pay; None does
    neither.
    """
    started = perf_counter()
    proposed = drafts = propose(rows, target.num_logits, budget if len(rows) > 1 else None)
    if any(row.finish_reason is not None for row in rows):
        alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
        rows, proposed = [rows[i] for i in alive], [drafts[i] for i in alive]
        if not rows:
            return
        drafts = proposed
    began = perf_counter()
    if budget is not None:
        drafts = budget.cut(rows, proposed)
    scores = verify(rows, drafts, target)
    verdicts = judge(rows, drafts, scores)
    judged = perf_counter()
    commit(rows, drafts, verdicts, target, scores, detokenizer)
    if budget is not None:
        budget.learn(rows, proposed, drafts, verdicts, began - started)
        if len(rows) > 1:
            budget.gate.learn(rows, drafts, verdicts, began - started)
    verifying, committing = (judged - began) / len(rows), (perf_counter() - judged) / len(rows)
    for row in rows:
        seconds = row.seconds
        seconds.verify += verifying
        seconds.commit += committing


# --- drafts ---------------------------------------------------------------------------------------


def propose(rows: Sequence[Row], num_logits: int, budget: Budget | None = None) -> list[Draft]:
    """Return each row's draft, empty for a row that is not asked.

    Each drafter is called at most once for all its rows.

    budget: limits drafts to a useful length, and calls no drafter that its gate does not admit.
    """
    drafts = [Draft([]) for _ in rows]
    groups: dict[int, list[int]] = {}  # by identity, since a drafter may define hash and equality
    for i, row in enumerate(rows):
        row.is_asked = row.arm != NONE
        if row.is_asked:
            groups.setdefault(id(row.drafter), []).append(i)
    for members in groups.values():
        own = [rows[i] for i in members]
        if budget is not None and not budget.gate.admits(own, len(rows)):
            for row in own:
                row.is_asked, row.num_draft_tokens = False, 0
            continue
        began = perf_counter()
        drafter = own[0].drafter
        drafter.rows_in_flight = len(rows)
        for i, draft in zip(members, _ask(own, num_logits, budget), strict=True):
            drafts[i] = draft
        spent = perf_counter() - began
        if budget is not None:
            budget.gate.learn_call(drafter, spent)
        for row in own:
            row.seconds.draft += spent / len(own)
    return drafts


def _ask(rows: list[Row], num_logits: int, budget: Budget | None) -> list[Draft]:
    """Return the drafts of one drafter's rows; after a failure, ask for each row alone."""
    drafter, failed = rows[0].drafter, False
    text_states = [row.text_state for row in rows]
    try:
        num_draft_tokens = read_length(drafter)
        for row in rows:
            row.num_draft_tokens = num_draft_tokens
        if not num_draft_tokens:
            return [Draft([]) for _ in rows]
        limits = [row.draft_limit for row in rows]
        if budget is not None:
            for i, row in enumerate(rows):
                row.num_draft_tokens = budget.limit(row, num_draft_tokens)
                limits[i] = min(limits[i], row.num_draft_tokens)
        proposed = drafter.propose(rows[:], limits[:])  # it may sort or change what it is handed
        drafts = read_drafts(proposed, rows, limits, num_draft_tokens, num_logits)
    except ENDS_ALL:
        raise
    except BaseException as error:  # noqa: BLE001 - a plug-in must not stop other rows
        failed = True
        if len(rows) == 1:
            rows[0].fail_by(rows[0].drafter_name, error)
    if failed or [row.text_state for row in rows] != text_states:
        for row, state in zip(rows, text_states, strict=True):
            if not row.restore_text(*state):
                row.fail_by(row.drafter_name, text_changed())
    return [_ask_alone(row, num_logits, budget) for row in rows] if failed else drafts


def _ask_alone(row: Row, num_logits: int, budget: Budget | None) -> Draft:
    if row.finish_reason is not None:
        return Draft([])
    [draft] = _ask([row], num_logits, budget)
    if draft.probs is not None:
        draft.probs = draft.probs.clone()  # the drafter may overwrite it for the next row
    return draft


# --- verification ---------------------------------------------------------------------------------


def verify(rows: Sequence[Row], drafts: Sequence[Draft], target: LanguageModel) -> Scores:
    """Return the target's scores at each row's last token and its draft."""
    tokens: list[int] = []
    spans: list[Span] = []
    parents: list[list[int] | None] = []
    wants_logits = has_tree = False
    for row, draft in zip(rows, drafts, strict=True):
        drafted = draft.tokens
        tokens.append(row.tokens[-1])
        tokens += drafted
        spans.append(Span(row.slot, row.num_cached, 1 + len(drafted)))
        parents.append(draft.parents)
        if draft.parents:
            has_tree = True
        if row.reads_logits:
            wants_logits = True
    last = target.num_logits - 1
    if min(tokens) < 0 or max(tokens) > last:
        # a drafter may draft ids that the target lacks: another id is fed, the judge rejects the draft
        tokens = [min(max(token, 0), last) for token in tokens]
    return target.score(tokens, spans, parents if has_tree else None, wants_logits)


# --- commit ---------------------------------------------------------------------------------------


def commit(
    rows: Sequence[Row],
    drafts: Sequence[Draft],
    verdicts: Sequence[Verdict],
    target: LanguageModel,
    scores: Scores,
    detokenizer: Detokenizer,
) -> None:
    """Append each row's accepted tokens and the target's own, up to the token that ends the answer."""
    first = 0
    for row, draft, verdict in zip(rows, drafts, verdicts, strict=True):
        place, first = first, first + 1 + len(draft.tokens)
        if verdict.error is not None:
            row.fail(verdict.error, verdict.cause)
            continue
        path, num_accepted = verdict.path, len(verdict.path)
        if path and path[-1] >= num_accepted:  # a tree's path with gaps
            _move_path(row, path, target)
            tokens = [draft.tokens[k] for k in path]
        else:
            tokens = draft.tokens[:num_accepted]
        tokens.append(verdict.next_token)
        emitted = row.append_until_stop(tokens, detokenizer)
        if row.request.logprobs:
            places = [place, *(place + 1 + k for k in path)][:emitted]
            assert scores.logits is not None
            row.logprobs += _logprobs(scores.logits[places], tokens[:emitted])
        row.rounds.append(
            _stats_of(len(draft.tokens), num_accepted if num_accepted < emitted else emitted)
        )


def _move_path(row: Row, path: Sequence[int], target: LanguageModel) -> None:
    """Move an accepted path of a tree in the target's cache to where a chain would stand."""
    kept = 0
    while path[kept] == kept:
        kept += 1
    start = row.num_cached + 1
    target.cache.copy_positions(row.slot, [start + k for k in path[kept:]], start + kept)


def _logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Return log p of each token under its own logits. logits: [n, V]."""
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    values: list[float] = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
    return values
