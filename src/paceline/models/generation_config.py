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
from transformers.generation import logits_process

from paceline.contracts import DEFAULT_NEW_TOKENS
from paceline.errors import RequestError, shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from paceline.models.language_model import LanguageModel

    Processor = Callable[[Tensor, Tensor], Tensor]

# Settings that change the chosen tokens and that paceline does not support.
OTHER_DECODING: Final = (
    "num_beams", "num_beam_groups", "constraints", "force_words_ids", "penalty_alpha", "dola_layers",
    "guidance_scale", "watermarking_config", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)  # fmt: skip
# settings of beam search
_OF_BEAMS: Final = (
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "length_penalty",
    "early_stopping",
)
# unsupported settings that transformers' `generate` honours before it calls paceline
_BEFORE_DECODING: Final = ("num_return_sequences", "token_healing", "max_time")
# values without effect that are not transformers' defaults
_IDLE: Final[Mapping[str, object]] = {"guidance_scale": 1, "cache_implementation": "dynamic"}

# settings that have the same name in `Pace.request` and in transformers
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p")
_RULES: Final = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens")
_FLOATS: Final = ("temperature", "top_p", "min_p", "repetition_penalty")
# other settings of a model's configuration that change the text
_ALSO: Final = (
    "do_sample", "max_new_tokens", "max_length", "min_length", "stop_strings", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "bad_words_ids", "sequence_bias", "forced_bos_token_id",
    "forced_eos_token_id", "begin_suppress_tokens", "exponential_decay_length_penalty",
    "remove_invalid_values", "renormalize_logits",
)  # fmt: skip
_ACTIVE: Final = (*OTHER_DECODING, *_BEFORE_DECODING, *_SAMPLING, *_RULES, *_ALSO)

# their result depends on more than their arguments
_STATEFUL: Final = (
    logits_process.ClassifierFreeGuidanceLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
)
# paceline's own warping, last to first; the attribute is the sampling parameter's name too
_WARPERS: Final = (
    (logits_process.MinPLogitsWarper, "min_p"),
    (logits_process.TopPLogitsWarper, "top_p"),
    (logits_process.TopKLogitsWarper, "top_k"),
    (logits_process.TemperatureLogitsWarper, "temperature"),
)
# processors that paceline has a rule for; all but the penalty ban tokens, so their order is free
_OWN: Final[Mapping[type, str]] = {
    logits_process.RepetitionPenaltyLogitsProcessor: "repetition_penalty",
    logits_process.NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    logits_process.MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    logits_process.SuppressTokensLogitsProcessor: "suppress_tokens",
}


# --- defaults of a request ------------------------------------------------------------------------


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the model's, or the tokenizer's if the model names none.

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
    no_beams: bool = False,
) -> dict[str, Any]:
    """Return a call's settings in `Pace.request`'s names, completed by the model's own.

    given: settings of the call, each valid by itself. num_prompt: tokens of the prompt. stop_token_ids:
    of the request. no_beams: decode without the model's own beam search. Raises RequestError for a
    setting of the model that is not supported.
    transformers' own defaults, such as top_k=50, are not in a model's configuration and are not used.
    """
    model: Any = target.model
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None or all(getattr(config, name, None) is None for name in _ACTIVE):
        return dict(given)
    if no_beams and asks(config, "num_beams"):
        config = copy.copy(config)
        for name in _OF_BEAMS:
            setattr(config, name, None)
    _check_types(config)
    _refuse_other_decoding(config)
    asked = _merge(config, given, num_prompt)
    if asked.suppress_tokens and "suppress_tokens" not in given:
        # as transformers, which looks for each id of the vocabulary among these
        asked.suppress_tokens = [t for t in asked.suppress_tokens if 0 <= t < target.num_logits]
        asked.suppress_tokens = asked.suppress_tokens or None
    ends = sorted(stop_token_ids)
    asked._eos_token_tensor = torch.tensor(ends, device=target.device) if ends else None
    if not ends:
        # it raises the scores of the end tokens, and there are none
        asked.exponential_decay_length_penalty = None
    try:
        processors = list(
            model._get_logits_processor(
                generation_config=asked, input_ids_seq_length=num_prompt, device=target.device
            )
        )
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise unusable(error) from error
    return _as_request_settings(asked, given, processors)


_REMEDY: Final = "set 'generation_config: none' to ignore it, or correct the model's"
_REMEDY_OF_BEAMS: Final = (
    "set 'generation_config: no_beams' to decode without beam search, or 'generation_config: none' to "
    "ignore all of it"
)


def unusable(error: Exception) -> RequestError:
    """Return the error of a model whose own settings raise `error`."""
    return RequestError(f"the model's generation configuration cannot be used: {error}; {_REMEDY}")


def _wrong_setting(name: str, value: object, problem: str, remedy: str = _REMEDY) -> RequestError:
    return RequestError(
        f"the model's generation configuration sets {name}={shorten(value)}, which {problem}; {remedy}"
    )


class _Computed(BaseModel):
    """Settings that are used in arithmetic before transformers reads them, and their types."""

    model_config = ConfigDict(strict=True, from_attributes=True)

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    stop_strings: str | list[str] | tuple[str, ...] | None = None


def _check_types(config: GenerationConfig) -> None:
    """Raise RequestError for a setting of the model whose value has the wrong type."""
    try:
        _Computed.model_validate(config)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        allowed = "a string or a list" if name == "stop_strings" else "a whole number"
        raise _wrong_setting(name, getattr(config, name), f"is not {allowed}") from error


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
        asked.repetition_penalty = 1.0  # paceline's rule applies it, with its scope
    if asked.forced_bos_token_id is not None and ("forced_tokens" in given or num_prompt > 1):
        asked.forced_bos_token_id = None  # transformers forces it after a prompt of one token only
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        # transformers makes no processor of an empty setting
        setattr(asked, name, _integers(name, getattr(asked, name), _REMEDY) or None)
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


def _as_request_settings(
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
        # a processor applies it; bans may be applied twice
        settings.pop("repetition_penalty", None)
    if processors:
        settings["processors"] = (*processors, *given.get("processors", ()))
    return settings


def _refuse_other_decoding(config: GenerationConfig) -> None:
    """Raise RequestError for an active setting of the model that paceline does not support."""
    for name in (*OTHER_DECODING, *_BEFORE_DECODING):
        if asks(config, name):
            remedy = _REMEDY_OF_BEAMS if name in _OF_BEAMS else _REMEDY
            raise _wrong_setting(name, getattr(config, name), "paceline does not support", remedy)


# --- settings of a merged configuration and its processors ---------------------------------------


def asks(config: GenerationConfig, name: str) -> bool:
    """Return whether a setting has an effect; None, zero, empty and idle values have none."""
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
    if processors and isinstance(processors[-1], logits_process.LogitNormalization):
        processors.pop()  # probabilities are normalised anyway
    for kind, name in _WARPERS:
        if processors and type(processors[-1]) is kind and _is_plain(processors[-1]):
            sampling[name] = getattr(processors.pop(), name)
    return sampling


def _is_plain(warper: Any) -> bool:
    """Return whether a warper removes tokens as paceline's own does."""
    keep = getattr(warper, "min_tokens_to_keep", 1)
    return keep == 1 and getattr(warper, "filter_value", -torch.inf) == -torch.inf


def _integers(name: str, ids: Any, remedy: str) -> list[int]:
    """Return the token ids of a setting; none for None. Raises RequestError if they are not integers."""
    try:
        listed = list(ids or ()) if ids is None or isinstance(ids, (set, frozenset)) else ids
        whole = ids if isinstance(ids, torch.Tensor) else torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):
        whole = torch.empty(1)
    strange = whole.is_floating_point() or whole.is_complex() or whole.dtype == torch.bool
    if strange and whole.numel():
        raise _wrong_setting(name, ids, "are not token ids", remedy)
    numbers: list[int] = whole.flatten().tolist()
    return numbers
