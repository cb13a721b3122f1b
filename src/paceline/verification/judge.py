"""The judge of a round: the accepted path of every row's draft, and the target's token after it.

A draft without probabilities is followed as far as it equals the target's own choices; a stochastic
chain is weighed by `acceptance`. This module knows no model, drafter or engine.
Symbols: k draft tokens of a row, N packed tokens (each row's last token and its draft), V logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import torch

import paceline.noise as noise
from paceline.logit_rules import apply_rules
from paceline.verification.acceptance import accept_block, accept_residual
from paceline.warping import warp

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from paceline.contracts import Request, SamplingParams
    from paceline.models.scores import Scores

_NOT_FINITE: Final = "the target's logits are not finite; are its weights fit for its dtype?"
_NO_TOKEN_LEFT: Final = (
    "the logit rules leave no possible token: all logits are -inf, or one is nan or inf; "
    "look at suppress_tokens, logit_bias and processors"
)
# in place of a token where none is possible; no int64 of a draft equals it
_NO_TOKEN: Final = -(2**70)


class RowText(Protocol):
    """A row with the text that a draft follows."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def text(self) -> tuple[list[int], int]:
        """The target's text, and how many tokens of it come before the output."""

    @property
    def request(self) -> Request: ...


class DraftView(Protocol):
    """A chain, or a tree if `parents` are given; fields as in `paceline.drafting.contract.Draft`."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def parents(self) -> list[int] | None: ...
    @property
    def probs(self) -> Tensor | None: ...


class Choices(Protocol):
    """The target's token at each place; read along one path only."""

    def __getitem__(self, place: int, /) -> int: ...


@dataclass(slots=True)
class Verdict:
    """The judgement of one draft."""

    path: list[int]  # indices of the accepted draft tokens
    next_token: int
    error: str | None = None  # set if the row has no next token
    cause: BaseException | None = None  # the exception that led to the error


def judge(rows: Sequence[RowText], drafts: Sequence[DraftView], scores: Scores) -> list[Verdict]:
    """Return each row's verdict; an error if its accepted path has no next token.

    scores: at all N places; with logits if a row is sampled or has rules.
    """
    choices = scores.choices
    if min(choices) < 0:
        choices = _matching_nothing(choices)
    verdicts = []
    pending: dict[int, _Pending] = {}
    first = 0
    for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
        stop = first + 1 + len(draft.tokens)
        own = choices[first:stop]
        if row.request.sampling.method == "greedy" and row.request.rules is None:
            verdict = _follow_choices(own, draft)
            if verdict.next_token < 0:
                verdict.error = _NOT_FINITE
        else:
            assert scores.logits is not None
            rule_errors: dict[int, BaseException] = {}
            answer = _judge_one(row, draft, scores.logits[first:stop], own, rule_errors)
            if isinstance(answer, Verdict):
                verdict = answer
                _check_next_token(verdict, own, rule_errors)
            else:
                verdict = Verdict([], 0)
                pending[i] = _Pending(answer, own, rule_errors)
        verdicts.append(verdict)
        first = stop
    if pending:
        # one copy from the device for all sampled rows
        flat: list[int] = torch.cat([one.answer for one in pending.values()]).tolist()
        for i, one in pending.items():
            size = len(one.answer)
            verdicts[i] = _read_answer(flat[:size], drafts[i])
            _check_next_token(verdicts[i], one.own, one.rule_errors)
            flat = flat[size:]
    return verdicts


@dataclass(slots=True)
class _Pending:
    """A verdict that is still on the device."""

    answer: Tensor
    own: list[int]  # the target's most likely token at each place
    rule_errors: dict[int, BaseException]  # of its logit rules, by place


def _matching_nothing(choices: Sequence[int]) -> list[int]:
    """Replace negative choices by a value that equals no drafted token."""
    return [token if token >= 0 else _NO_TOKEN for token in choices]


def _check_next_token(
    verdict: Verdict, own: Sequence[int], rule_errors: Mapping[int, BaseException]
) -> None:
    """Set the verdict's error if its accepted path ends at a place without a possible token."""
    if verdict.next_token >= 0:
        return
    place = verdict.path[-1] + 1 if verdict.path else 0
    if own[place] < 0:
        verdict.error = _NOT_FINITE
    elif place in rule_errors:
        verdict.error, verdict.cause = "logit rules", rule_errors[place]
    else:
        verdict.error = _NO_TOKEN_LEFT


def _follow_choices(choices: Choices, draft: DraftView) -> Verdict:
    path = follow(choices, draft.tokens, draft.parents)
    return Verdict(path, choices[path[-1] + 1 if path else 0])


def _read_answer(answer: Sequence[int], draft: DraftView) -> Verdict:
    """Return the verdict of an answer of `_judge_one` that was copied from the device."""
    if draft.probs is None:
        return _follow_choices(_matching_nothing(answer), draft)
    num_accepted, next_token = answer
    return Verdict(list(range(num_accepted)), next_token)


def _judge_one(
    row: RowText,
    draft: DraftView,
    logits: Tensor,
    own: Sequence[int],
    rule_errors: dict[int, BaseException],
) -> Verdict | Tensor:
    """Judge a row that is sampled or has rules. logits: [k+1, V]. rule_errors: filled by place.

    Return the verdict on the CPU. On other devices return a tensor that `_read_answer` reads: the
    target's token at every place [k+1], or for a draft with probabilities the number of accepted tokens
    and the token after them [2]. A token of -1 means that none is possible.
    """
    rules = row.request.rules
    if rules is not None:
        logits = _apply_rules(row, draft, logits, own, rule_errors)
    params, start = row.request.sampling, len(row.tokens)
    if params.method == "greedy":
        best, ids = logits.max(dim=-1)
        return torch.where(best.isfinite(), ids, -1)
    if draft.probs is not None:
        finite = rules is None and min(own) >= 0
        return _judge_chain(logits, draft.tokens, draft.probs, params, start, finite)
    if logits.device.type == "cpu":
        return _follow_choices(_DrawsOnDemand(logits, params, start), draft)
    return _draw_at_every_place(logits, draft, params, start)


def _judge_chain(
    logits: Tensor,
    draft_tokens: Sequence[int],
    probs: Tensor,
    params: SamplingParams,
    start: int,
    finite: bool,
) -> Verdict | Tensor:
    """Judge a stochastic chain; return as `_judge_one`. logits: [k+1, V]. probs: [k, V].

    start: tokens of the row. finite: whether all logits are known to be finite.
    """
    p = warp(logits, params)
    k = len(draft_tokens)
    # one copy to the device
    numbers = torch.tensor(
        [params.seed, k, *range(start, start + k), *draft_tokens], device=p.device
    )
    seed, length, positions, tokens = numbers[0], numbers[1:2], numbers[2 : k + 2], numbers[k + 2 :]
    if not finite:
        # a softmax over a nan or inf is nan throughout; the draft is cut there
        length = (~p[:k, 0].isnan()).to(torch.int64).cumprod(dim=0).sum(dim=0, keepdim=True)
    block = params.method == "block"
    u = noise.uniform(seed, noise.of_round(positions, start) if block else positions, noise.ACCEPT)
    accepted = (accept_block if block else accept_residual)(
        p[None], probs.to(p.device)[None], tokens[None], length, u[None]
    )
    if logits.device.type == "cpu":
        count = int(accepted.num_accepted)
        token = noise.draw(accepted.next_weights[0], params.seed, start + count, noise.TARGET)
        return Verdict(list(range(count)), token)
    e = noise.exponential(seed, start + accepted.num_accepted, noise.TARGET, p.shape[-1])
    return torch.cat([accepted.num_accepted, noise.race(accepted.next_weights, e)])


def _apply_rules(
    row: RowText,
    draft: DraftView,
    logits: Tensor,
    own: Sequence[int],
    rule_errors: dict[int, BaseException],
) -> Tensor:
    """Return the logits [k+1, V] after the row's rules; nan at a place where the rules fail.

    Each place is computed alone, so a processor that fails on a drafted text fails that place only.
    """
    request, (before, num_prompt) = row.request, row.text
    assert request.rules is not None
    ruled = torch.full(logits.shape, float("nan"), device=logits.device)
    for place, text in enumerate(_texts_before(before, draft, logits.shape[-1])):
        if own[place] < 0:
            continue
        try:
            one = logits[place : place + 1]
            ruled[place] = apply_rules(
                request.rules, one, [text], num_prompt, request.stop_token_ids
            )[0]
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's own processor
            rule_errors[place] = error
    return ruled


def _texts_before(tokens: list[int], draft: DraftView, num_logits: int) -> list[list[int]]:
    """Return the text before each place: a row's, then with the path to each draft token, as fed."""
    texts = [tokens]
    for k, token in enumerate(draft.tokens):
        before = k if draft.parents is None else draft.parents[k] + 1
        texts.append([*texts[before], min(max(token, 0), num_logits - 1)])
    return texts


@dataclass(slots=True)
class _DrawsOnDemand:
    """The target's draws by place, made when asked for along one path from the root."""

    logits: Tensor  # [k+1, V]
    params: SamplingParams
    start: int  # tokens of the row
    drawn: dict[int, int] = field(default_factory=dict)

    def __getitem__(self, place: int) -> int:
        if place not in self.drawn:
            p = warp(self.logits[place], self.params)
            position = self.start + len(self.drawn)
            token = noise.draw(p, self.params.seed, position, noise.TARGET)
            self.drawn[place] = token if token >= 0 else _NO_TOKEN
        return self.drawn[place]


def _draw_at_every_place(
    logits: Tensor, draft: DraftView, params: SamplingParams, start: int
) -> Tensor:
    """Return the target's token at every place of a draft [k+1], since each read would be a copy."""
    levels = range(len(draft.tokens)) if draft.parents is None else depths(draft.parents)
    positions = [start, *(start + 1 + level for level in levels)]
    numbers = torch.tensor([params.seed, *positions], device=logits.device)
    e = noise.exponential(numbers[0], numbers[1:], noise.TARGET, logits.shape[-1])
    return noise.race(warp(logits, params), e)


# --- drafts judged by equality: chains without probabilities, and all trees ------------------------


def follow(
    choices: Choices, tokens: Sequence[int], parents: Sequence[int] | None = None
) -> list[int]:
    """Return the indices of the accepted draft tokens, from the root down.

    choices: the target's token after the row's last token, then after each draft token. tokens: the
    draft. parents: the index of the token that each one follows, -1 for the row's last token; None for
    a chain. Of equal siblings, the first is followed.
    """
    path: list[int] = []
    if parents is None:
        for index, token in enumerate(tokens):
            if token != choices[index]:
                break
            path.append(index)
        return path
    # a token comes after the one that it follows, so one pass meets the whole path
    at, wanted = -1, choices[0]
    for index, parent in enumerate(parents):
        if parent == at and tokens[index] == wanted:
            path.append(index)
            at, wanted = index, choices[index + 1]
    return path


def depths(parents: Sequence[int]) -> list[int]:
    """Return each draft token's number of ancestors in the draft."""
    levels: list[int] = []
    for parent in parents:
        levels.append(0 if parent < 0 else levels[parent] + 1)
    return levels
