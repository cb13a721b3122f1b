"""What a call of transformers' `generate` asks for, as paceline requests, or a refusal by name.

Read from what transformers prepared: its generation configuration with all defaults filled in, its
logits processors and its stopping criteria. Processors stay transformers' own objects in their own
order; only the warpers at the end of the list become sampling parameters, so that drafters that
sample know them. Knows no engine. Symbols: B rows, L padded prompt length, V logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import Cache
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

    Processor = Callable[[Tensor, Tensor], Tensor]

_ELSEWHERE: Final = "drop it, or leave out custom_generate"
_OWN_CACHE: Final = "paceline keeps its own cache; drop it"
_NOT_KEPT: Final = "paceline does not keep it; drop it (`Pace.request` gives log-probabilities)"
_DRAFTER: Final = "give a drafter to paceline instead: pace=, drafters= or assistant_model="

# setting -> what to do about it; nothing, zero and transformers' own defaults ask for nothing
_REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(OTHER_DECODING, _ELSEWHERE),
    "encoder_repetition_penalty": "use repetition_penalty",
    "encoder_no_repeat_ngram_size": "use no_repeat_ngram_size",
    "num_assistant_tokens": "set num_draft_tokens of the drafter",
    "num_assistant_tokens_schedule": "set num_draft_tokens of the drafter",
    "assistant_confidence_threshold": "set num_draft_tokens of the drafter",
    "assistant_ensemble_weight": "it changes what is written; drop it",
    "assistant_early_exit": _DRAFTER,
    "use_mtp": _DRAFTER,
    "speculation_type": _DRAFTER,
}
# settings that transformers honours when it decodes itself, as in `assisted`
_REFUSED_HERE: Final[Mapping[str, str]] = {
    "output_scores": _NOT_KEPT,
    "output_logits": _NOT_KEPT,
    "output_attentions": _NOT_KEPT,
    "output_hidden_states": _NOT_KEPT,
    "cache_implementation": _OWN_CACHE,
    "cache_config": _OWN_CACHE,
    "max_cache_len": _OWN_CACHE,
    "prefill_chunk_size": "set engine.prefill_chunk in paceline's configuration",
    "compile_config": "paceline's forward is not compiled; drop it",
    "continuous_batching_config": "rows of a batch are decoded together already; drop it",
}

# inputs of the model's forward that a caller may give, in addition to an empty cache of any name
_INPUTS: Final = frozenset(
    {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A call of `generate` in paceline's words. `criteria` is what the engine has no rule for."""

    max_new_tokens: int
    stop_token_ids: frozenset[int]
    pad_token_id: int | None
    sampling: dict[str, Any]  # temperature 0 is greedy
    processors: tuple[Processor, ...]
    criteria: tuple[Callable[[Tensor, Any], Tensor], ...]


def read_settings(
    config: GenerationConfig,
    processors: Sequence[Processor],
    criteria: Sequence[Callable[[Tensor, Any], Tensor]],
    num_prompt: int,
) -> Asked:
    """Raises RequestError with the name of a setting that cannot be honoured. num_prompt: L."""
    refuse_other_decoding(config, processors)
    _refuse_settings(config, _REFUSED_HERE)
    left = list(processors)
    sampling = take_warpers(left) if config.do_sample else {"temperature": 0.0}
    ends = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    stops = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
    pad = getattr(config, "_pad_token_tensor", None)
    return Asked(
        max_new_tokens=min(ends) - num_prompt,
        stop_token_ids=frozenset(t for ids in stops for t in ids.flatten().tolist()),
        pad_token_id=None if pad is None else int(pad),
        sampling=sampling,
        processors=tuple(left),
        criteria=tuple(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))
        ),
    )


def read_sampling(config: GenerationConfig, processors: Sequence[Processor]) -> SamplingParams:
    """How the target's tokens are drawn, as far as paceline has words for it."""
    if not config.do_sample:
        return SamplingParams()
    seed = int(torch.randint(2**62, ()))
    return SamplingParams(**take_warpers(list(processors)), seed=seed, method="residual")


def refuse_other_decoding(config: GenerationConfig, processors: Sequence[Processor]) -> None:
    """Raise RequestError for settings that change the choice of tokens, in `generate` and `assisted`."""
    _refuse_settings(config, _REFUSED)
    refuse_stateful(processors)


def _refuse_settings(config: GenerationConfig, refused: Mapping[str, str]) -> None:
    for name, advice in refused.items():
        if asks(config, name):
            value = shorten(getattr(config, name))
            raise RequestError(f"paceline does not support {name}={value} of generate: {advice}")


def read_padding(
    input_ids: Tensor, model_kwargs: Mapping[str, Any], given: Mapping[str, Any]
) -> list[int]:
    """Return the number of padding tokens left of each row. Refuses inputs other than plain text.

    input_ids: [B, L]. model_kwargs: prepared by transformers. given: those of the caller; all others
    follow from the text and its mask.
    """
    for name, value in given.items():
        if isinstance(value, Cache) and not value.get_seq_length():
            continue
        if isinstance(value, Cache):
            raise RequestError(
                f"'{name}' already holds text; paceline keeps its own cache (and shares prompts that "
                "begin alike), so give the whole prompt as input_ids"
            )
        if name not in _INPUTS and value is not None:
            raise RequestError(
                f"paceline does not support the model input '{name}'; it decodes from input_ids and "
                "attention_mask alone"
            )
    num_rows, length = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    mask = (mask != 0).long()
    if (mask[:, 1:] < mask[:, :-1]).any() or not mask[:, -1].all():
        raise RequestError(
            "attention_mask hides tokens that are not padding on the left; tokenize with "
            "padding_side='left'"
        )
    positions = model_kwargs.get("position_ids")
    usual = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    if positions is not None and ((positions - usual) * mask).any():
        raise RequestError(
            "paceline counts positions from each row's first token; drop position_ids"
        )
    padding: list[int] = (length - mask.sum(dim=-1)).tolist()
    assert len(padding) == num_rows
    return padding


def of_row(processors: Sequence[Processor], row: int, padding: Tensor) -> tuple[Processor, ...]:
    """The processors as they would act on one row of the batch; padding: [num_pad] its tokens."""
    return tuple(_InBatch(_of_row(p, row, len(padding)), padding[None]) for p in processors)


def _of_row(processor: Processor, row: int, num_padding: int) -> Processor:
    """Two of transformers' processors hold something for each row of the batch."""
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(
        processor.prompt_ignore_length, torch.Tensor
    ):
        alone: Processor = RepetitionPenaltyLogitsProcessor(processor.penalty, num_padding or None)
        return alone
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        alone = PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
        return alone
    return processor


@dataclass(frozen=True, slots=True)
class _InBatch:
    """A processor that is shown a row's text as in the batch, behind the row's padding."""

    processor: Processor
    padding: Tensor  # [1, num_pad]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(torch.cat((self.padding.to(input_ids), input_ids), dim=1), scores)
