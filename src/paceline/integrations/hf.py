"""paceline in transformers' own calls.

    model.generate(**inputs, custom_generate=hf.generate, pace=pace)       paceline decodes
    model.generate(**inputs, custom_generate=hf.assisted, drafter=drafter)  transformers decodes

`generate` gives the batch to a `Pace`; `assisted` and `candidate_generator` give one of paceline's
drafters to transformers' assisted decoding. A setting that is not supported is refused by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from paceline.contracts import AUTO, NONE, Completion
from paceline.engine import raise_failure
from paceline.errors import RequestError
from paceline.integrations.cached_pace import find_pace
from paceline.integrations.candidates import DrafterCandidates
from paceline.integrations.generation_settings import (
    CallSettings,
    processors_of_row,
    read_sampling,
    read_settings,
    refuse_other_decoding,
)
from paceline.integrations.prompts import Prompt, read_prompts
from paceline.models.encoder_decoder import is_encoder_decoder, start_token
from paceline.selection import UntrainedController

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from paceline.assembly import Pace
    from paceline.contracts import Request
    from paceline.drafting.base import Drafter
    from paceline.integrations.cached_pace import DraftSource

__all__ = ["DrafterCandidates", "GenerateOutput", "assisted", "candidate_generator", "generate"]


# settings for which transformers makes its own candidate generator
_OTHER_ASSISTANTS: Final = (
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
)


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output, with a completion per row: its rounds, seconds and arm."""

    completions: list[Completion] | None = None


# --- paceline decodes -----------------------------------------------------------------------------


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    *,
    pace: Pace | None = None,
    drafter: str | None = None,
    drafters: Mapping[str, DraftSource] | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """Decode a batch with paceline, for `custom_generate=`; the text is the one `generate` writes.

    pace: made by `paceline.load(target=model, ...)`. Without one, a pace is made from `drafters`,
    `assistant_model=` or `prompt_lookup_num_tokens=` and cached on the model. drafter: the arm of all
    rows; by default the policy's choice, without a policy the only drafter, else `auto`. seed: of
    sampling, by default drawn from torch's generator, so `set_seed` works. inputs_tensor: given by
    transformers, what an encoder reads; transformers has run the encoder before, and paceline runs it
    again for each row without padding. Returns [B, L + n] as `generate` does, or a `GenerateOutput` with
    `return_dict_in_generate`.

    Raises RequestError for a setting that is not supported, ConfigError for a pace or drafter that
    does not fit the model, DecodingError if a row fails.
    """
    lost = _lost_arguments(model)
    streamer = lost["streamer"] if streamer is None else streamer
    try:
        if lost["synced_gpus"]:
            raise RequestError("paceline runs in one process; set synced_gpus=False")
        settings = read_settings(
            generation_config, logits_processor, stopping_criteria, input_ids.shape[1]
        )
        given = _given_inputs(lost, generation_config, model_kwargs)
        prompts = read_prompts(input_ids, model_kwargs, given, inputs_tensor, _start_of(model))
        if streamer is not None and len(input_ids) > 1:
            raise RequestError("a streamer takes one row; generate the rows of a batch one by one")
        pace = find_pace(model, generation_config, pace, drafters, lost["assistant_model"])
        arm = _arm(pace, drafter)
        rows = [
            _Row(_request(pace, settings, prompt, i, arm, seed), input_ids[i : i + 1], [])
            for i, prompt in enumerate(prompts)
        ]
        _decode(pace, rows, settings, streamer)
        sequences = _sequences(input_ids, rows, settings.pad_token_id)
    finally:
        if streamer is not None:
            streamer.end()  # after an error too: a reader may wait for the end
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateOutput(
        sequences=sequences,  # type: ignore[arg-type]
        completions=[row.completion for row in rows if row.completion is not None],
    )


@dataclass(slots=True)
class _Row:
    request: Request
    prompt: Tensor  # [1, L] with padding
    tokens: list[int]
    stopped: bool = False  # by a criterion
    completion: Completion | None = None


def _lost_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of the calling `model.generate` that transformers does not pass on.

    transformers (seen in 5.23) removes these from the keyword arguments of a custom function, so the
    caller's frame is the only place to read them. A streamer already has the prompt and perhaps a
    waiting reader, which would never end if the streamer were ignored.
    """
    names = ("streamer", "assistant_model", "synced_gpus", "kwargs")
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is model:
            return {name: frame.f_locals.get(name) for name in names}
        frame = frame.f_back
    return dict.fromkeys(names)


def _given_inputs(
    lost: Mapping[str, Any], config: GenerationConfig, model_kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the inputs of the model's forward that the caller gave, or all if they are unknown.

    Keyword arguments that name an attribute of the configuration are `generate`'s own.
    """
    if lost["kwargs"] is None:
        return model_kwargs
    return {n: v for n, v in lost["kwargs"].items() if not hasattr(config, n)}


def _start_of(model: PreTrainedModel) -> int | None:
    """Return the first token of a decoder's text, None for a model without an encoder."""
    return start_token(model, "the model") if is_encoder_decoder(model) else None


def _arm(pace: Pace, drafter: str | None) -> str:
    if drafter is not None:
        return drafter
    is_untrained = isinstance(pace.controller, UntrainedController)
    others = [name for name in pace.drafters if name not in (NONE, pace.parts.built_in)]
    if pace.engine.choose is not None and not (is_untrained and len(others) == 1):
        return AUTO
    if len(others) > 1:
        raise RequestError(f"no policy chooses among {', '.join(others)}; name one with drafter=")
    return others[0] if others else NONE


def _request(
    pace: Pace,
    call: CallSettings,
    prompt: Prompt,
    row: int,
    arm: str,
    seed: int | None,
) -> Request:
    """Return one row's request."""
    sampling = dict(call.sampling)
    if sampling["temperature"] > 0:
        drawn = int(torch.randint(2**62, ()))
        sampling["seed"] = drawn if seed is None else seed + row
        sampling["sampling"] = "residual" if seed is None else "invariant"
    rules: dict[str, Any] = {}
    if call.processors:
        rules["processors"] = processors_of_row(call.processors, row, prompt.padding)
    return pace.request(
        prompt.tokens,
        id=str(row),
        max_new_tokens=call.max_new_tokens,
        drafter=arm,
        ignore_eos=True,  # the call names its own; unknown ids are ignored, as in transformers
        stop_token_ids={t for t in call.stop_token_ids if 0 <= t < pace.parts.target.num_logits},
        generation_config="none",  # transformers has merged both configurations
        **sampling,
        **rules,
    )


def _decode(
    pace: Pace, rows: list[_Row], call: CallSettings, streamer: BaseStreamer | None
) -> None:
    for place, progress in pace.driver.progress([row.request for row in rows]):
        row = rows[place]
        new = list(_until_stopped(row, progress.new_tokens, call))
        if streamer is not None and new:
            streamer.put(torch.tensor(new))
        if row.stopped:
            pace.driver.cancel(progress.ticket)
        if progress.completion is not None:
            raise_failure(progress)
            row.completion = _complete(pace, row, progress.completion)


def _until_stopped(row: _Row, new_tokens: Sequence[int], call: CallSettings) -> Iterator[int]:
    for token in new_tokens:
        if row.stopped:
            return
        row.tokens.append(token)
        if call.criteria:
            output = torch.tensor([row.tokens]).to(row.prompt)
            text = torch.cat((row.prompt, output), dim=1)
            row.stopped = any(bool(torch.as_tensor(c(text, None)).any()) for c in call.criteria)
        yield token


def _complete(pace: Pace, row: _Row, completion: Completion) -> Completion:
    if not row.stopped:
        return completion
    text = pace.parts.tokenizer.decode(row.tokens, skip_special_tokens=True)
    return replace(completion, token_ids=row.tokens, text=str(text), finish_reason="stop")


def _sequences(input_ids: Tensor, rows: Sequence[_Row], pad: int | None) -> Tensor:
    """Return prompts and outputs [B, L + n]; shorter outputs are padded on the right."""
    longest = max(len(row.tokens) for row in rows)
    if pad is None and any(len(row.tokens) < longest for row in rows):
        raise RequestError("rows ended at different lengths and pad_token_id is not set; set it")
    padded = [row.tokens + [pad or 0] * (longest - len(row.tokens)) for row in rows]
    return torch.cat((input_ids, torch.tensor(padded).to(input_ids)), dim=1)


# --- transformers decodes -------------------------------------------------------------------------


candidate_generator = DrafterCandidates
"""A drafter as a candidate generator for one text, to be used by hand."""


def assisted(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    *,
    drafter: Drafter | None = None,
    streamer: BaseStreamer | None = None,
    inputs_tensor: Tensor | None = None,
    **model_kwargs: Any,
) -> Any:
    """Decode one row in transformers' assisted decoding with a paceline drafter.

    For `custom_generate=`. transformers has no argument for a candidate generator, so this call
    replaces the model's `_get_candidate_generator` while it runs. Raises RequestError for a setting
    that is not supported, ConfigError for a drafter that reads the target's states.
    """
    lost = _lost_arguments(model)
    if drafter is None:
        raise RequestError("hf.assisted needs drafter=, such as pace.parts.drafters['small']")
    _refuse_other_drafters(generation_config, lost["assistant_model"])
    refuse_other_decoding(generation_config, logits_processor)
    if len(input_ids) > 1:
        raise RequestError("transformers' assisted decoding takes one row; give one prompt")
    inputs = _given_inputs(lost, generation_config, model_kwargs)
    start = _start_of(model)
    [prompt] = read_prompts(input_ids, model_kwargs, inputs, inputs_tensor, start)
    instance: Any = model
    with candidate_generator(
        drafter,
        max_length=generation_config.max_length,
        sampling=read_sampling(generation_config, logits_processor),
        num_padding=len(prompt.padding),
        source=None if start is None else prompt.tokens,
    ) as candidates:
        instance._get_candidate_generator = lambda **_: candidates
        try:
            return instance._assisted_decoding(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=bool(lost["synced_gpus"]),
                streamer=lost["streamer"] if streamer is None else streamer,
                **model_kwargs,
            )
        finally:
            del instance._get_candidate_generator


def _refuse_other_drafters(config: GenerationConfig, assistant: PreTrainedModel | None) -> None:
    others = {name: getattr(config, name, None) for name in _OTHER_ASSISTANTS}
    for name, value in {**others, "assistant_model": assistant}.items():
        if value:
            raise RequestError(f"drafter and {name} contradict each other; give one of them")
