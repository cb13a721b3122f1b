"""One round: drafters propose for their rows, one forward of the target verifies, rows take the result.

A row whose drafter or logits fail ends with its own error; the other rows continue.
Symbols: R rows, k draft tokens of a row, N packed tokens (each row's last token and its draft), V
logits.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

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

    from paceline.engine.rows import Row
    from paceline.models.detokenizer import Detokenizer
    from paceline.models.language_model import LanguageModel
    from paceline.verification import Verdict


def run_round(rows: Sequence[Row], target: LanguageModel, detokenizer: Detokenizer) -> None:
    """Draft, judge, commit. Afterwards a row that ended has a finish reason."""
    drafts = propose(rows, target.num_logits)
    if any(row.finish_reason is not None for row in rows):
        alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
        rows, drafts = [rows[i] for i in alive], [drafts[i] for i in alive]
        if not rows:
            return
    began = perf_counter()
    logits = verify(rows, drafts, target)
    verdicts = judge(rows, drafts, logits)
    judged = perf_counter()
    commit(rows, drafts, verdicts, target, logits, detokenizer)
    done = perf_counter()
    for row in rows:
        row.seconds.verify += (judged - began) / len(rows)
        row.seconds.commit += (done - judged) / len(rows)


# --- drafts ---------------------------------------------------------------------------------------


def propose(rows: Sequence[Row], num_logits: int) -> list[Draft]:
    """Return each row's draft; every drafter is called once for all its rows."""
    drafts: dict[int, Draft] = {}
    groups: dict[int, list[int]] = {}  # by identity, since a drafter may define hash and equality
    for i, row in enumerate(rows):
        if row.arm != NONE:
            groups.setdefault(id(row.drafter), []).append(i)
    for members in groups.values():
        began = perf_counter()
        for place, draft in enumerate(_ask([rows[i] for i in members], num_logits)):
            drafts[members[place]] = draft
        spent = (perf_counter() - began) / len(members)
        for i in members:
            rows[i].seconds.draft += spent
    return [drafts[i] if i in drafts else Draft([]) for i in range(len(rows))]


def _ask(rows: list[Row], num_logits: int) -> list[Draft]:
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
        proposed = drafter.propose(rows[:], limits[:])  # it may sort or change what it is handed
        drafts = read_drafts(proposed, rows, limits, num_draft_tokens, num_logits)
    except ENDS_ALL:
        raise
    except BaseException as error:  # noqa: BLE001 - a plug-in must not stop other rows
        failed = True
        if len(rows) == 1:
            rows[0].fail_by(rows[0].drafter_name, error)
    for i, row in enumerate(rows):
        if not row.restore_text(*text_states[i]):
            row.fail_by(row.drafter_name, text_changed())
    return [_ask_alone(row, num_logits) for row in rows] if failed else drafts


def _ask_alone(row: Row, num_logits: int) -> Draft:
    if row.finish_reason is not None:
        return Draft([])
    [draft] = _ask([row], num_logits)
    if draft.probs is not None:
        draft.probs = draft.probs.clone()  # the drafter may overwrite it for the next row
    return draft


# --- verification ---------------------------------------------------------------------------------


def verify(rows: Sequence[Row], drafts: Sequence[Draft], target: LanguageModel) -> Tensor:
    """Return the target's logits [N, V] at each row's last token and its draft."""
    flat: list[int] = []
    spans: list[Span] = []
    ancestors: list[Tensor | None] = []
    for row, draft in zip(rows, drafts, strict=True):
        flat.append(row.tokens[-1])
        flat.extend(draft.tokens)
        spans.append(Span(row.slot, row.num_cached, 1 + len(draft.tokens)))
        ancestors.append(None if draft.parents is None else _ancestors(draft.parents))
    # a drafter may draft ids that the target lacks: another id is fed, and the judge rejects the draft
    tokens = torch.tensor(flat).clamp_(0, target.num_logits - 1)
    trees = ancestors if any(a is not None for a in ancestors) else None
    return target.unembed(target.forward(tokens, spans, trees))


def _ancestors(parents: Sequence[int]) -> Tensor:
    """Return [1+k, 1+k] bool: the tokens on the path to each one, of the last token and its draft."""
    paths = [[0]]
    for k, parent in enumerate(parents):
        paths.append([*paths[parent + 1], k + 1])
    on_path = torch.zeros(len(paths), len(paths), dtype=torch.bool)
    rows = [i for i, path in enumerate(paths) for _ in path]
    on_path[rows, [j for path in paths for j in path]] = True
    return on_path


# --- commit ---------------------------------------------------------------------------------------


def commit(
    rows: Sequence[Row],
    drafts: Sequence[Draft],
    verdicts: Sequence[Verdict],
    target: LanguageModel,
    logits: Tensor,
    detokenizer: Detokenizer,
) -> None:
    """Append each row's accepted tokens and the target's own, up to the token that ends the answer."""
    first = 0
    for row, draft, verdict in zip(rows, drafts, verdicts, strict=True):
        place, first = first, first + 1 + len(draft.tokens)
        if verdict.error is not None:
            row.fail(verdict.error, verdict.cause)
            continue
        path = verdict.path
        if path != list(range(len(path))):
            # the accepted path moves to where a chain would stand
            start = row.num_cached + 1
            source = torch.tensor([start + k for k in path], device=target.device)
            target.cache.copy_positions(row.slot, source, start)
        tokens = [*(draft.tokens[k] for k in path), verdict.next_token]
        emitted = row.append_until_stop(tokens, detokenizer)
        if row.request.logprobs:
            places = [place, *(place + 1 + k for k in path)][:emitted]
            row.logprobs += _logprobs(logits[places], tokens[:emitted])
        row.rounds.append(RoundStats(len(draft.tokens), min(len(path), emitted)))


def _logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Return log p of each token under its own logits. logits: [n, V]."""
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    values: list[float] = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
    return values
