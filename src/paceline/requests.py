"""The strict schema of a request, for `Pace.request` and for records made by hand.

Scalars and arrays of numpy and torch are accepted if they are exact: whole numbers of an integer type,
one-dimensional arrays of ids. A bool is not a number and 2.0 is not a whole number. Every refusal is a
RequestError that names the setting. Knows no target: the engine checks what depends on one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
import torch
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
    LogitsProcessor,
    PenaltyScope,
    Request,
    SamplingParams,
)
from paceline.errors import RequestError, shorten

T = TypeVar("T")

_MIN_TEMPERATURE: Final = 1e-8  # below it, logits divided by the temperature exceed float32
_MAX_TEMPERATURE: Final = 1e6
_MAX_FLOAT32: Final = 3.4e38


# --- values ---------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return a scalar of numpy or torch as Python's, anything else unchanged."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0:
        try:
            return value.item()
        except Exception:  # noqa: BLE001 - a tensor without values, or of a kind that lacks them
            return value
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """Return token ids from a sequence, a set or a one-dimensional array of whole numbers.

    Raises ValueError that shows any other value.
    """
    return _readable(_token_ids, value)


def _readable(read: Callable[[Any], T], value: Any) -> T:
    """What `read` makes of a value; ValueError where that cannot even be looked through."""
    try:
        return read(value)
    except ValueError:
        raise
    except Exception as error:  # a caller's own object, a tensor of a kind that holds no list
        raise ValueError(f"got {shorten(value)}") from error


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _ids_of_array(value)
    if not isinstance(value, (Sequence, AbstractSet)) or isinstance(value, _BYTES_OR_TEXT):
        raise ValueError(f"got {shorten(value)}")
    if set(map(type, value)) <= {int}:
        return tuple(value)
    ids = tuple(map(_plain, value))
    wrong = [given for given, id in zip(value, ids, strict=True) if not _is_whole(id)]
    if wrong:
        raise ValueError(f"got {shorten(wrong[0])}")
    return tuple(map(int, ids))


_BYTES_OR_TEXT: Final = (str, bytes, bytearray, memoryview)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids_of_array(array: np.ndarray | torch.Tensor) -> tuple[int, ...]:
    shape = list(array.shape)
    if len(shape) != 1:
        raise ValueError(f"got an array of shape {shape}")
    if isinstance(array, torch.Tensor):
        whole = not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
        whole = whole and not (array.is_meta or array.is_quantized)
    else:
        whole = np.issubdtype(array.dtype, np.integer)
    if not whole:
        raise ValueError(f"got an array of {array.dtype}")
    ids = tuple(array.tolist())
    if not set(map(type, ids)) <= {int}:  # masked numbers, spans of time
        raise ValueError(f"got {shorten(array)}")
    return ids


def _id_set(value: Any) -> frozenset[int]:
    return frozenset(token_ids(value))


def _strings(value: Any) -> tuple[str, ...]:
    """Return stop strings from one or several."""
    return _readable(_read_strings, value)


def _read_strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, (Sequence, AbstractSet)) or isinstance(value, _BYTES_OR_TEXT):
        raise ValueError(f"got {shorten(value)}")
    for one in value:
        if not isinstance(one, str) or not _is_text(one):
            raise ValueError(f"got {shorten(one)}")
    if not all(value):
        raise ValueError("a stop string is empty")
    return tuple(map(str, value))


def _is_text(text: str) -> bool:
    """Return whether a string can be encoded, so has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _biases(value: Any) -> dict[int, float]:
    return _readable(_read_biases, value)


def _read_biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"got {shorten(value)}")
    biases: dict[int, float] = {}
    for key, given in value.items():
        id, bias = _plain(key), _plain(given)
        if not _is_whole(id):
            raise ValueError(f"got the id {shorten(key)}")
        is_number = isinstance(bias, float) or _is_whole(bias)
        if not is_number or not (bias == -np.inf or abs(bias) <= _MAX_FLOAT32):
            raise ValueError(f"got {shorten(given)} for the id {shorten(id)}")
        biases[int(id)] = float(bias)
    return biases


def _processors(value: Any) -> tuple[LogitsProcessor, ...]:
    return _readable(_read_processors, value)


def _read_processors(value: Any) -> tuple[LogitsProcessor, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"got {shorten(value)}")
    for one in value:
        if not callable(one):
            raise ValueError(f"got {shorten(one)}")
    return tuple(value)


def _temperature(value: float) -> float:
    if value != 0.0 and not _MIN_TEMPERATURE <= value <= _MAX_TEMPERATURE:
        raise ValueError(f"got {value}")
    return value


def _fold_seed(value: Any) -> int | None:
    """Return the last 64 bits of a seed as a signed integer; small seeds are unchanged."""
    value = _plain(value)
    if value is None:
        return None
    if not _is_whole(value):
        raise ValueError(f"got {shorten(value)}")
    return int((value + 2**63) % 2**64 - 2**63)


_Whole = Annotated[int, BeforeValidator(_plain)]
_Number = Annotated[float, BeforeValidator(_plain), Field(allow_inf_nan=False)]
_Switch = Annotated[bool, BeforeValidator(_plain)]
_Ids = Annotated[tuple[int, ...], PlainValidator(token_ids)]
_IdSet = Annotated[frozenset[int], PlainValidator(_id_set)]


# --- settings -------------------------------------------------------------------------------------


class RequestSettings(BaseModel):
    """The settings of a request in addition to its prompt. A default has no effect.

    sampling: how a stochastic draft is judged; auto is `invariant` with a seed, `residual` without one,
    and greedy at temperature 0. stop_token_ids: ids that end the answer in addition to the model's
    own, which `ignore_eos` omits. The settings from logit_bias on are the fields of `LogitRules`. A
    field's description says what its value must be, as messages quote it.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    max_new_tokens: _Whole = Field(
        default=DEFAULT_NEW_TOKENS, ge=1, description="a whole number, at least 1"
    )
    temperature: Annotated[_Number, AfterValidator(_temperature)] = Field(
        default=0.0,
        description=f"0 (greedy) or a number from {_MIN_TEMPERATURE:g} to {_MAX_TEMPERATURE:g}",
    )
    top_k: _Whole = Field(default=0, ge=0, description="a whole number, 0 (off) or more")
    top_p: _Number = Field(default=1.0, gt=0, le=1, description="a number in (0, 1]")
    min_p: _Number = Field(default=0.0, ge=0, lt=1, description="a number in [0, 1)")
    seed: Annotated[int | None, PlainValidator(_fold_seed)] = Field(
        default=None, description="a whole number, or None for one drawn at random"
    )
    sampling: Literal["auto", "greedy", "residual", "block", "invariant"] = Field(
        default="auto", description="auto, greedy, residual, block or invariant"
    )
    stop: Annotated[tuple[str, ...], PlainValidator(_strings)] = Field(
        default=(), description="a string or a list of strings, none of them empty"
    )
    ignore_eos: _Switch = Field(default=False, description="True or False")
    stop_token_ids: _IdSet = Field(
        default=frozenset(), description="a collection of token ids, whole numbers"
    )
    drafter: str = Field(default=AUTO, description="the name of a drafter, a string")
    logprobs: _Switch = Field(default=False, description="True or False")

    logit_bias: Annotated[dict[int, float], PlainValidator(_biases)] = Field(
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
    processors: Annotated[tuple[Callable[..., Any], ...], PlainValidator(_processors)] = Field(
        default=(), description="a list of functions (input_ids, scores) -> scores"
    )

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> RequestSettings:
        """Validate each setting by itself; raise the first mistake as a RequestError."""
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise RequestError(_explain(error)) from error

    def _check_agreement(self) -> None:
        """Raise RequestError if valid settings contradict one another."""
        if self.temperature == 0.0:
            filters = {"top_k": self.top_k != 0, "top_p": self.top_p != 1.0}
            filters["min_p"] = self.min_p != 0.0
            given = [name for name, is_set in filters.items() if is_set]
            if given:
                raise RequestError(
                    f"{', '.join(given)} given with temperature 0, where the most likely token is "
                    "always taken; set a temperature above 0 or drop it"
                )
            if self.sampling not in ("auto", "greedy"):
                raise RequestError(
                    f"sampling method '{self.sampling}' given with temperature 0; "
                    "set a temperature above 0 or leave the method out"
                )
        elif self.sampling == "greedy":
            raise RequestError(
                f"sampling method 'greedy' needs temperature 0, not {self.temperature:g}; drop one"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens {shorten(self.min_new_tokens)} is above max_new_tokens "
                f"{shorten(self.max_new_tokens)}; lower it or raise the other"
            )

    def given(self) -> dict[str, Any]:
        """Return the settings that were set, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def sampling_params(self) -> SamplingParams:
        """Return the sampling parameters. Raises RequestError as `request` does."""
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
        given = self.model_fields_set.intersection(_RULES)
        if not given:
            return None
        rules = LogitRules(**{name: getattr(self, name) for name in given})
        return None if rules == _NO_RULES else rules

    def request(
        self, prompt_tokens: tuple[int, ...], id: str, eos: AbstractSet[int] = frozenset()
    ) -> Request:
        """Return the record of a prompt with these settings. eos: the model's own end tokens.

        Raises RequestError if settings contradict one another.
        """
        stops = self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos
        return Request(
            id=_check_id(id),
            prompt_tokens=prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling_params(),
            stop_token_ids=stops,
            stop_strings=self.stop,
            drafter=self.drafter,
            rules=self.logit_rules(),
            logprobs=self.logprobs,
        )


_RULES: Final = tuple(field.name for field in fields(LogitRules))
_NO_RULES: Final = LogitRules()
SETTINGS: Final = tuple(RequestSettings.model_fields)


def _explain(error: ValidationError) -> str:
    """Return the first mistake that pydantic found, in one line."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return f"generation setting '{location[0]}' is not supported; there are: " + ", ".join(
            SETTINGS
        )
    own = str(first["ctx"]["error"]) if first["type"] == "value_error" else None
    allowed = RequestSettings.model_fields[location[0]].description
    return f"{location[0]} must be {allowed}; {own or 'got ' + shorten(first['input'])}"


def _check_id(id: object) -> str:
    if not isinstance(id, str):
        raise RequestError(f"id must be a string; got {shorten(id)}")
    return id


# --- prompts --------------------------------------------------------------------------------------

_PROMPTS: Final = "a string, token ids, one message or a list of messages"


def read_prompt(prompt: Any) -> str | tuple[int, ...] | list[dict[str, Any]]:
    """Return a prompt as text, token ids or messages. Raises RequestError for anything else."""
    if isinstance(prompt, str):
        if not _is_text(prompt):
            raise RequestError(
                f"prompt holds a lone surrogate, which cannot be encoded: {shorten(prompt)}; "
                "decode it with errors='replace'"
            )
        return prompt
    if isinstance(prompt, Mapping):
        return [_message(prompt)]
    first = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else None
    if isinstance(first, Mapping):
        return [_message(message) for message in prompt]
    if isinstance(first, str):
        raise RequestError(
            f"prompt must be {_PROMPTS}; got a list of strings (`generate` takes several prompts)"
        )
    if isinstance(prompt, AbstractSet):  # it has no order
        raise RequestError(f"prompt must be {_PROMPTS}; got {shorten(prompt)}")
    return prompt_ids(prompt)


def prompt_ids(prompt: Any) -> tuple[int, ...]:
    """Return a prompt of token ids. Raises RequestError for anything else."""
    try:
        return token_ids(prompt)
    except ValueError as error:
        raise RequestError(
            f"prompt must be {_PROMPTS}, ids as whole numbers in one dimension; {error}"
        ) from error


def _message(message: Any) -> dict[str, Any]:
    """Return a chat message after checking role and content; other keys are for the template."""
    try:
        message = dict(message) if isinstance(message, Mapping) else message
    except Exception:  # noqa: BLE001 - a caller's own mapping, refused below
        message = shorten(message)
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise RequestError(
            f"a message must be a mapping such as {{'role': 'user', 'content': 'Hello'}}; got "
            f"{shorten(message)}"
        )
    if not isinstance(message.get("role"), str):
        raise RequestError(
            f"a message needs 'role', a string such as 'user'; got {shorten(message)}"
        )
    content = message.get("content")
    calls_tools = content is None and bool(message.get("tool_calls"))
    if not (isinstance(content, (str, list)) or calls_tools):
        raise RequestError(
            f"a message needs 'content', a string or a list of parts; got {shorten(message)}"
        )
    if isinstance(content, str) and not _is_text(content):
        raise RequestError(
            f"a message holds a lone surrogate, which cannot be encoded: {shorten(content)}; decode it "
            "with errors='replace'"
        )
    return message


# --- records made by hand -------------------------------------------------------------------------


def read_request(request: Request) -> Request:
    """Validate a record made by hand; return it as the schema makes it. Raises RequestError."""
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
        settings |= {name: getattr(rules, name) for name in _RULES}
    read = RequestSettings.read(settings).request(prompt_ids(request.prompt_tokens), request.id)
    return replace(read, sampling=GREEDY) if sampling is GREEDY else read


def check_sampling(sampling: SamplingParams) -> SamplingParams:
    """Validate sampling parameters made by hand; return them as the schema makes them."""
    return RequestSettings.read(_sampling_settings(sampling)).sampling_params()


def _sampling_settings(sampling: SamplingParams) -> dict[str, Any]:
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling must be `SamplingParams`; got {shorten(sampling)}")
    values = {field.name: getattr(sampling, field.name) for field in fields(SamplingParams)}
    if values["seed"] is None:  # a record must be reproducible; only the setting may be None
        raise RequestError("seed must be a whole number; got None")
    values["sampling"] = values.pop("method")
    return values
