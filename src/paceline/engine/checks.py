"""Checks of a request against one target and its drafters, and of an arm, before any work on it.

`paceline.requests` checks the rules that hold for every target.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

from paceline.contracts import AT, AUTO, split_arm
from paceline.drafting.contract import blaming, read_length
from paceline.errors import DrafterError, RequestError, shorten

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from paceline.contracts import Request
    from paceline.drafting.base import Drafter
    from paceline.errors import PacelineError
    from paceline.models.language_model import LanguageModel


def check_request(
    request: Request,
    target: LanguageModel,
    drafters: Mapping[str, Drafter],
    max_positions: int | None = None,
) -> None:
    """Raise RequestError if a request that fits the schema cannot be served here.

    max_positions: the maximum number of positions of the target's cache.
    """
    num_prompt = len(request.prompt_tokens)
    if num_prompt == 0:
        raise RequestError("the prompt is empty; give at least one token")
    if num_prompt > target.max_prompt:
        holder = "encoder reads" if target.reads_prompt_as_source else "context holds"
        raise RequestError(
            f"the prompt has {num_prompt} tokens, the target's {holder} {target.max_prompt}"
            f"{_cut(target)}; shorten the prompt"
        )
    _check_features(request, target)
    _check_ids("the prompt has", request.prompt_tokens, target.num_logits)
    _check_ids("stop_token_ids names", request.stop_token_ids, target.num_logits)
    if request.rules is not None:
        for name in ("logit_bias", "suppress_tokens", "forced_tokens"):
            _check_ids(f"{name} names", getattr(request.rules, name), target.num_logits)
    total = max_total(request, target)
    if target.context_note is not None and total < num_prompt + request.max_new_tokens:
        warnings.warn(
            f"the answer may end early, after {total - num_prompt} of max_new_tokens = "
            f"{shorten(request.max_new_tokens)} tokens{_cut(target)}",
            stacklevel=2,
        )
    needed = target.cache.rounded(num_positions(request, target, drafters))
    if max_positions is not None and needed > max_positions:
        raise RequestError(
            f"the request may need {needed} positions, the engine's cache holds {max_positions}; "
            "lower max_new_tokens or raise engine.max_positions"
        )
    if request.drafter != AUTO:
        check_arm(request.drafter, drafters, RequestError)


def _check_features(request: Request, target: LanguageModel) -> None:
    wanted = None if target.encoder is None else target.encoder.feature_shape
    given = None if request.features is None else tuple(request.features.shape)
    if given is not None and wanted is None:
        raise RequestError("the target reads tokens, not features of audio; remove features")
    if given != wanted:
        assert wanted is not None
        raise RequestError(
            f"the target's encoder reads features of the shape {list(wanted)}, bins and frames; got "
            f"{'none' if given is None else list(given)}; give features="
        )


def _cut(target: LanguageModel) -> str:
    """Return the reason, in parentheses, if the context is shorter than the model's own."""
    return f" ({target.context_note})" if target.context_note else ""


def _check_ids(what: str, ids: Collection[int], num_logits: int) -> None:
    if ids and (min(ids) < 0 or max(ids) >= num_logits):
        unknown = next(t for t in ids if not 0 <= t < num_logits)
        raise RequestError(
            f"{what} the token id {shorten(unknown)}; the target's ids are 0 to {num_logits - 1}"
        )


def check_arm(arm: str, drafters: Mapping[str, Drafter], error: type[PacelineError]) -> None:
    """Raise the error unless the arm's drafter is loaded and can draft at the arm's length."""
    try:
        name, length = split_arm(arm)
    except ValueError as wrong:
        raise error(str(wrong)) from wrong
    drafter = drafters.get(name)
    if drafter is None:
        raise error(f"unknown drafter '{name}'; there are: auto, {', '.join(drafters)}")
    if length is None:
        return
    try:
        with blaming(name):
            longest = read_length(drafter)
    except DrafterError as broken:
        raise error(str(broken)) from broken
    if not 1 <= length <= longest:
        raise error(
            f"'{arm}': drafter '{name}' drafts up to {longest} tokens; ask for fewer, or configure it "
            "with more"
        )


_MAX_DRAFT_POSITIONS: Final = 1024
"""Maximum number of positions for a draft in addition to the row's own."""


def num_positions(request: Request, target: LanguageModel, drafters: Mapping[str, Drafter]) -> int:
    """Return the maximum number of cache positions of a request, those of a draft included.

    Any drafter may draft for a request with drafter `auto`, only the named one for another.
    """
    name = request.drafter.partition(AT)[0]
    others = [drafters[name]] if name in drafters else drafters.values()
    return max_total(request, target) + max(map(_draft_positions, others), default=0)


def fits(
    requests: Sequence[Request],
    target: LanguageModel,
    drafters: Mapping[str, Drafter],
    max_positions: int | None,
) -> bool:
    """Return whether the target's cache has room for one more row, with all requests at their longest.

    requests: those in flight and the new one.
    """
    if max_positions is None or len(requests) == 1:
        return True  # `check_request` has compared one row alone with the bound
    cache = target.cache
    longest = max(num_positions(r, target, drafters) for r in requests)
    return cache.num_slots_with_one_more * cache.rounded(longest) <= max_positions


def _draft_positions(drafter: Drafter) -> int:
    """Return the positions that a draft needs after the row's last token, one per node."""
    try:
        return min(max(drafter.num_draft_tokens, 0), _MAX_DRAFT_POSITIONS)
    except Exception:  # noqa: BLE001 - a broken drafter fails where it is used
        return _MAX_DRAFT_POSITIONS


def max_total(request: Request, target: LanguageModel) -> int:
    """Return the maximum number of tokens of a request, prompt and output together."""
    num_prompt = len(request.prompt_tokens)
    # the last emitted token is never fed, so it needs no position
    room = target.context_length + 1 - target.num_before_output(num_prompt)
    return num_prompt + min(request.max_new_tokens, room)
