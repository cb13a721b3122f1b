"""The pace of a `generate` call that names none: made from the call's drafters, cached on the model.

The cached pace serves later calls with the same drafters until a model's weights change. Knows no
decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from paceline.assembly import Pace, load
from paceline.config import MAX_DRAFT_TOKENS
from paceline.drafting.prompt_lookup import PromptLookup, PromptLookupSettings
from paceline.errors import ConfigError, RequestError, shorten
from paceline.models.weights_monitor import WeightsMonitor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import GenerationConfig, PreTrainedModel

    from paceline.drafting.base import Drafter

    DraftSource = PreTrainedModel | Drafter

_ATTRIBUTE: Final = "_paceline_cached"  # of a model, for its cached pace


class _IdTokenizer:
    """A tokenizer for a model without one: every id is a token, and no token has a text."""

    eos_token_id = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_ids: ClassVar[list[int]] = []

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._num_tokens)}

    def decode(self, tokens: Sequence[int], **kwargs: Any) -> str:
        return ""


class _CachedPace:
    """A pace stored on its model, with the sources it was made from; copies of the model have none."""

    def __init__(
        self,
        made_from: tuple[Any, ...] = (),
        pace: Pace | None = None,
        monitors: Sequence[WeightsMonitor] = (),
    ) -> None:
        """monitors: one per source."""
        self.made_from, self.pace, self._monitors = made_from, pace, monitors

    def is_current(self, made_from: tuple[Any, ...]) -> bool:
        """Return whether there is a pace, made from these sources, whose weights have not changed."""
        if self.pace is None or self.made_from != made_from:
            return False
        return not any(monitor.has_changed() for monitor in self._monitors)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CachedPace:
        return _CachedPace()

    def __reduce__(self) -> tuple[type[_CachedPace], tuple[()]]:
        return _CachedPace, ()


def find_pace(
    model: PreTrainedModel,
    config: GenerationConfig,
    pace: Pace | None,
    drafters: Mapping[str, DraftSource] | None,
    assistant: PreTrainedModel | None,
) -> Pace:
    """Return the given pace, or the cached or a new one of the given drafters.

    Raises RequestError if more than one source is given, ConfigError for one that does not fit the
    model.
    """
    given: dict[str, object] = {
        "pace": pace,
        "drafters": drafters,
        "assistant_model": assistant,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
    }
    names = [name for name, source in given.items() if source is not None]
    if len(names) > 1:
        raise RequestError(f"{' and '.join(names)} contradict each other; give one of them")
    if pace is not None:
        if pace.parts.target.model is not model:
            raise ConfigError(
                "pace= was made for another model object; make it with paceline.load(target=model, "
                "tokenizer=tokenizer, drafters=...)"
            )
        return pace
    lookup = (config.prompt_lookup_num_tokens, config.max_matching_ngram_size)
    sources = dict(drafters or {})
    if assistant is not None:
        sources["assistant_model"] = assistant
    made_from = (sources, lookup)
    cached: Any = getattr(model, _ATTRIBUTE, None)
    if cached is None or not cached.is_current(made_from):
        made = _make_pace(model, sources, *lookup)
        cached = _CachedPace(
            made_from, made, [WeightsMonitor(m) for m in (model, *sources.values())]
        )
        setattr(model, _ATTRIBUTE, cached)
    found: Pace = cached.pace
    return found


def _make_pace(
    model: PreTrainedModel,
    sources: Mapping[str, DraftSource],
    lookup_tokens: int | None,
    lookup_ngram: int | None,
) -> Pace:
    """Return a pace whose models, as in transformers, share a tokenizer if they share a width."""
    drafters: dict[str, Any] = dict(sources)
    width = model.get_output_embeddings().weight.shape[0]
    for name, source in sources.items():
        if isinstance(source, torch.nn.Module):
            own_width = source.get_output_embeddings().weight.shape[0]
            if own_width != width:
                raise ConfigError(
                    f"'{name}' has {own_width} logits, the target {width}; if they share a tokenizer, "
                    "give pace=paceline.load(target=model, tokenizer=tokenizer, drafters={name: "
                    "(drafter, its_tokenizer)}), which compares the tokenizers themselves"
                )
    if lookup_tokens is not None:
        _check_length("prompt_lookup_num_tokens", lookup_tokens)
        ngram = lookup_ngram or 2  # transformers' default
        settings = PromptLookupSettings(
            num_draft_tokens=lookup_tokens, min_ngram=1, max_ngram=ngram
        )
        drafters["prompt_lookup"] = PromptLookup("prompt_lookup", settings)
    tokenizer: Any = _IdTokenizer(width)
    pace = load(target=model, tokenizer=tokenizer, drafters=drafters, with_policy=False)
    for name, source in sources.items():
        config: Any = getattr(source, "generation_config", None)
        num_tokens = getattr(config, "num_assistant_tokens", None)
        if num_tokens is not None:
            _check_length("num_assistant_tokens", num_tokens)
            pace.parts.drafters[name].num_draft_tokens = num_tokens
    return pace


def _check_length(setting: str, num_tokens: int) -> None:
    if not 1 <= num_tokens <= MAX_DRAFT_TOKENS:
        raise RequestError(
            f"{setting} must be between 1 and {MAX_DRAFT_TOKENS}; got {shorten(num_tokens)}"
        )
