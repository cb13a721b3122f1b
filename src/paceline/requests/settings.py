"""The settings of a request: their types, bounds and defaults, and the record they make.

A record made by hand passes the same schema as the settings of a call.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from paceline.contracts import (
    AUTO,
    DEFAULT_NEW_TOKENS,
    GREEDY,
    LogitRules,
    PenaltyScope,
    Request,
    SamplingParams,
)
from paceline.errors import RequestError, shorten, suggest_name
from paceline.requests import values

_Whole = Annotated[int, BeforeValidator(values.plain)]
_Number = Annotated[float, BeforeValidator(values.plain), Field(allow_inf_nan=False)]
_Switch = Annotated[bool, BeforeValidator(values.plain)]
_Ids = Annotated[tuple[int, ...], PlainValidator(values.token_ids)]
_IdSet = Annotated[frozenset[int], PlainValidator(values.id_set)]


class RequestSettings(BaseModel):
    """The settings of a request in addition to its prompt. A default has no effect.

    sampling: how a stochastic draft is judged; `auto` is `invariant` with a seed, `residual` without
    one, and `greedy` at temperature 0. stop_token_ids: ids that end the answer in addition to the
    model's own; `ignore_eos` leaves out the model's own. The settings from `logit_bias` on are the
    fields of `LogitRules`. Messages quote a field's description as the allowed values.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    max_new_tokens: _Whole = Field(
        default=DEFAULT_NEW_TOKENS, ge=1, description="a whole number, at least 1"
    )
    temperature: Annotated[_Number, AfterValidator(values.temperature)] = Field(
        default=0.0,
        description="0 (greedy) or a number from "
        f"{values.MIN_TEMPERATURE:g} to {values.MAX_TEMPERATURE:g}",
    )
    top_k: _Whole = Field(default=0, ge=0, description="a whole number, 0 (off) or more")
    top_p: _Number = Field(default=1.0, gt=0, le=1, description="a number in (0, 1]")
    min_p: _Number = Field(default=0.0, ge=0, lt=1, description="a number in [0, 1)")
    seed: Annotated[int | None, PlainValidator(values.seed)] = Field(
        default=None, description="a whole number, or None for one drawn at random"
    )
    sampling: Literal["auto", "greedy", "residual", "block", "invariant"] = Field(
        default="auto", description="auto, greedy, residual, block or invariant"
    )
    stop: Annotated[tuple[str, ...], PlainValidator(values.strings)] = Field(
        default=(), description="a string or a list of strings, none of them empty"
    )
    ignore_eos: _Switch = Field(default=False, description="True or False")
    stop_token_ids: _IdSet = Field(
        default=frozenset(), description="a collection of token ids, whole numbers"
    )
    drafter: str = Field(default=AUTO, description="the name of a drafter, a string")
    logprobs: _Switch = Field(default=False, description="True or False")

    logit_bias: Annotated[dict[int, float], PlainValidator(values.biases)] = Field(
        default_factory=dict,
        description="a mapping from token ids to numbers, finite or -inf (a ban)",
    )
    repetition_penalty: _Number = Field(
        default=1.0, ge=1e-3, le=1e3, description="a number from 0.001 to 1000, 1 (off)"
    )
    repetition_scope: PenaltyScope = Field(default="all", description="all or output")
    presence_penalty: _Number = Field(
        default=0.0, ge=-1e6, le=1e6, description="a number from -1e6 to 1e6, 0 (off)"
    )
    frequency_penalty: _Number = Field(
        default=0.0, ge=-1e6, le=1e6, description="a number from -1e6 to 1e6, 0 (off)"
    )
    presence_scope: PenaltyScope = Field(default="output", description="all or output")
    no_repeat_ngram_size: _Whole = Field(
        default=0, ge=0, description="a whole number, 0 (off) or more"
    )
    min_new_tokens: _Whole = Field(default=0, ge=0, description="a whole number, 0 (off) or more")
    suppress_tokens: _IdSet = Field(
        default=frozenset(), description="a collection of token ids, whole numbers"
    )
    forced_tokens: _Ids = Field(default=(), description="a sequence of token ids, whole numbers")
    processors: Annotated[
        tuple[Callable[..., Any], ...], PlainValidator(values.logits_processors)
    ] = Field(default=(), description="a list of functions (input_ids, scores) -> scores")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> RequestSettings:
        """Return settings that are valid one by one. Raises RequestError for the first mistake."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise RequestError(_explain(error)) from error

    def _check_agreement(self) -> None:
        if self.temperature == 0.0:
            filters = {"top_k": self.top_k != 0, "top_p": self.top_p != 1.0}
            filters["min_p"] = self.min_p != 0.0
            given = [name for name, is_set in filters.items() if is_set]
            if given:
                raise RequestError(
                    f"{', '.join(given)} given with temperature 0, where the most likely token is "
                    "always taken; set a temperature above 0 or remove them"
                )
            if self.sampling not in ("auto", "greedy"):
                raise RequestError(
                    f"sampling method '{self.sampling}' given with temperature 0; "
                    "set a temperature above 0 or remove the method"
                )
        elif self.sampling == "greedy":
            raise RequestError(
                f"sampling method 'greedy' needs temperature 0, not {self.temperature:g}; remove one"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens {shorten(self.min_new_tokens)} is above max_new_tokens "
                f"{shorten(self.max_new_tokens)}; lower min_new_tokens or raise max_new_tokens"
            )

    def given(self) -> dict[str, Any]:
        """Return the values of the settings that were set, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def sampling_params(self) -> SamplingParams:
        """Return the sampling parameters. Raises RequestError if settings contradict each other."""
        self._check_agreement()
        method = self.sampling
        if method == "auto":
            method = "residual" if self.seed is None else "invariant"
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            method="greedy" if self.temperature == 0.0 else method,
        )

    def logit_rules(self) -> LogitRules | None:
        """Return the logit rules that were set, or None if they change nothing."""
        given = self.model_fields_set.intersection(RULES)
        if not given:
            return None
        rules = LogitRules(**{name: getattr(self, name) for name in given})
        return None if rules == _NO_RULES else rules

    def request(
        self,
        prompt_tokens: tuple[int, ...],
        id: str,
        eos: AbstractSet[int] = frozenset(),
        features: Any = None,
    ) -> Request:
        """Return the request of a prompt with these settings. eos: the model's own end tokens.

        features: of audio, as in `Request`.

        Raises RequestError if settings contradict each other.
        """
        if not isinstance(id, str):
            raise RequestError(f"id must be a string; got {shorten(id)}")
        stops = self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos
        return Request(
            id=id,
            prompt_tokens=prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling_params(),
            stop_token_ids=stops,
            stop_strings=self.stop,
            drafter=self.drafter,
            rules=self.logit_rules(),
            logprobs=self.logprobs,
            features=values.features(features),
        )


RULES: Final = tuple(field.name for field in fields(LogitRules))
_NO_RULES: Final = LogitRules()
SETTINGS: Final = tuple(RequestSettings.model_fields)


def _explain(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"generation setting '{name}' is not supported{suggest_name(name, SETTINGS)}"
    own = str(first["ctx"]["error"]) if first["type"] == "value_error" else None
    allowed = RequestSettings.model_fields[name].description
    return f"{name} must be {allowed}; {own or 'got ' + shorten(first['input'])}"


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
    read = RequestSettings.read(settings).request(
        values.prompt_ids(request.prompt_tokens), request.id, features=request.features
    )
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
