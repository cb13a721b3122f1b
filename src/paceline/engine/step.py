"""One round: every drafter proposes for its rows, the target judges all of them in one forward.

A row whose drafter or logits go wrong ends with its own error; the others never notice.
Symbols: R rows, k draft tokens of a row, N packed tokens (each row's last token and its draft), V
logits, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Final

import torch

import paceline.noise as noise
from paceline.contracts import NONE, RoundStats
from paceline.drafting.contract import Draft, read_drafts, read_length
from paceline.engine.containment import text_changed
from paceline.errors import ENDS_ALL
from paceline.logit_rules import apply_rules
from paceline.models.packing import Span
from paceline.verification import accept_block, accept_residual, depths, follow
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import LogitRules, SamplingParams
    from paceline.engine.rows import Row
    from paceline.models.detokenizer import Detokenizer
    from paceline.models.language_model import LanguageModel
    from paceline.verification.trees import Choices


_NOT_FINITE: Final = "the target's logits are not finite; are its weights fit for its dtype?"
_NOTHING_LEFT: Final = (
    "the logit rules leave no possible token: all logits are -inf, or one is nan or inf; "
    "look at suppress_tokens, logit_bias and processors"
)
# in place of a token where none is possible; no int64 of a draft equals it
_NO_TOKEN: Final = -(2**70)


@dataclass(slots=True)
class Verdict:
    """What the target says of one draft."""

    path: list[int]  # indices of the draft tokens that are kept
    next_token: int


def run_round(rows: Sequence[Row], target: LanguageModel, words: Detokenizer) -> None:
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
    commit(rows, drafts, verdicts, target, logits, words)
    done = perf_counter()
    for row in rows:
        row.seconds.verify += (judged - began) / len(rows)
        row.seconds.commit += (done - judged) / len(rows)


# --- drafts ---------------------------------------------------------------------------------------


def propose(rows: Sequence[Row], num_logits: int) -> list[Draft]:
    """Each drafter proposes for its own rows, all of them at once."""
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
    """Proposals for rows of one drafter; where that fails, for each row alone, to see which."""
    drafter, failed = rows[0].drafter, False
    texts = [(len(row.tokens), row.tokens[-1]) for row in rows]
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
        if not row.keeps_text(*texts[i]):
            row.fail_by(row.drafter_name, text_changed())
    return [_ask_alone(row, num_logits) for row in rows] if failed else drafts


def _ask_alone(row: Row, num_logits: int) -> Draft:
    """Ask for one row of several, if it has not failed yet."""
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
    # a drafter may draft ids that the target lacks: another id is fed, and the judge rejects the draft's
    tokens = torch.tensor(flat).clamp_(0, target.num_logits - 1)
    trees = ancestors if any(a is not None for a in ancestors) else None
    return target.unembed(target.forward(tokens, spans, trees))


def _ancestors(parents: Sequence[int]) -> Tensor:
    """[1+k, 1+k] bool of the row's last token and its draft: whom each one follows, and itself."""
    lines = [[0]]
    for k, parent in enumerate(parents):
        lines.append([*lines[parent + 1], k + 1])
    seen = torch.zeros(len(lines), len(lines), dtype=torch.bool)
    rows = [i for i, line in enumerate(lines) for _ in line]
    seen[rows, [j for line in lines for j in line]] = True
    return seen


def judge(rows: Sequence[Row], drafts: Sequence[Draft], logits: Tensor) -> list[Verdict]:
    """Return each row's verdict: the accepted path and the token after it. logits: [N, V].

    A row fails if its own text leads to a place without a possible token, not if only a draft does.
    """
    best, ids = logits.max(dim=-1)
    # one copy from the device, and a second one for all sampled rows
    choices: list[int] = torch.where(best.isfinite(), ids, -1).tolist()
    if min(choices) < 0:
        choices = _matching_nothing(choices)
    verdicts = []
    open_rows: dict[int, _Open] = {}
    first = 0
    for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
        stop = first + 1 + len(draft.tokens)
        own = choices[first:stop]
        if row.sampling.method == "greedy" and row.request.rules is None:
            verdicts.append(_follow(own, draft))
            if verdicts[i].next_token < 0:
                row.fail(_NOT_FINITE)
        else:
            errors: dict[int, BaseException] = {}
            answer = _judge_one(row, draft, logits[first:stop], own, errors)
            if isinstance(answer, Verdict):
                verdicts.append(answer)
                _check_token(row, answer, own, errors)
            else:
                verdicts.append(Verdict([], 0))
                open_rows[i] = _Open(answer, own, errors)
        first = stop
    if open_rows:
        flat: list[int] = torch.cat([one.answer for one in open_rows.values()]).tolist()
        for i, one in open_rows.items():
            size = len(one.answer)
            verdicts[i] = _verdict(flat[:size], drafts[i])
            _check_token(rows[i], verdicts[i], one.own, one.errors)
            flat = flat[size:]
    return verdicts


@dataclass(slots=True)
class _Open:
    """A verdict that is still on the device."""

    answer: Tensor
    own: list[int]  # the target's most likely token at each place
    errors: dict[int, BaseException]  # of its logit rules, by place


def _matching_nothing(choices: Sequence[int]) -> list[int]:
    """Replace negative choices by a value that equals no drafted token."""
    return [token if token >= 0 else _NO_TOKEN for token in choices]


def _check_token(
    row: Row, verdict: Verdict, own: Sequence[int], errors: Mapping[int, BaseException]
) -> None:
    """Fail a row whose accepted path ends at a place without a possible token."""
    if verdict.next_token >= 0:
        return
    place = verdict.path[-1] + 1 if verdict.path else 0
    if own[place] < 0:
        row.fail(_NOT_FINITE)
    elif place in errors:
        row.fail("logit rules", errors[place])
    else:
        row.fail(_NOTHING_LEFT)


def _follow(choices: Choices, draft: Draft) -> Verdict:
    path = follow(choices, draft.tokens, draft.parents)
    return Verdict(path, choices[path[-1] + 1 if path else 0])


def _verdict(answer: Sequence[int], draft: Draft) -> Verdict:
    """Make the verdict of an answer of `_judge_one` that was copied from the device."""
    if draft.probs is None:
        return _follow(_matching_nothing(answer), draft)
    num_accepted, next_token = answer
    return Verdict(list(range(num_accepted)), next_token)


def _judge_one(
    row: Row,
    draft: Draft,
    logits: Tensor,
    own: Sequence[int],
    errors: dict[int, BaseException],
) -> Verdict | Tensor:
    """Judge a row that is sampled or has rules. logits: [k+1, V]. errors: filled with its rules' errors.

    Return the verdict on the CPU. On other devices return a tensor that `_verdict` reads: the target's
    token at every place [k+1], or for a draft with probabilities the number of accepted tokens and the
    token after them [2]. A token of -1 means that none is possible.
    """
    rules = row.request.rules
    if rules is not None:
        logits = _ruled(row, rules, draft, logits, own, errors)
    params, start = row.sampling, len(row.tokens)
    if params.method == "greedy":
        best, ids = logits.max(dim=-1)
        return torch.where(best.isfinite(), ids, -1)
    on_cpu = logits.device.type == "cpu"
    if draft.probs is None:
        if on_cpu:
            return _follow(_Draws(logits, params, start), draft)
        return _draw_everywhere(logits, draft, params, start)
    p = warp(logits, params)
    k = len(draft.tokens)
    # one copy to the device
    numbers = torch.tensor(
        [params.seed, k, *range(start, start + k), *draft.tokens], device=p.device
    )
    seed, length, at, tokens = numbers[0], numbers[1:2], numbers[2 : k + 2], numbers[k + 2 :]
    if rules is not None or min(own) < 0:
        # a softmax over a nan or inf is nan throughout; the draft is cut there
        length = (~p[:k, 0].isnan()).to(torch.int64).cumprod(dim=0).sum(dim=0, keepdim=True)
    block = params.method == "block"
    u = noise.uniform(seed, noise.of_round(at, start) if block else at, noise.ACCEPT)
    verdicts = (accept_block if block else accept_residual)(
        p[None], draft.probs.to(p.device)[None], tokens[None], length, u[None]
    )
    if on_cpu:
        kept = int(verdicts.num_accepted)
        token = noise.draw(verdicts.next_weights[0], params.seed, start + kept, noise.TARGET)
        return Verdict(list(range(kept)), token)
    e = noise.exponential(seed, start + verdicts.num_accepted, noise.TARGET, p.shape[-1])
    return torch.cat([verdicts.num_accepted, noise.race(verdicts.next_weights, e)])


def _ruled(
    row: Row,
    rules: LogitRules,
    draft: Draft,
    logits: Tensor,
    own: Sequence[int],
    errors: dict[int, BaseException],
) -> Tensor:
    """Return the logits [k+1, V] after the row's rules; nan at a place where the rules fail.

    Each place is computed alone, so a processor that fails on a drafted text fails that place only.
    """
    ruled = torch.full(logits.shape, float("nan"), device=logits.device)
    texts = _texts(row, draft, logits.shape[-1])
    for place, text in enumerate(texts):
        if own[place] < 0:
            continue
        try:
            ruled[place] = apply_rules(
                rules,
                logits[place : place + 1],
                [text],
                row.num_prompt,
                row.request.stop_token_ids,
            )[0]
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's own processor
            errors[place] = error
    return ruled


@dataclass(slots=True)
class _Draws:
    """The target's draws by place, made on demand along one path from the root."""

    logits: Tensor  # [k+1, V]
    params: SamplingParams
    start: int
    drawn: dict[int, int] = field(default_factory=dict)

    def __getitem__(self, place: int) -> int:
        if place not in self.drawn:
            p = warp(self.logits[place], self.params)
            position = self.start + len(self.drawn)
            token = noise.draw(p, self.params.seed, position, noise.TARGET)
            self.drawn[place] = token if token >= 0 else _NO_TOKEN
        return self.drawn[place]


def _draw_everywhere(logits: Tensor, draft: Draft, params: SamplingParams, start: int) -> Tensor:
    """Draw the target's token at every place of a draft [k+1], since each read would be a copy."""
    levels = range(len(draft.tokens)) if draft.parents is None else depths(draft.parents)
    places = [start, *(start + 1 + level for level in levels)]
    numbers = torch.tensor([params.seed, *places], device=logits.device)
    e = noise.exponential(numbers[0], numbers[1:], noise.TARGET, logits.shape[-1])
    return noise.race(warp(logits, params), e)


def _texts(row: Row, draft: Draft, num_logits: int) -> list[list[int]]:
    """The text before each place: the row's, and the row's with the path to each draft token, as fed."""
    texts = [row.tokens]
    for k, token in enumerate(draft.tokens):
        before = k if draft.parents is None else draft.parents[k] + 1
        texts.append([*texts[before], min(max(token, 0), num_logits - 1)])
    return texts


# --- commit ---------------------------------------------------------------------------------------


def commit(
    rows: Sequence[Row],
    drafts: Sequence[Draft],
    verdicts: Sequence[Verdict],
    target: LanguageModel,
    logits: Tensor,
    words: Detokenizer,
) -> None:
    """Append what was kept and the target's own token, up to where the answer ends."""
    first = 0
    for row, draft, verdict in zip(rows, drafts, verdicts, strict=True):
        place, first = first, first + 1 + len(draft.tokens)
        if row.finish_reason is not None:
            continue
        path = verdict.path
        if path != list(range(len(path))):
            # the kept path moves to where a chain would stand
            start = row.num_cached + 1
            source = torch.tensor([start + k for k in path], device=target.device)
            target.cache.copy_positions(row.slot, source, start)
        tokens = [*(draft.tokens[k] for k in path), verdict.next_token]
        emitted = row.append_until_stop(tokens, words)
        if row.request.logprobs:
            places = [place, *(place + 1 + k for k in path)][:emitted]
            row.logprobs += _logprobs(logits[places], tokens[:emitted])
        row.rounds.append(RoundStats(len(draft.tokens), min(len(path), emitted)))


def _logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """log p of each token under its own logits. logits: [n, V]."""
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    found: list[float] = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
    return found
