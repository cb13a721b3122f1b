"""Reads a call of transformers' `generate` into request settings, or refuses a setting by name.

The input is prepared by transformers: its generation configuration with all defaults, its logits
processors and its stopping criteria. Processors stay transformers' own objects in their own order;
only the warpers at the end of the list become sampling parameters, for drafters that sample. Knows no
engine. Symbols: B rows, L padded prompt length, V logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from paceline.contracts import SamplingParams
from paceline.errors import RequestError, shorten
from paceline.models.generation_config import (
    OTHER_DECODING,
    asks,
    refuse_stateful,
    take_warpers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import GenerationConfig

    from paceline.contracts import LogitsProcessor

_ELSEWHERE: Final = "remove it, or remove custom_generate"
_OWN_CACHE: Final = "paceline has its own cache; remove it"
_NOT_STORED: Final = (
    "paceline does not store it; remove it (`Pace.request` gives log-probabilities)"
)
_DRAFTER: Final = "give a drafter to paceline instead: pace=, drafters= or assistant_model="

# setting -> what to do instead; None, zero and transformers' own defaults are not refused
_REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(OTHER_DECODING, _ELSEWHERE),
    "encoder_repetition_penalty": "use repetition_penalty",
    "encoder_no_repeat_ngram_size": "use no_repeat_ngram_size",
    "num_assistant_tokens": "set num_draft_tokens of the drafter",
    "num_assistant_tokens_schedule": "set num_draft_tokens of the drafter",
    "assistant_confidence_threshold": "set num_draft_tokens of the drafter",
    "assistant_ensemble_weight": "it changes the text; remove it",
    "assistant_early_exit": _DRAFTER,
    "use_mtp": _DRAFTER,
    "speculation_type": _DRAFTER,
}
# settings that `assisted` supports, where transformers decodes
_REFUSED_HERE: Final[Mapping[str, str]] = {
    "output_scores": _NOT_STORED,
    "output_logits": _NOT_STORED,
    "output_attentions": _NOT_STORED,
    "output_hidden_states": _NOT_STORED,
    "cache_implementation": _OWN_CACHE,
    "cache_config": _OWN_CACHE,
    "max_cache_len": _OWN_CACHE,
    "prefill_chunk_size": "set engine.prefill_chunk in paceline's configuration",
    "compile_config": "paceline's forward is not compiled by transformers; remove it",
    "continuous_batching_config": "rows of a batch are decoded together already; remove it",
}


@dataclass(frozen=True, slots=True)
class CallSettings:
    """Settings of one call of `generate`. `criteria`: those for which the engine has no rule."""

    max_new_tokens: int
    stop_token_ids: frozenset[int]
    pad_token_id: int | None
    sampling: dict[str, Any]  # temperature 0 is greedy
    processors: tuple[LogitsProcessor, ...]
    criteria: tuple[Callable[[Tensor, Any], Tensor], ...]


def read_settings(
    config: GenerationConfig,
    processors: Sequence[LogitsProcessor],
    criteria: Sequence[Callable[[Tensor, Any], Tensor]],
    num_prompt: int,
) -> CallSettings:
    """Return the settings of a call. num_prompt: L. Raises RequestError that names a refused setting."""
    refuse_other_decoding(config, processors)
    _refuse_settings(config, _REFUSED_HERE)
    remaining = list(processors)
    sampling = take_warpers(remaining) if config.do_sample else {"temperature": 0.0}
    limits = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    stops = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
    pad = getattr(config, "_pad_token_tensor", None)
    return CallSettings(
        max_new_tokens=min(limits) - num_prompt,
        stop_token_ids=frozenset(t for ids in stops for t in ids.flatten().tolist()),
        pad_token_id=None if pad is None else int(pad),
        sampling=sampling,
        processors=tuple(remaining),
        criteria=tuple(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))
        ),
    )


def read_sampling(
    config: GenerationConfig, processors: Sequence[LogitsProcessor]
) -> SamplingParams:
    """Return the sampling parameters of a call, without processors that have no parameter."""
    if not config.do_sample:
        return SamplingParams()
    seed = int(torch.randint(2**62, ()))
    return SamplingParams(**take_warpers(list(processors)), seed=seed, method="residual")


def refuse_other_decoding(config: GenerationConfig, processors: Sequence[LogitsProcessor]) -> None:
    """Raise RequestError for settings that `generate` and `assisted` both refuse."""
    _refuse_settings(config, _REFUSED)
    refuse_stateful(processors)


def _refuse_settings(config: GenerationConfig, refused: Mapping[str, str]) -> None:
    for name, advice in refused.items():
        if asks(config, name):
            value = shorten(getattr(config, name))
            raise RequestError(f"paceline does not support {name}={value} of generate: {advice}")


def processors_of_row(
    processors: Sequence[LogitsProcessor], row: int, padding: Tensor
) -> tuple[LogitsProcessor, ...]:
    """Return processors that act as on one row of the batch. padding: [num_pad] its tokens."""
    return tuple(
        _PaddedProcessor(_unbatched(p, row, len(padding)), padding[None]) for p in processors
    )


def _unbatched(processor: LogitsProcessor, row: int, num_padding: int) -> LogitsProcessor:
    """Return a processor for one row; two of transformers' processors hold data of every row."""
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(
        processor.prompt_ignore_length, torch.Tensor
    ):
        alone: LogitsProcessor = RepetitionPenaltyLogitsProcessor(
            processor.penalty, num_padding or None
        )
        return alone
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        alone = PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
        return alone
    return processor


@dataclass(frozen=True, slots=True)
class _PaddedProcessor:
    """A processor that receives a row's text after the row's padding, as in the batch."""

    processor: LogitsProcessor
    padding: Tensor  # [1, num_pad]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(torch.cat((self.padding.to(input_ids), input_ids), dim=1), scores)
