"""paceline inside transformers' own calls.

    model.generate(**inputs, custom_generate=hf.generate, pace=pace)       paceline decodes
    model.generate(**inputs, custom_generate=hf.assisted, drafter=drafter)  transformers decodes

`generate` hands the batch to a `Pace`; `assisted` and `candidate_generator` lend one of paceline's
drafters to transformers' assisted decoding. What a call asks for is honoured or refused by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from paceline.contracts import AUTO, NONE, Completion, SamplingParams
from paceline.engine import raise_failure
from paceline.errors import RequestError
from paceline.integrations.candidates import DrafterCandidates
from paceline.integrations.generation_settings import (
    Asked,
    of_row,
    read_padding,
    read_sampling,
    read_settings,
    refuse_other_decoding,
)
from paceline.integrations.kept_pace import pace_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from paceline.assembly import Pace
    from paceline.contracts import Request
    from paceline.drafting.base import Drafter
    from paceline.engine import RequestUpdate
    from paceline.integrations.kept_pace import Drafting

__all__ = ["DrafterCandidates", "GenerateOutput", "assisted", "candidate_generator", "generate"]


# settings by which transformers picks a candidate generator of its own
_OTHER_ASSISTANTS: Final = (
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
)


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output, and beside it what paceline knows of each row: rounds, seconds, arm."""

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
    drafters: Mapping[str, Drafting] | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """For `custom_generate=`: paceline decodes the batch, with the text `generate` would write.

    pace: made by `paceline.load(target=model, ...)`. Without one it is made from `drafters`, or from
    `assistant_model=` or `prompt_lookup_num_tokens=`, and kept with the model. drafter: the arm's name
    for all rows; by default the policy's choice, else the only one there is. seed: of sampling;
    without one it is drawn from torch's generator, so `set_seed` holds here too. Returns [B, L + n]
    as `generate` does, or a `GenerateOutput` with `return_dict_in_generate`. Raises RequestError for
    what cannot be honoured.
    """
    lost = _lost_arguments(model)
    streamer = lost["streamer"] if streamer is None else streamer
    try:
        if lost["synced_gpus"]:
            raise RequestError("paceline runs in one process; it does not support synced_gpus")
        asked = read_settings(
            generation_config, logits_processor, stopping_criteria, input_ids.shape[1]
        )
        given = _given_inputs(lost, generation_config, model_kwargs)
        padding = read_padding(input_ids, model_kwargs, given)
        if streamer is not None and len(input_ids) > 1:
            raise RequestError("a streamer takes one row; generate the rows of a batch one by one")
        pace = pace_of(model, generation_config, pace, drafters, lost["assistant_model"])
        arm = _arm(pace, drafter)
        rows = [
            _Row(_request(pace, asked, input_ids[i], i, n, arm, seed), input_ids[i : i + 1], [])
            for i, n in enumerate(padding)
        ]
        _decode(pace, rows, asked, streamer)
        sequences = _sequences(input_ids, rows, asked.pad_token_id)
    finally:
        if streamer is not None:
            streamer.end()  # also when this raises: someone may wait for the stream's end
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateOutput(
        sequences=sequences,  # type: ignore[arg-type]
        completions=[row.completion for row in rows if row.completion is not None],
    )


@dataclass(slots=True)
class _Row:
    request: Request
    prompt: Tensor  # [1, L] with its padding
    tokens: list[int]
    stopped: bool = False  # by a criterion
    completion: Completion | None = None


def _lost_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of the `model.generate` above us that transformers does not hand on.

    transformers (seen in 5.23) passes a custom function only what it finds in `generate`'s keyword
    arguments, and takes these out before. A streamer was already given the prompt and may have a
    reader waiting, so to leave it alone would be to hang; its frame is the only place they are at.
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
    """Return the inputs of the model's forward that the caller gave, or all if that is not known.

    `generate` itself takes the keyword arguments that its configuration has an attribute for.
    """
    if lost["kwargs"] is None:
        return model_kwargs
    return {n: v for n, v in lost["kwargs"].items() if not hasattr(config, n)}


def _arm(pace: Pace, drafter: str | None) -> str:
    if drafter is not None:
        return drafter
    if pace.engine.choose is not None:
        return AUTO
    others = [name for name in pace.drafters if name != NONE]
    if len(others) > 1:
        raise RequestError(
            f"no policy chooses among {', '.join(others)} ({pace.engine.why_no_policy}); name one with "
            "drafter="
        )
    return others[0] if others else NONE


def _request(
    pace: Pace, asked: Asked, ids: Tensor, row: int, num_padding: int, arm: str, seed: int | None
) -> Request:
    """One row's request. ids: [L] with its padding."""
    sampling = dict(asked.sampling)
    if sampling["temperature"] > 0:
        drawn = int(torch.randint(2**62, ()))
        sampling["seed"] = drawn if seed is None else seed + row
        sampling["sampling"] = "residual" if seed is None else "invariant"
    rules: dict[str, Any] = {}
    if asked.processors:
        rules["processors"] = of_row(asked.processors, row, ids[:num_padding])
    return pace.request(
        ids[num_padding:].tolist(),
        id=str(row),
        max_new_tokens=asked.max_new_tokens,
        drafter=arm,
        ignore_eos=True,  # the call has its own; as in transformers, unknown ids are ignored
        stop_token_ids={t for t in asked.stop_token_ids if 0 <= t < pace.parts.target.num_logits},
        generation_config="none",  # transformers has merged the model's and the call's
        **sampling,
        **rules,
    )


def _decode(pace: Pace, rows: list[_Row], asked: Asked, streamer: BaseStreamer | None) -> None:
    """Decode until every row has its completion."""
    for place, progress in pace.driver.progress([row.request for row in rows]):
        row = rows[place]
        new = list(_until_stopped(row, progress.new_tokens, asked))
        if streamer is not None and new:
            streamer.put(torch.tensor(new))
        if row.stopped:
            pace.driver.cancel(progress.ticket)
        if progress.completion is not None:
            _complete(pace, row, progress)


def _until_stopped(row: _Row, new_tokens: Sequence[int], asked: Asked) -> Iterator[int]:
    """New tokens up to the one at which a stopping criterion ends the row, asked token by token."""
    for token in new_tokens:
        if row.stopped:
            return
        row.tokens.append(token)
        if asked.criteria:
            output = torch.tensor([row.tokens]).to(row.prompt)
            text = torch.cat((row.prompt, output), dim=1)
            row.stopped = any(bool(torch.as_tensor(c(text, None)).any()) for c in asked.criteria)
        yield token


def _complete(pace: Pace, row: _Row, progress: RequestUpdate) -> None:
    raise_failure(progress)
    completion = progress.completion
    assert completion is not None
    if row.stopped:  # the engine may have gone on by some rounds
        text = pace.parts.tokenizer.decode(row.tokens, skip_special_tokens=True)
        completion = replace(completion, token_ids=row.tokens, text=str(text), finish_reason="stop")
    row.completion = completion


def _sequences(input_ids: Tensor, rows: Sequence[_Row], pad: int | None) -> Tensor:
    """Prompts and outputs [B, L + n], shorter outputs padded on the right."""
    longest = max(len(row.tokens) for row in rows)
    if pad is None and any(len(row.tokens) < longest for row in rows):
        raise RequestError("rows ended at different lengths and pad_token_id is not set; set it")
    padded = [row.tokens + [pad or 0] * (longest - len(row.tokens)) for row in rows]
    return torch.cat((input_ids, torch.tensor(padded).to(input_ids)), dim=1)


# --- transformers decodes -------------------------------------------------------------------------


def candidate_generator(
    drafter: Drafter,
    max_length: int,
    sampling: SamplingParams | None = None,
    num_padding: int = 0,
) -> DrafterCandidates:
    """A drafter as a `transformers.CandidateGenerator`, for one text; `close` it at the end.

    max_length: of prompt and output. sampling: how the target's tokens are drawn, which drafters that
    sample go by. transformers has no argument for a generator of one's own; `assisted` is the way in.
    """
    return DrafterCandidates(drafter, max_length, sampling, num_padding)


def assisted(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    *,
    drafter: Drafter | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Any:
    """For `custom_generate=`: transformers' own assisted decoding, with a paceline drafter.

    One row at a time, as always there. transformers offers no argument for a candidate generator, so
    for the length of this call the model's `_get_candidate_generator` is one that returns ours.
    """
    lost = _lost_arguments(model)
    if drafter is None:
        raise RequestError("hf.assisted needs drafter=, such as pace.parts.drafters['small']")
    others = {name: getattr(generation_config, name, None) for name in _OTHER_ASSISTANTS}
    others["assistant_model"] = lost["assistant_model"]
    if given := [name for name, value in others.items() if value]:
        raise RequestError(f"drafter and {given[0]} say different things; give one of them")
    refuse_other_decoding(generation_config, logits_processor)
    if len(input_ids) > 1:
        raise RequestError("transformers' assisted decoding takes one row; give one prompt")
    inputs = _given_inputs(lost, generation_config, model_kwargs)
    instance: Any = model
    with candidate_generator(
        drafter,
        max_length=generation_config.max_length,
        sampling=read_sampling(generation_config, logits_processor),
        num_padding=read_padding(input_ids, model_kwargs, inputs)[0],
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
