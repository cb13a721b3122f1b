"""One round: every drafter proposes for its rows, the target judges all of them in one forward.

Symbols: R rows, K longest draft, N packed tokens (each row's last token and its draft), V logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

import paceline.noise as noise
from paceline.contracts import RoundStats, Verdicts
from paceline.engine.stops import append_until_stop
from paceline.errors import DrafterError
from paceline.models.packing import Span
from paceline.verification import judge_matches, judge_residual
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.contracts import Drafts
    from paceline.drafting.base import Drafter
    from paceline.engine.rows import Row
    from paceline.engine.stops import Decode
    from paceline.models.language_model import LanguageModel


@dataclass(slots=True)
class Round:
    """The drafts of all rows of a round, row after row."""

    tokens: list[list[int]]
    probs: list[Tensor | None]  # [k, V] each; None for a deterministic draft


def run_round(rows: Sequence[Row], target: LanguageModel, decode: Decode) -> None:
    """Draft, judge, commit. Afterwards a row that ended has a finish reason."""
    round_ = propose(rows)
    began = perf_counter()
    logits = verify(rows, round_, target)
    num_accepted, next_tokens = judge(rows, round_, logits)
    judged = perf_counter()
    commit(rows, round_, num_accepted, next_tokens, decode)
    done = perf_counter()
    for row in rows:
        row.seconds.verify += (judged - began) / len(rows)
        row.seconds.commit += (done - judged) / len(rows)


def propose(rows: Sequence[Row]) -> Round:
    """Each drafter proposes for its own rows, all of them at once."""
    groups: dict[Drafter, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.drafter, []).append(i)
    tokens: list[list[int]] = [[] for _ in rows]
    probs: list[Tensor | None] = [None for _ in rows]
    for drafter, members in groups.items():
        if drafter.num_draft_tokens == 0:
            continue
        began = perf_counter()
        limits = [rows[i].draft_limit for i in members]
        drafts = drafter.propose([rows[i] for i in members], limits)
        _check_contract(drafter, drafts, limits)
        for place, i in enumerate(members):
            length = drafts.lengths[place]
            tokens[i] = drafts.tokens[place, :length].tolist()
            if drafts.probs is not None and rows[i].sampling.method == "residual":
                probs[i] = drafts.probs[place, :length]
        spent = (perf_counter() - began) / len(members)
        for i in members:
            rows[i].seconds.draft += spent
    return Round(tokens, probs)


def _check_contract(drafter: Drafter, drafts: Drafts, limits: Sequence[int]) -> None:
    if not len(drafts.lengths) == len(drafts.tokens) == len(limits):
        raise DrafterError(
            f"drafter '{drafter.name}' proposed for {len(drafts.tokens)} rows where "
            f"{len(limits)} were asked for"
        )
    for length, limit in zip(drafts.lengths, limits, strict=True):
        if not 0 <= length <= max(limit, 0):
            raise DrafterError(
                f"drafter '{drafter.name}' proposed {length} tokens where {limit} were allowed"
            )


def verify(rows: Sequence[Row], round_: Round, target: LanguageModel) -> Tensor:
    """The target's logits [N, V] at each row's last token and at every draft token."""
    flat: list[int] = []
    spans: list[Span] = []
    for row, draft in zip(rows, round_.tokens, strict=True):
        flat.append(row.tokens[-1])
        flat.extend(draft)
        spans.append(Span(row.slot, len(row.tokens) - 1, 1 + len(draft)))
    # a drafter may know ids that the target lacks: any other is fed, and the judge rejects it
    tokens = torch.tensor(flat).clamp_(0, target.num_logits - 1)
    return target.unembed(target.forward(tokens, spans))


def judge(rows: Sequence[Row], round_: Round, logits: Tensor) -> tuple[list[int], list[int]]:
    """(draft tokens kept, next token) of every row."""
    num_accepted = [0] * len(rows)
    next_tokens = [0] * len(rows)
    greedy = [i for i, row in enumerate(rows) if row.sampling.method == "greedy"]
    firsts = _firsts(round_)
    if greedy:
        verdicts = _judge_greedy(greedy, firsts, round_, logits)
        _put(verdicts, greedy, num_accepted, next_tokens)
    for i, row in enumerate(rows):
        if row.sampling.method != "greedy":
            part = logits[firsts[i] : firsts[i] + 1 + len(round_.tokens[i])]
            verdict = judge_sampled(row, round_.tokens[i], round_.probs[i], part)
            _put(verdict, [i], num_accepted, next_tokens)
    return num_accepted, next_tokens


def _put(verdicts: Verdicts, members: list[int], accepted: list[int], nexts: list[int]) -> None:
    for i, a, n in zip(
        members, verdicts.num_accepted.tolist(), verdicts.next_tokens.tolist(), strict=True
    ):
        accepted[i], nexts[i] = a, n


def _firsts(round_: Round) -> list[int]:
    """Index of each row's first packed token."""
    firsts, total = [], 0
    for draft in round_.tokens:
        firsts.append(total)
        total += 1 + len(draft)
    return firsts


def _judge_greedy(members: list[int], firsts: list[int], round_: Round, logits: Tensor) -> Verdicts:
    best = logits.argmax(dim=-1).cpu()  # [N], the one copy off the device
    drafts = [round_.tokens[i] for i in members]
    width = max(len(d) for d in drafts)
    # places past a row's draft repeat its last one; its length keeps them from counting
    places = [
        [firsts[i] + min(k, len(d)) for k in range(width + 1)]
        for i, d in zip(members, drafts, strict=True)
    ]
    padded = torch.tensor([d + [-1] * (width - len(d)) for d in drafts], dtype=torch.int64)
    return judge_matches(
        best[torch.tensor(places)],
        padded.reshape(len(members), width),
        torch.tensor([len(d) for d in drafts]),
    )


def judge_sampled(row: Row, draft: list[int], q: Tensor | None, logits: Tensor) -> Verdicts:
    """One sampled row. logits: [k+1, V]; q: [k, V], or None for a draft judged by equality."""
    p = warp(logits, row.sampling).cpu()
    positions = len(row.tokens) + torch.arange(len(draft) + 1)
    seed = torch.tensor(row.sampling.seed)
    e = noise.exponential(seed, positions, noise.TARGET, p.shape[-1])
    tokens = torch.tensor(draft, dtype=torch.int64)[None]
    lengths = torch.tensor([len(draft)])
    if q is None:
        return judge_matches(noise.race(p, e)[None], tokens, lengths)
    u = noise.uniform(seed, positions[:-1], noise.ACCEPT)
    return judge_residual(p[None], q.cpu()[None], tokens, lengths, u[None], e[None])


def commit(
    rows: Sequence[Row],
    round_: Round,
    num_accepted: Sequence[int],
    next_tokens: Sequence[int],
    decode: Decode,
) -> None:
    """Append what was accepted and the target's own token, up to where the answer ends."""
    for row, draft, accepted, token in zip(
        rows, round_.tokens, num_accepted, next_tokens, strict=True
    ):
        emitted = append_until_stop(row, [*draft[:accepted], token], decode)
        row.rounds.append(RoundStats(len(draft), min(accepted, emitted)))
