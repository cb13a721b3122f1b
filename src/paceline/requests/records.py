"""Records made by hand: each passes the same schema as the settings of a call."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from paceline.contracts import GREEDY, LogitRules, Request, SamplingParams
from paceline.errors import RequestError, shorten
from paceline.requests.prompts import prompt_ids
from paceline.requests.settings import RULES, RequestSettings


def read_request(request: Request) -> Request:
    """Return a request as the schema makes it. Raises RequestError that names a wrong field."""
    if not isinstance(request, Request):
        raise RequestError(f"a request must be a `Request`; got {shorten(request)}")
    sampling, rules = request.sampling, request.rules
    if rules is not None and not isinstance(rules, LogitRules):
        raise RequestError(f"rules must be `LogitRules` or None; got {shorten(rules)}")
    settings: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        **({} if sampling is GREEDY else _sampling_settings(sampling)),
        "stop": request.stop_strings,
        "stop_token_ids": request.stop_token_ids,
        "drafter": request.drafter,
        "logprobs": request.logprobs,
    }
    if rules is not None:
        settings |= {name: getattr(rules, name) for name in RULES}
    read = RequestSettings.read(settings).request(prompt_ids(request.prompt_tokens), request.id)
    return replace(read, sampling=GREEDY) if sampling is GREEDY else read


def check_sampling(sampling: SamplingParams) -> SamplingParams:
    """Return sampling parameters as the schema makes them. Raises RequestError for wrong ones."""
    return RequestSettings.read(_sampling_settings(sampling)).sampling_params()


def _sampling_settings(sampling: SamplingParams) -> dict[str, Any]:
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling must be `SamplingParams`; got {shorten(sampling)}")
    values = {field.name: getattr(sampling, field.name) for field in fields(SamplingParams)}
    if values["seed"] is None:  # a record must be reproducible; only the setting may be None
        raise RequestError("seed must be a whole number; got None")
    values["sampling"] = values.pop("method")
    return values
