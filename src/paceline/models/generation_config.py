"""A model's own generation settings: the defaults of a request, and the settings that are refused.

A plain request takes from the model's `generation_config` what the call does not set; transformers'
`generate` has merged the two already and passes the result. Logits processors stay transformers' objects
in transformers' order, except those for which paceline has a rule or a sampling parameter. Knows no
engine and no request. Symbols: V logits.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    LogitNormalization,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from paceline.contracts import DEFAULT_NEW_TOKENS
from paceline.errors import RequestError, shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from paceline.models.language_model import LanguageModel

    Processor = Callable[[Tensor, Tensor], Tensor]

# Settings that change which tokens are chosen and that paceline does not support.
OTHER_DECODING: Final = (
    "num_beams",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "guidance_scale",
    "watermarking_config",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)
# unsupported settings that transformers' `generate` honours before it calls paceline
_BEFORE_DECODING: Final = ("num_return_sequences", "token_healing", "max_time")
# values without effect that are not transformers' defaults
_IDLE: Final[Mapping[str, object]] = {
    "guidance_scale": 1,
    "cache_implementation": "dynamic",
}

# settings that have the same name in `Pace.request` and in transformers
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p")
_RULES: Final = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens")
_FLOATS: Final = ("temperature", "top_p", "min_p", "repetition_penalty")
# other settings of a model's configuration that act on the text
_ALSO: Final = (
    "do_sample",
    "max_new_tokens",
    "max_length",
    "min_length",
    "stop_strings",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
    "renormalize_logits",
)
_ACTIVE: Final = (*OTHER_DECODING, *_BEFORE_DECODING, *_SAMPLING, *_RULES, *_ALSO)

# their result depends on more than their arguments
_STATEFUL: Final = (
    ClassifierFreeGuidanceLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)
# paceline's own warping, last to first; the attribute is the sampling parameter's name too
_WARPERS: Final = (
    (MinPLogitsWarper, "min_p"),
    (TopPLogitsWarper, "top_p"),
    (TopKLogitsWarper, "top_k"),
    (TemperatureLogitsWarper, "temperature"),
)
# processors that paceline has a rule for; all but the penalty ban tokens, so their order is free
_OWN: Final[Mapping[type, str]] = {
    RepetitionPenaltyLogitsProcessor: "repetition_penalty",
    NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    SuppressTokensLogitsProcessor: "suppress_tokens",
}


# --- defaults of a request ------------------------------------------------------------------------


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the model's, or the tokenizer's where the model names none.

    transformers' `generate` does not know the tokenizer, and does not stop in the second case.
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is not None:
        return frozenset(_integers("eos_token_id", ids, "correct it there"))
    last: int | None = tokenizer.eos_token_id
    return frozenset() if last is None else frozenset((last,))


def with_defaults(
    target: LanguageModel,
    given: Mapping[str, Any],
    num_prompt: int,
    stop_token_ids: Collection[int],
) -> dict[str, Any]:
    """Return a call's settings in `Pace.request`'s names, completed by the model's own.

    given: settings of the call, each valid by itself. num_prompt: tokens of the prompt. stop_token_ids:
    those of the request. Raises RequestError that names a setting of the model which is not supported.
    transformers' own defaults, such as top_k=50, are not in a model's configuration and are not used.
    """
    model: Any = target.model
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None or all(getattr(config, name, None) is None for name in _ACTIVE):
        return dict(given)
    _check_types(config)
    _refuse_of_model(config)
    asked = _merge(config, given, num_prompt)
    if asked.suppress_tokens and "suppress_tokens" not in given:
        # as transformers, which looks for each id of the vocabulary among these
        asked.suppress_tokens = [t for t in asked.suppress_tokens if 0 <= t < target.num_logits]
        asked.suppress_tokens = asked.suppress_tokens or None
    ends = sorted(stop_token_ids)
    asked._eos_token_tensor = torch.tensor(ends, device=target.device) if ends else None
    if not ends:
        asked.exponential_decay_length_penalty = (
            None  # it raises the end tokens, and there are none
        )
    try:
        processors = list(
            model._get_logits_processor(
                generation_config=asked, input_ids_seq_length=num_prompt, device=target.device
            )
        )
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise unusable(error) from error
    return _in_own_words(asked, given, processors)


_WAY_OUT: Final = "set 'generation_config: none' to ignore it, or correct the model's"


def unusable(error: Exception) -> RequestError:
    """Return the error of a model whose own settings raise `error`."""
    return RequestError(f"the model's generation configuration cannot be used: {error}; {_WAY_OUT}")


class _Computed(BaseModel):
    """The settings that are computed with before transformers looks at them, and their types."""

    model_config = ConfigDict(strict=True, from_attributes=True)

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    stop_strings: str | list[str] | tuple[str, ...] | None = None


def _check_types(config: GenerationConfig) -> None:
    """Raise RequestError for a value of the model's that is of another type than its setting."""
    try:
        _Computed.model_validate(config)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        allowed = "a string or a list" if name == "stop_strings" else "a whole number"
        raise RequestError(
            f"the model's generation configuration sets {name}={shorten(getattr(config, name))}, "
            f"which is not {allowed}; {_WAY_OUT}"
        ) from error


def _merge(config: GenerationConfig, given: Mapping[str, Any], num_prompt: int) -> Any:
    """Return the model's configuration with the call's settings, and neutral values for the rest."""
    asked: Any = copy.copy(config)
    neutral = {**config._get_default_generation_params(), "top_k": 0, "max_length": None}
    for name in (*_SAMPLING, *_RULES, "max_new_tokens"):
        if name in given:
            setattr(asked, name, given[name])
    if "temperature" in given:
        asked.do_sample = True
    for name, value in neutral.items():
        if getattr(asked, name, None) is None:
            setattr(asked, name, value)
    for name in _FLOATS:
        if isinstance(getattr(asked, name), int):  # transformers insists on the type
            setattr(asked, name, float(getattr(asked, name)))
    if asked.temperature == 0:
        asked.do_sample = False
    if "repetition_scope" in given and "repetition_penalty" in given:
        asked.repetition_penalty = 1.0  # left to paceline's rule, since transformers has no scopes
    if asked.forced_bos_token_id is not None and ("forced_tokens" in given or num_prompt > 1):
        asked.forced_bos_token_id = None  # transformers forces it after a prompt of one token only
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        # transformers makes no processor of none
        setattr(asked, name, _integers(name, getattr(asked, name), _WAY_OUT) or None)
    _settle_lengths(asked, given, num_prompt)
    return asked


def _settle_lengths(asked: Any, given: Mapping[str, Any], num_prompt: int) -> None:
    """Set the lengths of the answer from those of prompt and answer together, as transformers does."""
    if asked.max_new_tokens is None and asked.max_length is not None:
        asked.max_new_tokens = asked.max_length - num_prompt
        if asked.max_new_tokens < 1:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and the model's generation configuration sets "
                f"max_length={asked.max_length} for prompt and answer; give max_new_tokens"
            )
    if asked.max_new_tokens is None:
        asked.max_new_tokens = DEFAULT_NEW_TOKENS
    asked.max_length = num_prompt + asked.max_new_tokens
    if asked.min_new_tokens is None:
        asked.min_new_tokens = max(0, asked.min_length - num_prompt)
    if "min_new_tokens" not in given:
        asked.min_new_tokens = min(asked.min_new_tokens, asked.max_new_tokens)
    asked.min_length = 0  # min_new_tokens replaces it


def _in_own_words(
    asked: Any, given: Mapping[str, Any], processors: list[Processor]
) -> dict[str, Any]:
    """Return settings in `Pace.request`'s names from the merged configuration and its processors."""
    settings = {**given, "max_new_tokens": asked.max_new_tokens}
    if asked.do_sample:
        settings = {n: v for n, v in settings.items() if n not in _SAMPLING}
        settings |= take_warpers(processors)
    if asked.stop_strings is not None and "stop" not in given:
        strings = asked.stop_strings
        settings["stop"] = (strings,) if isinstance(strings, str) else tuple(strings)
    if all(type(p) in _OWN for p in processors):
        settings |= {_OWN[type(p)]: getattr(asked, _OWN[type(p)]) for p in processors}
        processors = []
    elif "repetition_scope" not in given:
        settings.pop(
            "repetition_penalty", None
        )  # a processor applies it; bans may be applied twice
    if processors:
        settings["processors"] = (*processors, *given.get("processors", ()))
    return settings


def _refuse_of_model(config: GenerationConfig) -> None:
    for name in (*OTHER_DECODING, *_BEFORE_DECODING):
        if asks(config, name):
            raise RequestError(
                f"the model's generation configuration sets {name}={shorten(getattr(config, name))}, "
                f"which paceline does not support; {_WAY_OUT}"
            )


# --- settings of a merged configuration and its processors ---------------------------------------


def asks(config: GenerationConfig, name: str) -> bool:
    """Return whether a setting has an effect: None, zero, empty and idle values have none."""
    value = getattr(config, name, None)
    idle = _IDLE.get(name, config._get_default_generation_params().get(name))
    return bool(value) and value != idle


def refuse_stateful(processors: Iterable[Processor]) -> None:
    """Raise RequestError if a processor's result depends on more than the text and its scores."""
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise RequestError(
                f"{type(processor).__name__} is not a function of the text and its scores alone, "
                "so a draft cannot be judged with it; drop it"
            )


def take_warpers(processors: list[Processor]) -> dict[str, Any]:
    """Remove the warpers at the end of the list and return them as sampling parameters.

    A warper before an unknown processor stays in the list, to keep transformers' order; the drafter's
    distribution is then warped less than the target's.
    """
    sampling: dict[str, Any] = {"temperature": 1.0}
    if processors and isinstance(processors[-1], LogitNormalization):
        processors.pop()  # probabilities are normalised anyway
    for kind, name in _WARPERS:
        if processors and type(processors[-1]) is kind and _is_plain(processors[-1]):
            sampling[name] = getattr(processors.pop(), name)
    return sampling


def _is_plain(warper: Any) -> bool:
    keep = getattr(warper, "min_tokens_to_keep", 1)
    return keep == 1 and getattr(warper, "filter_value", -torch.inf) == -torch.inf


def _integers(name: str, ids: Any, remedy: str) -> list[int]:
    """Token ids of a setting; none of None. Raises RequestError for anything but whole numbers."""
    try:
        whole = ids if isinstance(ids, torch.Tensor) else torch.as_tensor(_listed(ids))
    except (TypeError, ValueError, RuntimeError):
        whole = torch.empty(1)
    strange = whole.is_floating_point() or whole.is_complex() or whole.dtype == torch.bool
    if strange and whole.numel():
        raise RequestError(
            f"the model's generation configuration sets {name}={shorten(ids)}, which are not token "
            f"ids; {remedy}"
        )
    numbers: list[int] = whole.flatten().tolist()
    return numbers


def _listed(ids: Any) -> Any:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (set, frozenset)) else ids
