"""What a request must be to be served, and an arm to be used: checked before anything is begun."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from paceline.contracts import AUTO, split_arm
from paceline.drafting.contract import blaming, read_length
from paceline.errors import DrafterError, RequestError
from paceline.logit_rules import check_rules
from paceline.warping import check_sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    """Raise RequestError if it cannot be served. max_positions: what the target's cache may hold."""
    num_prompt, context = len(request.prompt_tokens), target.context_length
    if num_prompt == 0:
        raise RequestError("the prompt is empty; give at least one token")
    if num_prompt > context:
        raise RequestError(
            f"the prompt has {num_prompt} tokens, the target's context holds {context}"
            f"{_cut(target)}; shorten the prompt"
        )
    unknown = [t for t in request.prompt_tokens if not 0 <= t < target.num_logits]
    if unknown:
        raise RequestError(
            f"the prompt has the token id {unknown[0]}; the target's ids are 0 to "
            f"{target.num_logits - 1}"
        )
    if request.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
    needed = max_total(request, context)
    if target.context_note is not None and needed < num_prompt + request.max_new_tokens:
        warnings.warn(
            f"the answer may end early, after {needed - num_prompt} of max_new_tokens = "
            f"{request.max_new_tokens} tokens{_cut(target)}",
            stacklevel=2,
        )
    if max_positions is not None and needed > max_positions:
        raise RequestError(
            f"the request may need {needed} positions, the engine's cache holds {max_positions}; "
            "lower max_new_tokens or raise engine.max_positions"
        )
    if any(not s for s in request.stop_strings):
        raise RequestError("a stop string is empty")
    check_sampling(request.sampling)
    if request.rules is not None:
        check_rules(request.rules, target.num_logits, request.max_new_tokens)
    if request.drafter != AUTO:
        check_arm(request.drafter, drafters, RequestError)


def _cut(target: LanguageModel) -> str:
    """Why the context is shorter than the model's own, in parentheses; empty where it is not."""
    return f" ({target.context_note})" if target.context_note else ""


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


def max_total(request: Request, context_length: int) -> int:
    """The most tokens the request may come to hold, prompt and output."""
    # the last emitted token is never fed, so it needs no position
    room = context_length + 1 - len(request.prompt_tokens)
    return len(request.prompt_tokens) + min(request.max_new_tokens, room)
